"""Forecasts of a scan on a TPU slice that is not here: its programs are compiled from shapes by the TPU compiler."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxscape.directions.point import materialise
from jaxscape.directions.stacked import Stacked, StackedFactors
from jaxscape.directions.storage import Factored, Scaled, Seeded, factor_shardings
from jaxscape.engine.batching import Workload
from jaxscape.engine.decode import Insertion, Weights, decode_chunk, insert, slot_shapes, static_arguments
from jaxscape.engine.forms import Form
from jaxscape.engine.layout import pack
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import TILE, Hardware, Plan, Planner, make_plan, smallest_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.forecast import hlo
from jaxscape.forecast.chips import Chip, Slice, bytes_per_chip, chip_for_dtype, shape_on
from jaxscape.forecast.compile import ProgramCost, Programs, compile_all, program_cost
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.config import ModelConfig
from jaxscape.models.shape import ModelShape
from jaxscape.models.weights import is_norm
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import Roofline
from jaxscape.runtime.sharding import MeshShape, mesh_shape_of, replicated

RETRIES = 4  # attempts with fewer rows, when the compiler needs more memory than the planner estimated


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run with one form of the weights.

    Attributes:
        programs: the costs of `insert` (prefill), of `decode` (one step) and, if the run needs it, of `materialise`.
        fits: whether all programs fit into the memory of each chip.
        most_rows: estimated maximum number of rows that can decode together; 0 if that is unknown.
        decode_limit: seconds that a decode step takes at least: to read the weights and the cache once, or to compute,
            whichever is longer.
        decode_share: `decode_limit` divided by the step's forecast seconds.
        point_seconds, landscape_seconds: seconds for a point and for the whole run, if every row decodes to its limit.
        point_limit: seconds for a point that consists of decode steps only, each taking `decode_limit`.
        slots: the value of --slots that the run needs, where the planner would choose more rows than fit; else None.
    """

    form: str
    mesh: str
    plan: Plan
    programs: dict[str, ProgramCost]
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
        """Bytes that the largest program exceeds a chip's memory by; 0 if all programs fit."""
        return max(program.missing_bytes or 0.0 for program in self.programs.values())


def make_workload(
    num_prompts: int,
    prompt_tokens: int,
    shared_tokens: int,
    max_new_tokens: int,
    grid: tuple[int, ...],
    rank: int | None = None,
) -> Workload:
    """The workload of one random direction set, with made-up prompts of the given length.

    Arguments:
        rank: the rank of the directions; None for directions of full rank.
        num_prompts, prompt_tokens, shared_tokens: see `made_up_prompts`.
        grid: number of points along each axis.

    Raises:
        UserError: a number is out of range.
    """
    if min(num_prompts, max_new_tokens, *grid) < 1:
        raise UserError(
            f"The numbers of prompts ({num_prompts}), of new tokens ({max_new_tokens}) and of points "
            f"({', '.join(map(str, grid))}) must be at least 1."
        )
    if rank is not None and rank < 1:
        raise UserError(f"The rank of the directions must be at least 1, not {rank}.")
    prompts = made_up_prompts(num_prompts, prompt_tokens, shared_tokens)
    ndim = len(grid)
    num_random = ndim if rank is None else 0
    return Workload(prompts, Sampling(max_new_tokens), math.prod(grid), grid[-1], ndim, num_random, rank=rank)


def made_up_prompts(num_prompts: int, prompt_tokens: int, shared_tokens: int) -> list[list[int]]:
    """The token ids of prompts that stand for those of a scan.

    Arguments:
        prompt_tokens: number of tokens of each prompt.
        shared_tokens: number of tokens that all prompts begin with.

    Raises:
        UserError: the prompts share all of their tokens, or less than none.
    """
    if not 0 <= shared_tokens < prompt_tokens:
        raise UserError(
            f"A prompt of {prompt_tokens} tokens cannot share {shared_tokens} of them: --shared-tokens must be at "
            f"least 0 and less than --prompt-tokens."
        )
    own = prompt_tokens - shared_tokens
    return [[1] * shared_tokens + [2 + i % 2] * own for i in range(num_prompts)]


def forecast(
    config: ModelConfig,
    workload: Workload,
    tpu_slice: Slice,
    *,
    num_sets: int = 1,
    mesh_shape: MeshShape | None = None,
    dtype: str = "bfloat16",
    options: EngineOptions | None = None,
    quick: bool = False,
) -> list[Forecast]:
    """One forecast for each form that the options allow: first those that fit, the fastest first.

    Arguments:
        num_sets: number of direction sets.
        mesh_shape: by default the weights are sharded over the fewest chips that can hold three copies of them.
        quick: compile the programs for one layer and for two, and extrapolate linearly to all layers.

    Raises:
        UserError: an option is out of range, or the form is `streamed`, whose time depends on the host.
    """
    options = options or EngineOptions()
    if options.form == Form.STREAMED:
        raise UserError("--form streamed cannot be planned, because its time depends on the host: choose another form.")
    options.check()
    workload = replace(workload, num_sets=num_sets)
    shape = shape_on(config, tpu_slice, mesh_shape, dtype)
    chip = chip_for_dtype(tpu_slice, dtype)
    free = round(chip.memory) - bytes_per_chip(shape.params)
    hardware = Hardware(Roofline(chip.flops, chip.bandwidth), free, is_host=False)
    forms: list[Any] = [options.form]
    if options.form == "auto":
        # The factorised form draws directions from seeds in each step, which takes the TPU compiler too long.
        forms = [Form.MATERIALISED] + [Form.FACTORISED] * (options.direction_storage != "seed")
    tile = TILE * mesh_shape_of(shape.mesh).points
    forecasts = []
    for form in forms:
        first = found = _forecast(shape, workload, tpu_slice, hardware, replace(options, form=form), quick)
        for _ in range(RETRIES if options.slots is None else 0):
            rows = found.plan.layout.batch
            fewer = min(found.most_rows or rows // 2, rows - tile) // tile * tile
            if found.fits or fewer < tile:
                break
            limited = replace(options, form=form, slots=fewer)
            found = _forecast(shape, workload, tpu_slice, hardware, limited, quick)
            found = replace(found, slots=fewer)
        forecasts.append(found if found.fits else first)
    return sorted(forecasts, key=lambda found: (not found.fits, found.landscape_seconds))


def _forecast(
    shape: ModelShape,
    workload: Workload,
    tpu_slice: Slice,
    hardware: Hardware,
    options: EngineOptions,
    quick: bool,
) -> Forecast:
    try:
        plan = make_plan(shape, workload, options, hardware)
    except UserError:  # no plan fits: the smallest one is compiled, to say how much memory is missing
        plan = smallest_plan(shape, workload, options, hardware)
    chip = chip_for_dtype(tpu_slice, shape.dtype)
    cache = _cache_bytes(shape, workload, plan)
    weights_read = named_leaves(shape.params)
    if not shape.config.tie_word_embeddings:  # an embedding that is looked up is not read
        del weights_read["model.embed_tokens.weight"]
    bytes_read = cache + bytes_per_chip(weights_read) + _direction_bytes_read(shape, workload, plan, weights_read)
    counts = compile_all(shape, lambda shape: _programs(shape, workload, plan), tpu_slice, quick)
    if quick:  # part of one or two layers may stay on the chip, but each step reads all layers
        hbm_bytes = max(counts["decode"].hbm_bytes, bytes_read - counts["decode"].on_chip_bytes)
        counts["decode"] = counts["decode"]._replace(hbm_bytes=hbm_bytes)
    programs = {
        name: program_cost(count, chip, _resident_bytes(shape, workload, plan, name, cache))
        for name, count in counts.items()
    }
    decode = programs["decode"]
    run = Planner(shape, workload, options, hardware).counts(plan)
    decode_limit = max(bytes_read / chip.bandwidth, decode.flops / chip.flops)
    steps = run.batches * workload.sampling.max_new_tokens
    seconds = steps * decode.seconds + run.insertions * programs["insert"].seconds
    if "materialise" in programs:
        seconds += run.parameter_sets * programs["materialise"].seconds
    num_points = workload.num_points * plan.layout.num_sets  # that share these programs' runs
    return Forecast(
        form=plan.form,
        mesh=str(mesh_shape_of(shape.mesh)),
        plan=plan,
        programs=programs,
        fits=all(program.missing_bytes is None for program in programs.values()),
        most_rows=_most_rows(plan, programs, chip, cache),
        decode_limit=decode_limit,
        decode_share=decode_limit / decode.seconds,
        point_seconds=seconds / num_points,
        landscape_seconds=seconds * -(-workload.num_sets // plan.layout.num_sets),
        point_limit=steps * decode_limit / num_points,
    )


def _cache_bytes(shape: ModelShape, workload: Workload, plan: Plan) -> int:
    """Bytes of the key-value caches on each chip."""
    slots = slot_shapes(static_arguments(shape, workload), shape.dtype, plan.layout)
    return bytes_per_chip((slots.cache, slots.prefix))


def _resident_bytes(shape: ModelShape, workload: Workload, plan: Plan, program: str, cache: int) -> int:
    """Bytes on each chip that stay in memory while a program runs and are not among its arguments.

    Arguments:
        cache: bytes of the key-value caches on each chip.
    """
    weights, factored = bytes_per_chip(shape.params), bytes_per_chip(_factored_shapes(shape, workload, plan))
    if program == "materialise":
        return cache + factored
    # The smaller batch, which the last rows move to, exists only while nothing waits to be inserted.
    compact = cache * plan.layout.first_compact_slots // plan.layout.batch if program == "decode" else 0
    added = workload.ndim - plan.layout.num_factored // plan.layout.num_sets
    return compact + (weights + added * bytes_per_chip(_direction_shapes(shape, workload, plan)) if added else 0)


def _direction_bytes_read(shape: ModelShape, workload: Workload, plan: Plan, names: Iterable[str]) -> int:
    """Bytes of directions that each chip reads in a decode step, of the tensors with these names."""
    layout, directions = plan.layout, _factored_shapes(shape, workload, plan)
    if isinstance(directions, Stacked):
        stacked = bytes_per_chip([directions.tensors[name] for name in names if name in directions.tensors])
        per_direction = stacked // layout.num_factored
        return per_direction * directions.ndim * layout.points_in_flight // mesh_shape_of(shape.mesh).points
    trees = map(named_leaves, directions)
    return sum(bytes_per_chip([tree[name] for name in names]) for tree in trees)


def _factored_shapes(shape: ModelShape, workload: Workload, plan: Plan) -> tuple[Any, ...] | Stacked:
    """The shapes of the directions that are multiplied separately, as the programs take them."""
    layout, direction = plan.layout, _direction_shapes(shape, workload, plan)
    if workload.rank is None or layout.num_sets == 1:
        return (direction,) * layout.num_factored

    def stacked(factor: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        named: Any = factor.sharding
        sharding = NamedSharding(named.mesh, PartitionSpec(None, *named.spec))
        return jax.ShapeDtypeStruct((layout.num_factored, *factor.shape), factor.dtype, sharding=sharding)

    tensors = {
        name: StackedFactors(stacked(_transposed(tensor.left)), stacked(tensor.right))
        for name, tensor in named_leaves(direction).items()
        if tensor.rank
    }
    return Stacked(tensors, workload.ndim)


def _transposed(factor: Any) -> jax.ShapeDtypeStruct:
    """The shape of the transpose of a factor [out, rank]."""
    spec = PartitionSpec(None, *factor.sharding.spec[:1])
    return jax.ShapeDtypeStruct(factor.shape[::-1], factor.dtype, sharding=NamedSharding(factor.sharding.mesh, spec))


def _direction_shapes(shape: ModelShape, workload: Workload, plan: Plan) -> Any:
    """The shapes of a direction's tensors, as the plan stores them."""
    storage, everywhere = plan.storage, replicated(shape.mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    seed = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    key = jax.ShapeDtypeStruct(seed.shape, seed.dtype, sharding=everywhere)

    def stored(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        sharding: Any = leaf.sharding
        if workload.rank is not None:
            rank = workload.rank if len(leaf.shape) == 2 and not is_norm(name) else 0
            by_row, by_column = factor_shardings(sharding)
            return Factored(
                jax.ShapeDtypeStruct((leaf.shape[0], rank), leaf.dtype, sharding=by_row),
                jax.ShapeDtypeStruct((rank, *leaf.shape[1:]), leaf.dtype, sharding=by_column),
            )
        if storage == "exact" or is_norm(name):
            return leaf
        if storage == "seed":
            return Seeded(key, scalar, None, None, leaf.shape, str(leaf.dtype), sharding)
        return Scaled(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(storage), sharding=sharding), scalar)

    return tree_of({name: stored(name, leaf) for name, leaf in named_leaves(shape.params).items()})


def _programs(shape: ModelShape, workload: Workload, plan: Plan) -> Programs:
    """The programs of the run, ready to be lowered."""
    layout, static, everywhere = plan.layout, static_arguments(shape, workload), replicated(shape.mesh)

    def on_every_chip(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

    slots = slot_shapes(static, shape.dtype, layout)
    prefix, groups = on_every_chip(pack(workload, layout.prompts_per_group, layout.rows_per_group))
    direction, ndim = _direction_shapes(shape, workload, plan), layout.num_factored
    weights = Weights(shape.params, _factored_shapes(shape, workload, plan))
    stream = on_every_chip(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))
    numbers = np.zeros(layout.groups_per_insert, np.int32)
    insertion = on_every_chip(
        Insertion(
            groups=numbers,
            coords=np.zeros((layout.groups_per_insert, ndim), np.float32),
            new_coords=np.zeros((layout.shards * layout.max_new_points, ndim), np.float32),
            prefix_source=numbers,
            row_source=np.zeros(layout.batch, np.int32),
            point_source=np.zeros(layout.points_in_flight, np.int32),
        )
    )
    is_alive, steps = on_every_chip((np.zeros(layout.batch, bool), np.int32(0)))
    programs: Programs = {
        "insert": (
            lambda: insert.lower(weights, slots, prefix, groups, insertion, stream, static=static),
            hlo.program_traffic,
        ),
        "decode": (
            lambda: decode_chunk.lower(weights, slots, is_alive, stream, steps, static=static),
            hlo.loop_traffic,
        ),
    }
    if added := workload.ndim - ndim // layout.num_sets:
        coords = on_every_chip(np.zeros(added, np.float32))
        programs["materialise"] = (
            lambda: materialise.lower(shape.params, (direction,) * added, coords, shape.params),
            hlo.program_traffic,
        )
    return programs


def _most_rows(plan: Plan, programs: dict[str, ProgramCost], chip: Chip, cache: int) -> int:
    """An estimate of how many rows of a batch fit into a chip's memory beside the weights.

    Each row is assumed to take as many bytes as a row of `plan`, by its compiled programs.

    Arguments:
        cache: bytes of the key-value caches on each chip, for the rows of `plan`.
    """
    used = [program.used_bytes for program in programs.values() if program.used_bytes is not None]
    if len(used) < len(programs):
        return 0
    batch = plan.layout.batch
    caches = cache + cache * plan.layout.first_compact_slots // batch
    per_row = (caches + max(programs[name].temporary_bytes for name in ("insert", "decode"))) / batch
    return max(0, int(batch + (chip.memory - max(used)) / per_row))
