"""What a run would take on TPUs that are not here: its programs, compiled by the TPU compiler from shapes alone."""

import importlib.util
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich import box
from rich.console import Console
from rich.table import Table

from jaxscape import hlo
from jaxscape.decode import (
    Fill,
    Groups,
    Sampling,
    SlotSizes,
    Weights,
    common_prefix,
    decode_chunk,
    insert,
    make_program,
    most_new_points,
    pack,
    ring_size,
    slot_shapes,
)
from jaxscape.device import Roofline, not_kept
from jaxscape.errors import UserError
from jaxscape.models import kernels
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.config import ModelConfig
from jaxscape.models.shapes import ModelShape, model_shape
from jaxscape.perturb import Scaled, Seeded, materialise
from jaxscape.plan import TILE, EngineOptions, Machine, Plan, Planner, Work, make_plan, smallest_plan
from jaxscape.sharding import Split, default_split, make_mesh, replicated, sharding, split_of
from jaxscape.training import Batch, Settings, State, bucket, check_batch, optimizer, state_shardings, train_step

UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}  # bytes, as the compiler writes them
RETRIES = 4  # with fewer rows, where the first do not fit
LATENCY = 2e-6  # seconds that a collective operation takes besides its bytes
# The compiler's library would look for the TPU that it is on, and keep other processes away from it.
COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# The compiler cannot read its own text of gathers on SparseCores back, which v5p chips would do (libtpu 0.0.52).
READABLE = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_offload_all_supported_gathers_to_sparsecore": "false",
}


@dataclass(frozen=True)
class Chip:
    """A TPU chip, by its maker's documentation.

    Attributes:
        flops: of bfloat16 products, per second.
        memory: bytes that programs can use.
        bandwidth: bytes per second from and to its memory.
        links: bytes per second that it sends to its two neighbours in a ring.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float


CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1228e9, 90e9),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 90e9),
    "v5p": Chip(459e12, 94.75 * 2**30, 2765e9, 180e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 180e9),
}


@dataclass(frozen=True)
class Program:
    """A compiled program, on each chip.

    Attributes:
        arguments, temporaries: bytes; what a program returns in the place of an argument is not counted twice.
        flops: floating-point operations of one pass.
        memory_bytes: read from and written to memory in one pass.
        sent_bytes, collectives: to other chips, and in how many operations.
        compiler_seconds: the compiler's own estimate; None where it is unusable (negative).
        seconds: by the roofline: the longer of computing and moving bytes, and then the bytes between chips.
        used: bytes of memory while it runs, with what stands beside it; None if the compiler refused it.
        missing: bytes by which it does not fit; None if it does.
    """

    arguments: int = 0
    temporaries: int = 0
    flops: float = 0.0
    memory_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: int = 0
    compiler_seconds: float | None = None
    seconds: float = math.inf
    used: float | None = None
    missing: float | None = None


class _Counts(NamedTuple):
    """Of a compiled program: see `Program`; `results` are bytes that it returns in new places, `kept` those that a loop
    holds on the chip, and `missing` what the compiler says when it gives up."""

    arguments: float = 0.0
    results: float = 0.0
    temporaries: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: float = 0.0
    kept: float = 0.0
    compiler_seconds: float = 0.0
    missing: float | None = None


@dataclass(frozen=True)
class Forecast:
    """A run in one form.

    Attributes:
        programs: by name: insert (prefill), decode (a step), materialise.
        fits: all of them do.
        most_rows: that can decode together, if each takes what one takes now; 0 if nobody knows.
        decode_limit: seconds that a step takes to read the weights, each form's tensors once, and the cache, or to
            compute, whichever is longer.
        decode_share: that, as a part of the step's `seconds`.
        point_seconds, landscape_seconds: of the whole run, if every row goes to its limit.
        point_limit: a point's, if there were only decode steps, each at `decode_limit`.
        slots: what a scan must be told to run so, where its planner would take more than fit.
    """

    form: str
    mesh: str
    plan: Plan
    programs: dict[str, Program]
    fits: bool
    most_rows: int
    decode_limit: float
    decode_share: float
    point_seconds: float
    landscape_seconds: float
    point_limit: float
    slots: int | None = None

    @property
    def missing(self) -> float:
        """Bytes of each chip's memory that the largest program lacks; 0 if all fit."""
        return max(program.missing or 0.0 for program in self.programs.values())


@dataclass(frozen=True)
class Slice:
    """Abstract chips.

    Attributes:
        name: such as v5e:2x4.
        known: what was counted in programs that were compiled for it, by their text before that.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    known: dict[tuple[str, str], _Counts] = field(default_factory=dict, repr=False, compare=False)


@cache
def open_slice(name: str) -> Slice:
    """Ask the TPU compiler for a slice, by a name such as v5e:2x4 (v5p:2x2x1).

    Raises:
        UserError: there is no such slice, or the compiler is not installed.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise UserError(
            f"The topology {name!r} is none: give a kind ({', '.join(CHIPS)}) and its shape, as in v5e:2x4."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Planning needs the TPU compiler: run pip install libtpu, which works on any Linux machine.")
    for variable, value in COMPILER_ALONE.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # whatever the compiler's plugin raises
        raise UserError(f"The TPU compiler has no topology {name!r} ({' '.join(str(error).split())[:200]}).") from error
    return Slice(name, CHIPS[kind], tuple(found.devices))


def make_work(
    num_prompts: int,
    prompt_tokens: int,
    shared_tokens: int,
    max_new_tokens: int,
    grid: tuple[int, ...],
) -> Work:
    """The work of one direction set, with prompts of so many tokens, of which all begin with the same ones.

    Arguments:
        grid: points along each axis.
    """
    if min(num_prompts, max_new_tokens, shared_tokens + 1, *grid) < 1 or prompt_tokens <= shared_tokens:
        raise UserError("There must be prompts, points and new tokens, and more tokens in a prompt than all share.")
    own = prompt_tokens - shared_tokens
    rows = [[1] * shared_tokens + [2 + i % 2] * own for i in range(num_prompts)]
    ndim = len(grid)
    return Work(rows, Sampling(max_new_tokens), math.prod(grid), grid[-1], ndim, drawn=ndim)


def forecast(
    config: ModelConfig,
    work: Work,
    where: Slice,
    *,
    num_sets: int = 1,
    split: Split | None = None,
    dtype: str = "bfloat16",
    options: EngineOptions = EngineOptions(),  # noqa: B008 (immutable)
    quick: bool = False,
) -> list[Forecast]:
    """A run's forecasts, one for each form, the fastest that fits first.

    Arguments:
        quick: compile only one layer and two, and take every further one for another of what the second adds.

    Raises:
        UserError: the options are out of range, or the form is `streamed`, whose time the host decides.
    """
    if options.form == "streamed":
        raise UserError("A plan cannot tell how fast a host sends weights: choose another --form than streamed.")
    shape = shape_on(config, where, split, dtype)
    weights = _held(shape.params)
    chip = _chip(where, dtype)
    machine = Machine(Roofline(chip.flops, chip.bandwidth), round(chip.memory) - weights, is_host=False)
    options.check()
    forms = [options.form]
    if options.form == "auto":
        # Drawn from seeds in each step, directions are more than the compiler is done with in minutes.
        forms = ["materialised", "factorised"] if options.direction_storage != "seed" else ["materialised"]
    tiles = TILE * split_of(shape.mesh).points
    found = []
    for form in forms:
        each = first = _forecast(shape, work, where, machine, replace(options, form=form), num_sets, quick)
        for _ in range(RETRIES if options.slots is None else 0):  # the compiler may need more than the planner took
            rows = each.plan.places * each.plan.rows
            fewer = min(each.most_rows or rows // 2, rows - tiles) // tiles * tiles
            if each.fits or fewer < tiles:
                break
            given = replace(options, form=form, slots=fewer)
            each = replace(_forecast(shape, work, where, machine, given, num_sets, quick), slots=fewer)
        found.append(each if each.fits else first)
    return sorted(found, key=lambda each: (not each.fits, each.landscape_seconds))


def _chip(where: Slice, dtype: str) -> Chip:
    """What a chip is in programs of this dtype: a float32 product is six of bfloat16."""
    return where.chip if dtype == "bfloat16" else replace(where.chip, flops=where.chip.flops / 6)


def shape_on(config: ModelConfig, where: Slice, split: Split | None, dtype: str) -> ModelShape:
    """The model's shapes on a slice, split as weights of their size are by default."""
    if split is None:
        weights = _held(model_shape(config, make_mesh(Split(), 1, where.devices), dtype).params)
        split = default_split(weights, round(where.chip.memory), len(where.devices))
    return model_shape(config, make_mesh(split, config.num_kv_heads, where.devices), dtype)


def _forecast(
    shape: ModelShape, work: Work, where: Slice, machine: Machine, options: EngineOptions, num_sets: int, quick: bool
) -> Forecast:
    try:
        plan = make_plan(shape, work, options, machine)
    except UserError:  # compiled as it is, to say by how much
        plan = smallest_plan(shape, work, options, machine)
    chip, rings = _chip(where, shape.dtype), _cache_size(shape, work, plan)
    read = [shape.params] if plan.form != "factorised" else [shape.params, _direction(shape, plan.storage)]
    least = rings + sum(map(_held, read))
    if not shape.config.tie_word_embeddings:  # it is looked up, not multiplied with
        least -= sum(_held(named_leaves(tree)["model.embed_tokens.weight"]) for tree in read)
    counts = _counted(shape, lambda shape: _lowered(shape, work, plan), where, quick)
    if quick:  # two layers may stay on the chip in part, or be copied more than many
        moved = max(counts["decode"].memory_bytes, least - counts["decode"].kept)
        counts["decode"] = counts["decode"]._replace(memory_bytes=moved)
    programs = {name: _program(count, chip, _beside(shape, work, plan, name, rings)) for name, count in counts.items()}
    decode = programs["decode"]
    passes, inserts, lines = Planner(shape, work, options, machine).passes(plan)
    limit = max(least / chip.bandwidth, decode.flops / chip.flops)
    steps = passes * work.sampling.max_new_tokens
    seconds = steps * decode.seconds + inserts * programs["insert"].seconds
    if "materialise" in programs:
        seconds += lines * programs["materialise"].seconds
    fits = all(program.missing is None for program in programs.values())
    return Forecast(
        form=plan.form,
        mesh=str(split_of(shape.mesh)),
        plan=plan,
        programs=programs,
        fits=fits,
        most_rows=_most_rows(plan, programs, chip, rings),
        decode_limit=limit,
        decode_share=limit / decode.seconds,
        point_seconds=seconds / work.num_points,
        landscape_seconds=seconds * num_sets,
        point_limit=steps * limit / work.num_points,
    )


def _held(tree: Any) -> int:
    """Bytes on each chip."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _slots(shape: ModelShape, work: Work, plan: Plan) -> tuple[Any, Groups]:
    prefix = common_prefix(work.rows)
    groups = pack(work.rows, prefix, plan.group, plan.inserts, split_of(shape.mesh).points)
    ring = ring_size(groups, work.sampling.max_new_tokens)
    ndim = 1 if plan.form == "factorised" else 0
    sizes = SlotSizes(plan.places, plan.places * plan.rows, ring, prefix, ndim)
    return slot_shapes(make_program(shape, work.rows, work.sampling), shape.dtype, sizes), groups


def _cache_size(shape: ModelShape, work: Work, plan: Plan) -> int:
    """Bytes of the cache on each chip."""
    slots, _ = _slots(shape, work, plan)
    return _held((slots.cache, slots.prefix))


def _beside(shape: ModelShape, work: Work, plan: Plan, program: str, rings: int) -> int:
    """Bytes that stand on each chip beside what a program is given: caches, directions, and of a point the model.

    Arguments:
        rings: bytes of the cache on each chip.
    """
    weights, direction = _held(shape.params), _held(_direction(shape, plan.storage))
    # Where the last rows move to, when nothing is left to be inserted.
    few = rings * plan.few // (plan.places * plan.rows) if program == "decode" else 0
    if program == "materialise":
        return rings + (direction if plan.form == "factorised" else 0)
    if plan.form == "factorised":  # it is given the last direction, and the others are in the weights
        return few + (weights + (work.ndim - 1) * direction if work.ndim > 1 else 0)
    return few + (weights + work.ndim * direction if work.ndim else 0)


def _direction(shape: ModelShape, storage: str) -> Any:
    """The shapes of a random direction's tensors, as `jaxscape.perturb.random_direction` holds them."""
    everywhere = replicated(shape.mesh)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    seed = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    key = jax.ShapeDtypeStruct(seed.shape, seed.dtype, sharding=everywhere)

    def held(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        if storage == "exact" or "norm" in name:
            return leaf
        where: Any = leaf.sharding
        if storage == "seed":
            return Seeded(key, number, None, None, leaf.shape, str(leaf.dtype), where)
        return Scaled(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(storage), sharding=where), number)

    return tree_of({name: held(name, leaf) for name, leaf in named_leaves(shape.params).items()})


Lowered = dict[str, tuple[Callable[[], Any], Callable[[str], hlo.Traffic]]]
"""By name, a function that lowers a program, and one that counts what its text moves."""


def _lowered(shape: ModelShape, work: Work, plan: Plan) -> Lowered:
    """The run's programs, each yet to be lowered."""
    slots, groups = _slots(shape, work, plan)
    program = make_program(shape, work.rows, work.sampling)
    everywhere = replicated(shape.mesh)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

    ndim = 1 if plan.form == "factorised" else 0
    direction = _direction(shape, plan.storage)
    weights = Weights(shape.params, (direction,) * ndim)
    stream = placed(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))
    count = plan.inserts
    numbers = np.zeros(count, np.int32)
    most = most_new_points(count, len(groups.tokens))
    fill = Fill(
        group=numbers,
        coords=np.zeros((count, ndim), np.float32),
        new=np.zeros((most, ndim), np.float32),
        source=numbers,
        of_row=np.zeros(plan.places * plan.rows, np.int32),
        of_place=np.zeros(plan.places, np.int32),
    )
    prefix = placed(np.zeros(common_prefix(work.rows), np.int32))
    alive, steps = placed(np.zeros(plan.places * plan.rows, bool)), placed(np.int32(0))
    found: Lowered = {
        "insert": (
            lambda: insert.lower(weights, slots, prefix, placed(groups), placed(fill), stream, program=program),
            hlo.program_traffic,
        ),
        "decode": (
            lambda: decode_chunk.lower(weights, slots, alive, stream, steps, program=program),
            hlo.loop_traffic,
        ),
    }
    moved = work.ndim - ndim
    if moved:
        directions = (direction,) * moved
        where = placed(np.zeros(moved, np.float32))
        found["materialise"] = (
            lambda: materialise.lower(shape.params, directions, where, shape.params),
            hlo.program_traffic,
        )
    return found


def finetune_step(
    config: ModelConfig,
    where: Slice,
    *,
    batch_size: int,
    length: int,
    remat: bool,
    split: Split | None = None,
    dtype: str = "bfloat16",
    quick: bool = False,
) -> Program:
    """A step of full finetuning: float32 weights and moments, computing in `dtype`; `quick` as in `forecast`.

    Arguments:
        length: tokens of a chat, which are padded as `jaxscape.training.bucket` says.

    Raises:
        UserError: there is no such batch, or the mesh does not divide it.
    """
    if min(batch_size, length) < 1:
        raise UserError(f"A batch of {batch_size} chats of {length} tokens is none.")
    shape, length = shape_on(config, where, split, dtype), bucket(length)
    check_batch(batch_size, shape.mesh)
    counts = _counted(shape, lambda shape: _lowered_step(shape, batch_size, length, remat), where, quick)["step"]
    devices = split_of(shape.mesh).size
    if kernels.helps(config, dtype, batch_size, length, devices):
        flops = kernels.attention_flops(config, batch_size, length, passes=2 if remat else 1)
        counts = counts._replace(flops=counts.flops + flops / devices)
    return _program(counts, _chip(where, dtype), _held(shape.params))  # the model that it started from


def _lowered_step(shape: ModelShape, batch_size: int, length: int, remat: bool) -> Lowered:
    config = shape.config.for_length(length)
    settings = Settings(shape.mesh, shape.dtype, None, 0.0, 1.0, remat, kernel=True)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shape.params)
    state: Any = jax.eval_shape(lambda weights: State(weights, optimizer(settings).init(weights)), trainable)
    there = state_shardings(state, config, settings)
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, there)
    everywhere = replicated(shape.mesh)
    rows = (1, batch_size, length)
    batch = Batch(np.zeros(rows, np.int32), np.zeros(rows[:2], np.int32), np.zeros(rows, np.float32))
    axes = (None, "rows", None)
    batch, rate = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding(shape.mesh, axes[: x.ndim], x.shape) if x.ndim else everywhere
        ),
        (batch, np.float32(0)),
    )
    return {
        "step": (
            lambda: train_step.lower(state, {}, batch, rate, config=config, settings=settings),
            hlo.program_traffic,
        )
    }


def _counted(
    shape: ModelShape, programs: Callable[[ModelShape], Lowered], where: Slice, quick: bool
) -> dict[str, _Counts]:
    """The counts of each program, compiled; with `quick`, extrapolated from one layer and two."""
    layers = shape.config.num_layers
    if not quick or layers < 3:
        return {name: _once(where, *each) for name, each in programs(shape).items()}
    one, two = (
        _counted(model_shape(replace(shape.config, num_layers=n), shape.mesh, shape.dtype), programs, where, False)
        for n in (1, 2)
    )
    return {name: _extrapolated(one[name], two[name], layers) for name in one}


def _extrapolated(one: _Counts, two: _Counts, layers: int) -> _Counts:
    failed = next((counts for counts in (one, two) if counts.missing is not None), None)
    if failed is not None:
        return failed
    unusable = min(one.compiler_seconds, two.compiler_seconds) <= 0
    # One layer's cache may stay on the chip; of all layers no more can than of two.
    kept = two.kept
    one, two = (each._replace(memory_bytes=each.memory_bytes + each.kept) for each in (one, two))
    found = _Counts(*(max(b, a + (layers - 1) * (b - a)) for a, b in zip(one[:-1], two[:-1], strict=True)))
    found = found._replace(memory_bytes=found.memory_bytes - kept, kept=kept)
    return found._replace(compiler_seconds=0.0) if unusable else found


def _once(where: Slice, lower: Callable[[], Any], traffic: Callable[[str], hlo.Traffic]) -> _Counts:
    lowered = lower()
    key = (traffic.__name__, lowered.as_text())
    if key not in where.known:
        where.known[key] = _compiled(lowered, traffic)
    return where.known[key]


def _compiled(lowered: Any, traffic: Callable[[str], hlo.Traffic]) -> _Counts:
    try:
        with not_kept():
            compiled = lowered.compile(compiler_options=READABLE)
    except jax.errors.JaxRuntimeError as error:
        # It says how much it would take, and then how much there is.
        sizes = [float(size) * UNITS[unit] for size, unit in re.findall(r"\b([\d.]+)([MGT])\b", str(error))[:2]]
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower() or len(sizes) < 2:
            raise
        return _Counts(missing=sizes[0] - sizes[1])
    memory, cost, moved = compiled.memory_analysis(), compiled.cost_analysis(), traffic(compiled.as_text())
    return _Counts(
        arguments=memory.argument_size_in_bytes,
        results=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        temporaries=memory.temp_size_in_bytes,
        flops=cost["flops"],
        memory_bytes=moved.memory,
        sent_bytes=moved.between,
        collectives=moved.collectives,
        kept=moved.kept,
        compiler_seconds=cost.get("optimal_seconds", 0.0),
    )


def _program(counts: _Counts, chip: Chip, beside: int) -> Program:
    """A program on a chip; `beside` are bytes that stay in memory while it runs."""
    if counts.missing is not None:
        return Program(missing=beside + counts.missing)
    used = counts.arguments + counts.temporaries + counts.results + beside
    seconds = max(counts.flops / chip.flops, counts.memory_bytes / chip.bandwidth)
    return Program(
        arguments=round(counts.arguments),
        temporaries=round(counts.temporaries),
        flops=counts.flops,
        memory_bytes=counts.memory_bytes,
        sent_bytes=counts.sent_bytes,
        collectives=round(counts.collectives),
        compiler_seconds=counts.compiler_seconds if counts.compiler_seconds > 0 else None,
        seconds=seconds + counts.sent_bytes / chip.links + counts.collectives * LATENCY,
        used=float(used),
        missing=used - chip.memory if used > chip.memory else None,
    )


def _most_rows(plan: Plan, programs: dict[str, Program], chip: Chip, rings: int) -> int:
    """The rows that would fill what the programs leave free, each taking what one takes now."""
    used = [program.used for program in programs.values() if program.used is not None]
    if len(used) < len(programs):
        return 0
    batch = plan.places * plan.rows
    rings += rings * plan.few // batch
    each = (rings + max(programs[name].temporaries for name in ("insert", "decode"))) / batch
    return max(0, int(batch + (chip.memory - max(used)) / each))


def as_json(found: Sequence[Forecast | Program]) -> list[dict[str, Any]]:
    """For programs; what is not finite is None."""
    return [_finite(asdict(each)) for each in found]


def describe(found: Sequence[Forecast], step: Program | None, title: str) -> str:
    """For people: a table of the programs of each form, and what it comes to, the better form first.

    Arguments:
        step: a finetuning's, if there is one.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    heads = ("form", "program", "arguments GB", "temporaries GB", "TFLOP", "moved GB", "sent MB", "ms", "compiler ms")
    for head in heads:
        table.add_column(head, justify="left" if head in ("form", "program") else "right")
    lines = []
    for number, each in enumerate(found):
        best = " *" if number == 0 and each.fits else ""
        for name, program in each.programs.items():
            table.add_row(each.form + best, name, *_cells(program))
        lines.append(_verdict(each))
    if step is not None:
        table.add_row("finetune --remat", "step", *_cells(step))
        if step.missing is not None:
            lines.append(f"finetune: does not fit, {_by(step)}")
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    note = (
        "GB and ms are a chip's, and of one pass: decode is a step of all rows.\nms is the roofline of what the "
        "compiled program computes, moves and sends."
    )
    if any(p.compiler_seconds is None and p.missing is None for each in found for p in each.programs.values()):
        note += "\nThe compiler's own estimate is left out where it is negative."
    return f"{text.getvalue().rstrip()}\n\n" + "\n".join([*lines, note])


def _cells(program: Program) -> list[str]:
    if program.missing is not None and not program.arguments:
        return ["does not fit", *[""] * 6]
    return [
        f"{program.arguments / 1e9:.2f}",
        f"{program.temporaries / 1e9:.2f}",
        f"{program.flops / 1e12:.2f}",
        f"{program.memory_bytes / 1e9:.2f}",
        f"{program.sent_bytes / 1e6:.1f}",
        f"{1e3 * program.seconds:.2f}",
        "unusable" if program.compiler_seconds is None else f"{1e3 * program.compiler_seconds:.2f}",
    ]


def _verdict(found: Forecast) -> str:
    plan = found.plan
    if not found.fits:
        largest = max(found.programs.values(), key=lambda program: program.missing or 0.0)
        return (
            f"{found.form}: does not fit, {_by(largest)}; a scan may still run with --form streamed, at the speed of "
            f"its host"
        )
    rows = f"{plan.places * plan.rows} rows" if plan.places == 1 else f"{plan.places} points x {plan.rows} rows"
    given = "" if found.slots is None else f" with --slots {found.slots}"
    return (
        f"{found.form}: {rows} at a time{given} (at most {found.most_rows}), {found.point_seconds:.2f} s a point, "
        f"{found.landscape_seconds:.0f} s in all; decoding is at {100 * found.decode_share:.0f} % of its roofline"
    )


def _by(program: Program) -> str:
    """By how much a program does not fit; at least, of one that the compiler refused, perhaps with few layers."""
    least = "" if program.arguments else "at least "
    return f"by {least}{(program.missing or 0.0) / 1e9:.2f} GB a chip"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
