"""The planner: which form, batch layout and storage decode a workload fastest within the devices' memory."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxscape.engine.batching import Workload
from jaxscape.engine.forms import Form
from jaxscape.engine.layout import BatchLayout
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.platforms import PLATFORMS, fuses_projections
from jaxscape.models.checkpoint import named_leaves, parameter_shardings
from jaxscape.models.fusion import is_part
from jaxscape.models.model import Model
from jaxscape.models.shape import ModelShape
from jaxscape.models.weights import is_norm
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import Roofline, free_memory, roofline
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.sharding import mesh_shape_of

# Number of a point's rows when points share a batch: few, so that a finished point soon makes room for the next one,
# but more than one, because rows share their point's cached prefix.
ROWS_PER_POINT = 4
MAX_MEMORY_FRACTION = 0.9  # of the free memory, that a plan may use
MAX_BATCH_OVER_BALANCE = 8  # beyond 8 times the compute/bandwidth balance point, larger batches stop helping
HOST_BANDWIDTH = 1e10  # bytes per second from host memory to a device over PCIe
# Drawing a number takes as long as this many FLOPs in a large product: on the host, and on an accelerator.
FLOPS_PER_HOST_RANDOM_NUMBER, FLOPS_PER_RANDOM_NUMBER = 1000, 4500
# The share of a run's estimated time for which a direction is drawn from its seed to save memory of the host. Decoding
# on a CPU takes several times as long as the roofline says, and drawing does not.
MAX_DRAWING_SHARE = 0.15
MAX_GROUPS_PER_INSERT = 16  # for each device along the mesh axis `points`
TILE = 8  # rows of an accelerator's memory tile; XLA copies caches that are not sharded by whole tiles
DEFAULT_CHUNK = 8
# From this number of rows on, each row makes a CPU's decode step longer, so the last rows of a point move to smaller
# and smaller batches. Otherwise a step mostly reads weights, and a program for each batch is not worth compiling.
SHRINKING_BATCH = 32

_STORED = {"seed": "drawn from their seeds", "bfloat16": "in bfloat16", "int8": "in int8"}


@dataclass(frozen=True)
class Plan:
    """How a workload is decoded.

    Attributes:
        chunk: maximum number of decode steps before the host checks for finished rows.
        chunks_in_flight: number of further chunks that the device is given before the host reads a chunk's tokens.
        storage: how directions are stored, see `jaxscape.directions.random.random_direction`.
        is_fused: whether the weights are decoded with fused projections, see `jaxscape.models.fusion`.
        cache_bytes: bytes of the key-value caches on each device.
        memory_bytes: estimated bytes of weights, directions, caches and work space on each device.
        reason: the estimated times of a decode step, as a text for the user.
    """

    form: Form
    layout: BatchLayout
    chunk: int
    chunks_in_flight: int
    storage: str
    is_fused: bool
    cache_bytes: int
    memory_bytes: int
    reason: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """The inverse of `dataclasses.asdict`."""
        slots = tuple(values["layout"]["compact_slots"])  # JSON has made a list of it
        layout = BatchLayout(**values["layout"] | {"compact_slots": slots})
        return cls(**values | {"form": Form(values["form"]), "layout": layout})

    def __str__(self) -> str:
        layout = self.layout
        batch = f"{self.form}: {layout.batch} slots"
        if self.form.batches_points and layout.points_in_flight > 1:
            points = f"{layout.points_in_flight} points"
            points += f" of {layout.num_sets} direction sets" if layout.num_sets > 1 else ""
            batch = f"{self.form}: {points} at a time, {layout.rows_per_point} slots each"
        stored = "" if self.storage == "exact" else f", directions {_STORED[self.storage]}"
        size = f"{self.memory_bytes / 1e9:.2f} GB, of which the cache is {self.cache_bytes / 1e9:.2f}"
        return f"{batch}{stored}; {size} ({self.reason})"


@dataclass(frozen=True)
class Hardware:
    """The devices that a plan is for.

    Attributes:
        speed: the roofline of each device.
        free_bytes: bytes that each device can still allocate; None if that is unknown, so that every plan counts as
            fitting.
        is_host: whether the devices are the host's own cores. The host then reads the tokens of each chunk before the
            next one runs, and rows are not rounded up to tiles.
    """

    speed: Roofline
    free_bytes: int | None
    is_host: bool


def this_hardware(dtype: str, keep: bool = True) -> Hardware:
    """The devices of this process, with the speed that decoding in this dtype reaches on them."""
    measured, platform = roofline(dtype, keep), jax.default_backend()
    speed = PLATFORMS[platform].reached(measured)
    return Hardware(speed, free_memory(), is_host=platform == "cpu")


def make_plan(
    model: Model | ModelShape,
    workload: Workload,
    options: EngineOptions | None = None,
    hardware: Hardware | None = None,
) -> Plan:
    """The plan with the shortest estimated time among those that fit into the devices' memory.

    Arguments:
        model: only its configuration and the shapes, dtypes and shardings of its parameters are used.
        hardware: by default that of this machine; with several processes, the first one's plan is used by all.

    Raises:
        UserError: no plan that the options allow fits, or the options contradict one another.
    """
    options = options or EngineOptions()
    options.check()
    if hardware is not None:
        return _fastest(Planner(model, workload, options, hardware))
    decide = lambda: asdict(_fastest(Planner(model, workload, options, this_hardware(model.dtype))))  # noqa: E731
    return Plan.from_dict(from_first(decide))


def bytes_of_weights(model: Model) -> int:
    """Bytes of the model's parameters on each device; 0 if they are in host memory."""
    leaves, shardings = named_leaves(model.params), named_leaves(model.shardings)
    if isinstance(next(iter(leaves.values())), np.ndarray):
        return 0
    return sum(
        math.prod(shardings[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize for name, leaf in leaves.items()
    )


def smallest_plan(model: Model | ModelShape, workload: Workload, options: EngineOptions, hardware: Hardware) -> Plan:
    """The plan that takes the least memory, whether it fits or not."""
    return _smallest(Planner(model, workload, options, hardware))


def _smallest(planner: "Planner") -> Plan:
    return min(planner.all_plans(), key=planner.bytes_to_allocate)


def _fastest(planner: "Planner") -> Plan:
    fitting = [plan for plan in planner.all_plans() if planner.fits(plan)]
    if not fitting:
        least = _smallest(planner)
        raise UserError(
            f"The device's memory does not hold this scan: the smallest plan (the {least.form} form with "
            f"{least.layout.batch} slots) takes {least.memory_bytes / 1e9:.1f} GB on each device. Choose a --dtype of "
            f"16 bits, fewer --slots, shorter prompts, a lower --max-new-tokens, or, on an accelerator, --form "
            f"streamed."
        )
    fastest = min(fitting, key=planner.seconds)
    return next((plan for plan in fitting if planner.saves_host_memory(plan, fastest)), fastest)


class RunCounts(NamedTuple):
    """How often a plan runs its programs for the direction sets that decode together, if every row decodes to its
    limit.

    Attributes:
        batches: number of times that the whole batch is filled and decoded to its end.
        insertions: number of calls of `decode.insert`.
        parameter_sets: number of times that parameters are computed from θ₀ and directions.
    """

    batches: int
    insertions: int
    parameter_sets: int


class Planner:
    """Estimates the time and memory of plans for one model, workload and hardware."""

    def __init__(
        self, model: Model | ModelShape, workload: Workload, options: EngineOptions, hardware: Hardware
    ) -> None:
        self._workload, self._options, self._hardware, self._speed = workload, options, hardware, hardware.speed
        self._mesh_shape = mesh_shape_of(model.mesh)
        leaves = named_leaves(model.params)
        sizes = {name: leaf.size for name, leaf in leaves.items()}
        config, self._config = model.config, model.config
        self._is_on_host = isinstance(next(iter(leaves.values())), np.ndarray)
        self._num_parameters, self._largest_tensor = sum(sizes.values()), max(sizes.values())
        shardings = named_leaves(parameter_shardings(config, model.mesh))
        self._parameters_per_device = sum(
            math.prod(shardings[name].shard_shape(leaf.shape)) for name, leaf in leaves.items()
        )
        self._itemsize = np.dtype(model.dtype).itemsize
        # An embedding table that is not also the output head is looked up, not multiplied with.
        looked_up = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        self._flops_per_token = 2 * (self._num_parameters - looked_up)
        widths = [sum(leaf.shape) for name, leaf in leaves.items() if leaf.ndim == 2 and not is_norm(name)]
        # The numbers in the factors of one direction, if all directions are of low rank; sharded as the weights are.
        self._factor_numbers = None if workload.rank is None else workload.rank * sum(widths)
        self._fuses_projections = fuses_projections(model.mesh, config)
        self._fused_numbers = sum(size for name, size in sizes.items() if is_part(name))
        kv_heads = config.num_kv_heads // model.mesh.shape["kv"]
        self._bytes_per_cache_slot = 2 * config.num_layers * kv_heads * config.head_dim * self._itemsize
        if workload.ndim == 0 and options.form == Form.FACTORISED:
            raise UserError("The factorised form needs a direction, and there is none: choose another form.")
        if options.direction_storage == "seed" and not workload.num_random:
            raise UserError("The direction storage 'seed' is for random directions only, and this scan has none.")

    @property
    def _weight_bytes(self) -> int:
        """Bytes of the weights on each device."""
        return self._parameters_per_device * self._itemsize

    def bytes_to_allocate(self, plan: Plan) -> int:
        """Bytes that each device must still allocate; weights that are already there do not count."""
        return plan.memory_bytes - (0 if self._is_on_host else self._weight_bytes)

    def fits(self, plan: Plan) -> bool:
        free = self._hardware.free_bytes
        return free is None or self.bytes_to_allocate(plan) <= MAX_MEMORY_FRACTION * free

    def forms(self) -> list[Form]:
        """The forms that the options allow.

        Raises:
            UserError: the weights are in host memory, and the form needs them on the device.
        """
        form = self._options.form
        if self._is_on_host and form not in ("auto", Form.STREAMED):
            raise UserError(f"The weights are in host memory, but --form {form} needs them on the device.")
        if form != "auto":
            return [Form(form)]
        if self._is_on_host:
            return [Form.STREAMED]
        return [Form.MATERIALISED, Form.FACTORISED] if self._workload.ndim else [Form.MATERIALISED]

    def all_plans(self) -> Iterator[Plan]:
        """The plans of every form that the options allow."""
        return (plan for form in self.forms() for plan in self.plans(form))

    def plans(self, form: Form) -> Iterator[Plan]:
        """Plans of one form with fewer and fewer rows, each with random directions stored and drawn from their seeds.

        When points share a batch, seeds are used only if the options ask for them: the directions would be drawn in
        each decode step, and the TPU compiler takes many minutes for such a program.
        """
        storage = self._options.direction_storage
        may_draw = self._workload.num_random and not form.batches_points
        storages = [storage] if storage != "auto" else ["exact", "seed"] if may_draw else ["exact"]
        for stored, is_fused, num_sets in itertools.product(storages, (True, False), self._numbers_of_sets(form)):
            if (is_fused and not self._can_fuse(form, stored)) or (num_sets > 1 and stored == "seed"):
                continue
            slots = self._options.slots or self._most_useful_slots()
            while slots:
                yield self._plan(form, stored, is_fused, slots, num_sets)
                slots = 0 if self._options.slots else slots // 2

    def _numbers_of_sets(self, form: Form) -> list[int]:
        """How many direction sets may decode together: several only if no direction is added to the weights."""
        total = self._workload.num_sets
        if not form.batches_points or self._num_factored(form) < self._workload.ndim:
            return [1]
        shares = [-(-total // 2**i) for i in range(total.bit_length() + 1)]
        return sorted({*shares, 1})

    def _num_factored(self, form: Form) -> int:
        """How many directions of a set are multiplied separately instead of being added to the weights."""
        if not form.batches_points:
            return 0
        return self._workload.ndim if self._workload.rank is not None else min(self._workload.ndim, 1)

    def _can_fuse(self, form: Form, storage: str) -> bool:
        """Whether decoding with fused projections is faster on these devices, and possible.

        Streamed weights arrive one by one, and directions that are not stored as arrays cannot be fused.
        """
        are_arrays = storage == "exact" or self._workload.rank is not None or not self._num_factored(form)
        return self._fuses_projections and not form.keeps_weights_on_host and are_arrays

    def seconds(self, plan: Plan) -> float:
        """Estimated seconds for all direction sets, if every row decodes to its limit."""
        workload, form, counts, num_sets = self._workload, plan.form, self.counts(plan), plan.layout.num_sets
        read, compute = self._step_seconds(plan)
        steps = counts.batches * workload.sampling.max_new_tokens
        tokens = sum(workload.own_lengths) / self._mesh_shape.points + workload.prefix_length
        flops = tokens * self._flops_of_token(plan.layout) / self._mesh_shape.model
        prefill = num_sets * workload.num_points * flops / self._speed.flops
        form_weights = (2 + workload.ndim) * self._weight_bytes / self._speed.bandwidth
        if form.keeps_weights_on_host:
            form_weights += self._weight_bytes / HOST_BANDWIDTH
        if workload.ndim and self._num_factored(form) == workload.ndim:
            form_weights = 0.0  # no direction is added to the weights
        draw = 0.0
        if plan.storage == "seed":
            numbers = workload.num_random * self._num_parameters / self._mesh_shape.model
            flops = FLOPS_PER_HOST_RANDOM_NUMBER if self._hardware.is_host else FLOPS_PER_RANDOM_NUMBER
            draw = flops * numbers / self._speed.flops
        draws = counts.parameter_sets + (steps if form.batches_points else 0)
        seconds = steps * (read + compute) + prefill + counts.parameter_sets * form_weights + draws * draw
        return -(-workload.num_sets // num_sets) * seconds

    def saves_host_memory(self, plan: Plan, fastest: Plan) -> bool:
        """Whether a plan is the fastest one but for a direction that is drawn from its seed, and hardly slower.

        The devices of a host share its memory with all else that runs there. Of directions that are orthogonal to
        others, XLA may round the last bits differently where they are drawn, so a set has one direction.
        """
        drawn = replace(fastest, storage="seed", memory_bytes=plan.memory_bytes)
        is_close = self.seconds(plan) <= (1 + MAX_DRAWING_SHARE) * self.seconds(fastest)
        return self._hardware.is_host and self._workload.ndim == 1 and plan == drawn and is_close

    def counts(self, plan: Plan) -> RunCounts:
        """How often the plan runs its programs."""
        layout = plan.layout
        together, lines = self._points_together(plan.form, layout.num_sets)
        groups = together * layout.num_groups
        batches = lines * -(-groups // (layout.batch // layout.rows_per_group))
        return RunCounts(batches, lines * -(-groups // layout.groups_per_insert), lines)

    def _points_together(self, form: Form, num_sets: int) -> tuple[int, int]:
        """How many points share a batch, and how many times that many points there are in the sets."""
        workload = self._workload
        if not form.batches_points:
            return 1, num_sets * workload.num_points
        if self._num_factored(form) == workload.ndim:  # points differ in nothing that is added to the weights
            return num_sets * workload.num_points, 1
        return workload.points_per_line, workload.num_points // workload.points_per_line

    def _flops_of_token(self, layout: BatchLayout) -> int:
        """FLOPs for a token: of the weights, and of the directions that are multiplied separately."""
        if self._factor_numbers is None:
            return (1 + layout.num_factored) * self._flops_per_token
        own = layout.num_factored // layout.num_sets
        return self._flops_per_token + 2 * own * self._factor_numbers

    def _bytes_read(self, layout: BatchLayout) -> int:
        """Bytes of weights and directions that each device reads in a decode step."""
        if self._factor_numbers is None:
            return (1 + layout.num_factored) * self._weight_bytes
        # Where sets share a batch, each point has factors of its own.
        copies = layout.num_factored
        if layout.num_sets > 1:
            copies = layout.points_in_flight // self._mesh_shape.points * layout.num_factored // layout.num_sets
        return self._weight_bytes + copies * self._factor_bytes

    @property
    def _factor_bytes(self) -> int:
        """Bytes of the factors of a low-rank direction on each device."""
        return (self._factor_numbers or 0) * self._itemsize // self._mesh_shape.model

    def _step_seconds(self, plan: Plan) -> tuple[float, float]:
        """Two estimates for a decode step, in seconds: the time to read the weights, and the time of the arithmetic."""
        flops = plan.layout.batch * self._flops_of_token(plan.layout) / self._mesh_shape.size
        return self._bytes_read(plan.layout) / self._speed.bandwidth, flops / self._speed.flops

    def _most_useful_slots(self) -> int:
        read = self._weight_bytes / self._speed.bandwidth
        compute = self._flops_per_token / self._mesh_shape.size / self._speed.flops
        return max(1, round(MAX_BATCH_OVER_BALANCE * read / compute))

    def _rounded(self, count: int, rows: int = 1) -> int:
        """`count`, rounded up so that this many blocks of `rows` rows are whole tiles on each device along `points`."""
        multiple = self._mesh_shape.points * (1 if self._hardware.is_host else max(1, TILE // rows))
        return -(-count // multiple) * multiple

    def _layout(self, form: Form, slots: int, num_sets: int) -> BatchLayout:
        """The batch layout with at most `slots` rows, before rounding up to whole tiles on each device."""
        workload, prompts = self._workload, self._workload.block or self._workload.num_prompts
        devices = self._mesh_shape.points
        if form.batches_points:
            rows = group = min(ROWS_PER_POINT, prompts, slots)
            blocks = self._points_together(form, num_sets)[0] * -(-prompts // group)
            points = self._rounded(max(1, min(slots // rows, blocks)), rows)
            inserts = devices * min(max(1, points // devices // 4), MAX_GROUPS_PER_INSERT)
            compact = [self._rounded(points // 4, rows) * rows]
        else:
            points = inserts = devices
            if prompts <= slots:
                rows = group = self._rounded(prompts) // devices
            else:
                group = self._rounded(max(1, slots // 4)) // devices
                rows = max(1, slots // (devices * group)) * group
            quarters = (3, 2, 1) if self._hardware.is_host and points * rows >= SHRINKING_BATCH else (1,)
            compact = [self._rounded(points * rows * count // 4) for count in quarters]
        in_group = group
        if not form.batches_points and devices > 1:  # the devices get equal numbers of prompts
            in_group = -(-min(devices * group, workload.num_prompts) // devices)
        return BatchLayout(
            points_in_flight=points,
            rows_per_point=rows,
            rows_per_group=group,
            prompts_per_group=in_group,
            groups_per_insert=inserts,
            compact_slots=tuple(dict.fromkeys(slots for slots in compact if 0 < slots < points * rows)),
            num_groups=-(-prompts // in_group),
            prefix_slots=workload.prefix_length,
            ring_slots=workload.ring_slots,
            num_factored=num_sets * self._num_factored(form),
            num_sets=num_sets,
            shards=devices,
        )

    def _plan(self, form: Form, storage: str, is_fused: bool, slots: int, num_sets: int) -> Plan:
        layout = self._layout(form, slots, num_sets)
        cache = self._cache_bytes(form, layout)
        plan = Plan(
            form=form,
            layout=layout,
            chunk=self._options.chunk or DEFAULT_CHUNK,
            chunks_in_flight=0 if self._hardware.is_host else 1,
            storage=storage,
            is_fused=is_fused,
            cache_bytes=cache,
            memory_bytes=round(
                self._direction_and_weight_bytes(form, storage, layout)
                + (self._fused_bytes(form, num_sets) if is_fused else 0)
                + cache
                + self._work_space(layout)
            ),
            reason="",
        )
        read, compute = (1e3 * seconds for seconds in self._step_seconds(plan))
        return replace(plan, reason=f"a step reads weights for {read:.1f} ms and computes for {compute:.1f} ms")

    def _cache_bytes(self, form: Form, layout: BatchLayout) -> int:
        """Bytes of the rings and prefixes on each device: those of the whole batch and of the first smaller one, which
        exist together while rows move. The whole batch is freed before rows move to a second one."""
        devices, fewer = self._mesh_shape.points, layout.first_compact_slots
        rows = layout.batch // devices + fewer // devices
        prefixes = 2  # each device has that of one point: one copy for the batch, one for the smaller batch
        if form.batches_points:
            prefixes = -(-(layout.points_in_flight + fewer // layout.rows_per_point) // devices)
        return (rows * layout.ring_slots + prefixes * layout.prefix_slots) * self._bytes_per_cache_slot

    def _direction_and_weight_bytes(self, form: Form, storage: str, layout: BatchLayout) -> int:
        """Bytes of the model's weights, of a point's weights and of the directions on each device."""
        ndim, num_sets = self._workload.ndim, layout.num_sets
        is_added = ndim > self._num_factored(form)
        copies = {
            Form.MATERIALISED: min(ndim, 1) + 1,
            Form.STREAMED: 1 if self._is_on_host else 2,
            Form.FACTORISED: 2 if is_added else 1,
        }[form]
        if self._factor_numbers is not None:
            directions = num_sets * ndim * self._factor_bytes
            if num_sets > 1:  # stacked, and gathered for the points in flight
                directions += (
                    directions + layout.points_in_flight // self._mesh_shape.points * ndim * self._factor_bytes
                )
            return copies * self._weight_bytes + round(directions)
        one_tensor = 4 * self._largest_tensor if form.keeps_weights_on_host or storage == "seed" else 0
        directions = num_sets * self._direction_bytes_per_number(form, storage) * self._parameters_per_device
        return copies * self._weight_bytes + directions + one_tensor

    def _direction_bytes_per_number(self, form: Form, storage: str) -> int:
        """Bytes for each parameter that the directions of a set take on the devices, if they are not of low rank."""
        workload = self._workload
        if storage in ("bfloat16", "int8"):
            return workload.ndim * (2 if storage == "bfloat16" else 1)
        sent_whole = 0 if form.keeps_weights_on_host else workload.num_waiting
        stored = min(sent_whole + workload.num_made, workload.ndim)  # not all sets need have the most of each kind
        random = 0 if storage == "seed" else min(workload.num_random, workload.ndim - stored)
        return 4 * stored + self._itemsize * random

    def _fused_bytes(self, form: Form, num_sets: int) -> int:
        """Bytes of the fused copies of weights and directions; a point's own weights are formed fused."""
        factored = self._num_factored(form)
        per_number = self._itemsize if factored == self._workload.ndim else 0
        if factored and self._factor_numbers is None:  # fused factors take little memory
            of_set = self._direction_bytes_per_number(form, "exact")
            per_number += num_sets * factored * max(of_set // self._workload.ndim, self._itemsize)
        return per_number * self._fused_numbers

    def _work_space(self, layout: BatchLayout) -> int:
        """Estimated bytes of temporary arrays on each device: a prefill's largest layer, its keys and values, and the
        logits."""
        c, (points, model) = self._config, self._mesh_shape
        inserts, prefix = layout.groups_per_insert // points, layout.prefix_slots  # on each device
        longest = layout.ring_slots - self._workload.sampling.max_new_tokens
        tokens = inserts * max(layout.rows_per_group * longest, prefix)
        attention = c.num_heads * (prefix + longest)
        layer = tokens * (6 * c.hidden_size + (3 * c.intermediate_size + 2 * attention) / model) * 4
        keys_and_values = self._bytes_per_cache_slot * (tokens + 3 * inserts * prefix)
        logits = 3 * 4 * c.vocab_size / model * max(layout.batch // points, inserts * layout.rows_per_group)
        return round(layer + keys_and_values + logits)
