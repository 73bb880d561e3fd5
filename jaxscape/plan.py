"""How points are decoded on this machine: the form of the weights, the slots, and the memory that they take."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import jax
import numpy as np

from jaxscape.decode import Sampling, common_prefix, round_up
from jaxscape.device import Roofline, free_memory, roofline
from jaxscape.errors import UserError
from jaxscape.models import Model
from jaxscape.models.checkpoint import named_leaves, parameter_shardings
from jaxscape.models.shapes import ModelShape
from jaxscape.perturb import STORAGES
from jaxscape.processes import from_first
from jaxscape.sharding import split_of

FORMS = ("auto", "materialised", "factorised", "streamed")
PLACE_ROWS = 4  # in the factorised form: few, so that a place is soon free, and its rows still share a prefix
MARGIN = 0.9  # of the free memory that a plan may fill
ENOUGH = 8  # times the rows at which arithmetic takes as long as reading the weights: more hardly save anything
HOST_BANDWIDTH = 1e10  # bytes per second from host memory to a device, of a PCIe slot
NOISE = 4500  # operations at the speed of a large product that a number drawn from a seed takes
MOST_INSERTS = 16  # for each of the devices that share the rows
TILE = 8  # rows that an accelerator's memory keeps together; XLA copies caches that are cut elsewhere


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine; what is not given is planned."""

    form: Literal["auto", "materialised", "factorised", "streamed"] = "auto"
    """materialised makes each point's weights on the device, streamed the same from weights in host memory; factorised
    decodes many points at once, with weights and directions that they share."""
    slots: int | None = None
    """Rows that decode together, of one point or, factorised, of many."""
    chunk: int | None = None
    """Tokens between two looks at what was generated, at most."""
    direction_storage: Literal["auto", "exact", "seed", "bfloat16", "int8"] = "auto"
    """How a direction is held: exact, or drawn from its seed wherever it is used, which gives the same; or rounded to
    bfloat16 or int8, which gives another direction."""
    full_text: bool = False
    """Generate whole texts, also where a refusal keyword has decided already."""

    def check(self) -> None:
        """Raise a `UserError` if an option is out of range."""
        for name, allowed in {"form": FORMS, "direction_storage": ("auto", *STORAGES)}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"The {name} {getattr(self, name)!r} is unknown; choose {', '.join(allowed)}.")
        for name in ("slots", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"The option {name} must be at least 1, not {value}.")


@dataclass(frozen=True)
class Plan:
    """How points are decoded.

    Attributes:
        places: points that decode together.
        rows: the slots of each.
        group: prompts that are inserted together; `rows` is a multiple of it.
        inserts: groups that one program inserts.
        chunk: decode steps between two looks at what was generated, at most.
        ahead: chunks that the device is given before the host has looked at the last one.
        few: the slots that the last rows move to, a multiple of `rows` if there are several places; 0 for none.
        storage: see `jaxscape.perturb.random_direction`.
        cache: bytes of the key-value cache, on each device.
        memory: bytes of weights, directions, cache and work space together, on each device.
        reason: why, for the user.
    """

    form: str
    places: int
    rows: int
    group: int
    inserts: int
    chunk: int
    ahead: int
    few: int
    storage: str
    cache: int
    memory: int
    reason: str

    def __str__(self) -> str:
        what = f"{self.form}: {self.rows} slots"
        if self.places > 1:
            what = f"{self.form}: {self.places} points at a time, {self.rows} slots each"
        held = "" if self.storage == "exact" else f", directions {_HELD[self.storage]}"
        size = f"{self.memory / 1e9:.2f} GB, of which the cache is {self.cache / 1e9:.2f}"
        return f"{what}{held}; {size} ({self.reason})"


_HELD = {"seed": "from their seeds", "bfloat16": "in bfloat16", "int8": "in int8"}


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        rows: tokens of the prompts.
        num_points, ndim: of a direction set.
        line: the points of it that differ in their last coordinate alone.
        drawn: how many of a set's directions are random ones, which are yet to be made.
    """

    rows: Sequence[Sequence[int]]
    sampling: Sampling
    num_points: int = 1
    line: int = 1
    ndim: int = 0
    drawn: int = 0


@dataclass(frozen=True)
class Machine:
    """What a plan is for.

    Attributes:
        speed: of each device.
        free: bytes that each device can still allocate; None if nobody knows.
        is_host: the devices are the host's own cores, which have nothing to do while the host looks.
    """

    speed: Roofline
    free: int | None
    is_host: bool


def this_machine(dtype: str) -> Machine:
    return Machine(roofline(dtype), free_memory(), jax.default_backend() == "cpu")


def make_plan(
    model: Model | ModelShape, work: Work, options: EngineOptions = EngineOptions(), machine: Machine | None = None
) -> Plan:
    """The plan that a roofline estimate takes for the fastest, among those that fit into the devices' memory.

    Arguments:
        model: of whose parameters only the shapes and dtypes count.
        machine: by default this one.

    Raises:
        UserError: nothing that the options allow fits, or they contradict one another.
    """
    options.check()
    if machine is None:
        # Machines measure differently: the first one's plan is for all processes.
        plan = from_first(lambda: asdict(_fastest(Planner(model, work, options, this_machine(model.dtype)))))
        return Plan(**plan)
    return _fastest(Planner(model, work, options, machine))


def smallest_plan(model: Model | ModelShape, work: Work, options: EngineOptions, machine: Machine) -> Plan:
    """The plan that takes the least memory, whether it fits or not."""
    return _smallest(Planner(model, work, options, machine))


def _smallest(planner: "Planner") -> Plan:
    return min(planner.all_plans(), key=planner.missing)


def _fastest(planner: "Planner") -> Plan:
    fitting = [plan for plan in planner.all_plans() if planner.fits(plan)]
    if not fitting:
        least = _smallest(planner)
        raise UserError(
            f"The device's memory does not hold this scan: in the {least.form} form with {least.places * least.rows} "
            f"slots it takes {least.memory / 1e9:.1f} GB on each device; choose a --dtype of 16 bits, fewer --slots, "
            f"shorter prompts, a lower --max-new-tokens, or, on an accelerator, --form streamed."
        )
    return min(fitting, key=planner.seconds)


class Planner:
    """Estimates of time and memory."""

    def __init__(self, model: Model | ModelShape, work: Work, options: EngineOptions, machine: Machine) -> None:
        self._work, self._options, self._machine, self._speed = work, options, machine, machine.speed
        self._split = split_of(model.mesh)
        leaves = named_leaves(model.params)
        sizes = {name: leaf.size for name, leaf in leaves.items()}
        config, self._config = model.config, model.config
        self._on_host = isinstance(next(iter(leaves.values())), np.ndarray)
        self._numbers, self._largest = sum(sizes.values()), max(sizes.values())
        where = named_leaves(parameter_shardings(config, model.mesh))
        self._held = sum(math.prod(where[name].shard_shape(leaf.shape)) for name, leaf in leaves.items())
        self._itemsize = np.dtype(model.dtype).itemsize
        # An embedding that is not the output head too is looked up, not multiplied with.
        looked_up = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        self._flops = 2 * (self._numbers - looked_up)
        prefix = common_prefix(work.rows)
        own = [len(row) - prefix for row in work.rows]
        self._own, self._longest, self._prefix = sum(own), round_up(max(own)), prefix
        kv_heads = config.num_kv_heads // model.mesh.shape["kv"]
        self._slot = 2 * config.num_layers * kv_heads * config.head_dim * self._itemsize
        if work.ndim == 0 and options.form == "factorised":
            raise UserError("Without directions there is nothing to share: the factorised form needs some.")
        if options.direction_storage == "seed" and not work.drawn:
            raise UserError("Only random directions have seeds that they can be drawn from.")

    def forms(self) -> list[str]:
        """Those that may be chosen."""
        form = self._options.form
        if self._on_host and form not in ("auto", "streamed"):
            raise UserError(f"The weights are in host memory; --form {form} needs them on the device.")
        if form != "auto":
            return [form]
        if self._on_host:
            return ["streamed"]
        return ["materialised", "factorised"] if self._work.ndim else ["materialised"]

    def missing(self, plan: Plan) -> int:
        """Bytes that are yet to be allocated on each device."""
        return plan.memory - (0 if self._on_host else self._weights)

    def fits(self, plan: Plan) -> bool:
        return self._machine.free is None or self.missing(plan) <= MARGIN * self._machine.free

    def all_plans(self) -> Iterator[Plan]:
        """Those of every form that may be chosen."""
        return (plan for form in self.forms() for plan in self.plans(form))

    def plans(self, form: str) -> Iterator[Plan]:
        """With fewer and fewer slots, and with random directions that are stored or not. (In the factorised form they
        would be drawn again in each step: a program that the compiler for TPUs had not finished after eight minutes.)
        """
        storage = self._options.direction_storage
        drawable = self._work.drawn and form != "factorised"
        storages = [storage] if storage != "auto" else ["exact", "seed"] if drawable else ["exact"]
        for held in storages:
            slots = self._options.slots or self._enough()
            while slots:
                yield self._plan(form, held, slots)
                slots = 0 if self._options.slots else slots // 2

    def seconds(self, plan: Plan) -> float:
        """An estimate for a direction set, in which every row goes to its limit."""
        work, copies = self._work, self._copies(plan.form)
        read, compute = self._step(plan)
        passes, _, lines = self.passes(plan)
        tokens = self._own / self._split.points + self._prefix
        prefill = work.num_points * tokens * copies * self._flops / self._split.model / self._speed.flops
        moved = (2 + work.ndim) * self._weights / self._speed.bandwidth
        if plan.form == "streamed":
            moved += self._weights / HOST_BANDWIDTH
        if plan.form == "factorised" and work.ndim == 1:
            moved = 0.0
        steps = passes * work.sampling.max_new_tokens
        drawn = work.drawn * NOISE * self._numbers / self._split.model / self._speed.flops
        drawn = drawn if plan.storage == "seed" else 0.0
        drawn *= lines + steps if plan.form == "factorised" else lines  # there, wherever a weight is used
        return steps * (read + compute) + prefill + lines * moved + drawn

    def passes(self, plan: Plan) -> tuple[int, int, int]:
        """For a direction set: how often the slots are filled and decoded to the limit, how many insertions that takes,
        and how often parameters are made."""
        work = self._work
        # In the factorised form, points that differ in the last coordinate alone decode together.
        lines = work.num_points // work.line if plan.form == "factorised" else work.num_points
        jobs = (work.line if plan.form == "factorised" else 1) * -(-len(work.rows) // plan.group)
        passes = lines * -(-jobs // (plan.places * plan.rows // plan.group))
        return passes, lines * -(-jobs // plan.inserts), lines

    @property
    def _weights(self) -> int:
        """Bytes of them on each device."""
        return self._held * self._itemsize

    def _copies(self, form: str) -> int:
        """How many tensors each use of a weight reads and multiplies."""
        return 2 if form == "factorised" else 1

    def _step(self, plan: Plan) -> tuple[float, float]:
        """Seconds that a decode step takes to read the weights, and to compute."""
        copies = self._copies(plan.form)
        compute = plan.places * plan.rows * copies * self._flops / self._split.size / self._speed.flops
        return copies * self._weights / self._speed.bandwidth, compute

    def _enough(self) -> int:
        balance = (self._weights / self._speed.bandwidth) / (self._flops / self._split.size / self._speed.flops)
        return max(1, round(ENOUGH * balance))

    def _shared(self, count: int, rows: int = 1) -> int:
        """So many places of `rows` rows, or more: as many on each of the devices that share them, and whole tiles."""
        multiple = self._split.points * (1 if self._machine.is_host else max(1, TILE // rows))
        return -(-count // multiple) * multiple

    def _plan(self, form: str, storage: str, slots: int) -> Plan:
        work, prompts = self._work, len(self._work.rows)
        places, inserts = 1, 1
        if form == "factorised":
            rows = group = min(PLACE_ROWS, prompts, slots)
            places = self._shared(max(1, min(slots // rows, work.line * -(-prompts // group))), rows)
            inserts = min(max(1, places // 4), MOST_INSERTS * self._split.points)
            few = self._shared(places // 4, rows) * rows
        elif prompts <= slots:
            rows = group = self._shared(prompts)
            few = self._shared(rows // 4)
        else:
            group = self._shared(max(1, slots // 4))
            rows = max(1, slots // group) * group
            few = self._shared(rows // 4)
        few = few if few < places * rows else 0
        batch = places * rows // self._split.points
        cache = (batch + few // self._split.points) * (self._longest + work.sampling.max_new_tokens) * self._slot
        # The prefix of a single place is on every device.
        shared = -(-(places + few // rows) // self._split.points) if form == "factorised" else 2
        cache += shared * self._prefix * self._slot
        each = {"exact": work.drawn * self._itemsize, "seed": 0, "bfloat16": 2 * work.ndim, "int8": work.ndim}[storage]
        copies = {"materialised": min(work.ndim, 1) + 1, "streamed": 1, "factorised": min(work.ndim, 2)}[form]
        if form == "streamed" and not self._on_host:
            copies = 2
        alone = 4 * self._largest if form == "streamed" or storage == "seed" else 0
        space = self._space(inserts, group, batch)
        plan = Plan(
            form=form,
            places=places,
            rows=rows,
            group=group,
            inserts=inserts,
            chunk=self._options.chunk or 8,
            ahead=0 if self._machine.is_host else 1,
            few=few,
            storage=storage,
            cache=cache,
            memory=round(copies * self._weights + each * self._held + alone + cache + space),
            reason="",
        )
        read, compute = (1e3 * seconds for seconds in self._step(plan))
        return replace(plan, reason=f"a step reads weights for {read:.1f} ms and computes for {compute:.1f} ms")

    def _space(self, inserts: int, group: int, batch: int) -> int:
        """Bytes that the largest layer of a prefill, its keys and values, and the logits take besides."""
        c, (points, model) = self._config, self._split
        tokens = inserts * max(-(-group * self._longest // points), self._prefix)
        heads = c.num_heads * (self._prefix + self._longest)
        layer = tokens * (6 * c.hidden_size + (3 * c.intermediate_size + 2 * heads) / model) * 4
        kept = self._slot * (tokens + 3 * inserts * self._prefix)
        return round(layer + kept + 3 * 4 * c.vocab_size / model * max(batch, inserts * group))
