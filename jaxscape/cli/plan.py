"""`jaxscape plan`: forecast what a scan takes on TPUs that are not here."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jaxscape.cli.options import DEFAULT_NUM_PROMPTS, Group, check_texts
from jaxscape.engine.options import EngineOptions
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line
from jaxscape.runtime.texts import aligned, listed

if TYPE_CHECKING:
    from jaxscape.cli.scan import Scan
    from jaxscape.sweeps.forecasts import Forecasted, ScanShape

WITH_SWEEP = ("topology", "prompt_tokens", "shared_tokens", "quick", "json", "sweep")
"""The options that a plan of a sweep takes; all others are those of its scans."""


@dataclass(frozen=True)
class SliceOptions:
    """The model and the TPU slice."""

    model: str = "llama-2-7b"
    """A model that is known by its shapes (llama-2-7b, llama-3-70b, ...), a hub id, a config.json, or a directory that
    has one. The weights are not needed; of a hub id that is not known, config.json is downloaded."""
    topology: Annotated[tuple[str, ...], shown(metavar="SLICE ...")] = ("v5e:2x4",)
    """The TPU slice: a kind (v4, v5e, v5p or v6e) and its shape; v4 and v5p have three numbers, as in v5p:2x2x1. With
    --sweep, there may be several."""
    mesh: Annotated[str | None, shown("weights over the fewest chips that can hold them", "points=N,model=M")] = None
    """Shard the rows of a batch over N chips and the weights over M."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of weights and activations."""


@dataclass(frozen=True)
class WorkloadOptions:
    """What is scanned."""

    points: tuple[int, ...] = (21,)
    """Points along each axis: one number for a line, two for a plane."""
    num_directions: int = 1
    """Number of random directions; for a plane, of pairs of them."""
    rank: Annotated[int | None, shown(default="full", metavar="R")] = None
    """Rank of the directions, as of `low-rank:RANK:SEED`."""
    prompts: int = 80
    """Number of prompts."""
    prompt_tokens: int = 56
    """Number of tokens of each prompt in the model's chat format."""
    shared_tokens: int = 26
    """Number of tokens at the beginning of a prompt that are the same in all prompts."""
    max_new_tokens: int = 512
    """Maximum number of tokens generated for a prompt. The forecast assumes that every answer reaches it."""


@dataclass(frozen=True)
class ForecastOptions:
    """The forecast."""

    sweep: Annotated[Path | None, shown("none", "FILE")] = None
    """Add up the device hours of the scans of a sweep, which this YAML file describes. Everything but the slices and
    the length of the prompts is that of the scans."""
    quick: bool = False
    """Compile models of one and of two layers only, and extrapolate linearly to all layers."""
    finetune: Annotated[tuple[int, int] | None, shown("none", "CHATS TOKENS")] = None
    """Also forecast a step of full finetuning with --remat, for a batch of CHATS chats of TOKENS
    tokens."""
    json: bool = False
    """Write JSON instead of a table."""


@dataclass(frozen=True)
class Plan:
    """Forecast a scan on TPUs that are not here: its memory, its time, and which form is faster.

    Examples:
      # The paper's model and settings on 8 chips
      jaxscape plan --model llama-2-7b --topology v5e:2x4 --num-directions 3
      # A plane of a large model, quickly
      jaxscape plan --model llama-3-70b --topology v5p:2x2x2 --points 21 21 --quick
      # A scan of your own model, and a step of its finetuning with 8 chats of 512 tokens
      jaxscape plan --model path/to/model --finetune 8 512
      # The device hours of all scans of a sweep, on two slices
      jaxscape plan --sweep experiments/sweep.yaml --topology v5e:1x1 v6e:1x1 --quick
    """

    slice: Group[SliceOptions] = field(default_factory=SliceOptions)
    workload: Group[WorkloadOptions] = field(default_factory=WorkloadOptions)
    engine: Group[EngineOptions] = field(default_factory=EngineOptions)
    forecast: Group[ForecastOptions] = field(default_factory=ForecastOptions)

    def run(self) -> None:
        import jax

        from jaxscape.finetuning.forecast import finetune_step
        from jaxscape.finetuning.training import check_batch
        from jaxscape.forecast.chips import open_slice, shape_on
        from jaxscape.forecast.forecast import forecast, make_workload
        from jaxscape.forecast.known_models import shape_config
        from jaxscape.forecast.table import as_json, describe
        from jaxscape.runtime.hardware import check_jax_options
        from jaxscape.runtime.sharding import parse_mesh_shape

        check_jax_options()
        jax.config.update("jax_platforms", "cpu")  # the compiler needs no device, and none should be taken
        if self.forecast.sweep is not None:
            _plan_sweep(self, self.forecast.sweep)
            return
        if len(self.slice.topology) != 1:
            raise UserError("Several slices can be planned for with --sweep only: give one --topology.")
        (topology,) = self.slice.topology
        dtype, work, options = self.slice.dtype, self.workload, self.forecast
        if not 1 <= len(work.points) <= 2:
            raise UserError(f"--points takes one number for a line or two for a plane, not {len(work.points)}.")
        if work.num_directions < 1:
            raise UserError(f"--num-directions must be at least 1, not {work.num_directions}.")
        config = shape_config(self.slice.model)
        mesh_shape = None if self.slice.mesh is None else parse_mesh_shape(self.slice.mesh)
        workload = make_workload(
            work.prompts, work.prompt_tokens, work.shared_tokens, work.max_new_tokens, work.points, work.rank
        )
        tpu_slice = open_slice(topology)
        if options.finetune is not None:
            check_batch(options.finetune[0], shape_on(config, tpu_slice, mesh_shape, dtype).mesh)
        forecasts = forecast(
            config,
            workload,
            tpu_slice,
            num_sets=work.num_directions,
            mesh_shape=mesh_shape,
            dtype=dtype,
            options=self.engine,
            quick=options.quick,
        )
        step = None
        if options.finetune is not None:
            batch_size, length = options.finetune
            step = finetune_step(
                config,
                tpu_slice,
                batch_size=batch_size,
                length=length,
                remat=True,
                mesh_shape=mesh_shape,
                dtype=dtype,
                quick=options.quick,
            )
        if options.json:
            finetune = None if step is None else as_json([step])[0]
            write_line(json.dumps({"forms": as_json(forecasts), "finetune": finetune}))
        else:
            title = f"{self.slice.model} on {topology}, {forecasts[0].mesh}"
            write_line(describe(forecasts, step, title))


def _plan_sweep(plan: Plan, file: Path) -> None:
    """Forecast the scans of a sweep, and add up their hours."""
    check_texts(file)

    from jaxscape.cli.sweep import load_tasks, scan_of
    from jaxscape.forecast.chips import open_slice
    from jaxscape.sweeps.forecasts import forecast_scans

    for group in (plan.slice, plan.workload, plan.engine, plan.forecast):
        for name, value in vars(group).items():
            if name not in WITH_SWEEP and value != getattr(type(group)(), name):
                raise UserError(f"--{name.replace('_', '-')} is given by the scans of a sweep: leave it out.")
    cells = {task.cell.name: task.cell for task in load_tasks(file, None)}
    shapes = {name: _shape_of(scan_of(cell), plan.workload) for name, cell in cells.items()}
    slices = [open_slice(name) for name in plan.slice.topology]
    results = [forecast_scans(shapes, tpu_slice, plan.forecast.quick) for tpu_slice in slices]
    if plan.forecast.json:
        write_line(json.dumps([asdict(result) for of_slice in results for result in of_slice]))
    else:
        write_line("\n\n".join([*map(_sweep_text, results), SWEEP_NOTE]))


def _shape_of(scan: "Scan", lengths: WorkloadOptions) -> "ScanShape | str":
    """What a forecast of a scan depends on, or why it cannot be forecast.

    Arguments:
        lengths: the options that give the lengths of the prompts.
    """
    from jaxscape.engine.sampling import Sampling
    from jaxscape.forecast.forecast import made_up_prompts
    from jaxscape.landscapes.scan import workload_of
    from jaxscape.runtime.sharding import parse_mesh_shape
    from jaxscape.sweeps.forecasts import ScanShape, config_of

    if scan.points.adaptive:
        return "How many points an adaptive scan evaluates depends on what it finds."
    dtype, mesh = scan.model.dtype or "bfloat16", scan.devices.mesh
    if dtype == "float16":
        return "TPUs have no float16."
    num_prompts = scan.prompts.num_prompts or DEFAULT_NUM_PROMPTS
    prompts = made_up_prompts(num_prompts, lengths.prompt_tokens, lengths.shared_tokens)
    try:
        points = scan.points.coordinates(scan.landscape)
        sets, axes = scan.landscape.grid() if points is None else (scan.landscape.sets(len(points[0])), ())
        workload = workload_of(prompts, Sampling(**asdict(scan.generation)), axes, sets, points or ())
        config = config_of(scan.model.model, scan.model.base)
        return ScanShape(config, workload, scan.engine, None if mesh is None else parse_mesh_shape(mesh), dtype)
    except UserError as error:
        return str(error)


SWEEP_NOTE = (
    "Hours are forecasts of decoding in which every answer reaches --max-new-tokens. They include neither loading nor "
    "judges that are models."
)


def _sweep_text(results: "Sequence[Forecasted]") -> str:
    """The forecasts of a sweep on one slice, for the terminal."""
    found = [result for result in results if not result.problem]
    head = ("slice", "scans", "form", "hours of one", "device hours", "which")
    rows = [
        (
            result.topology,
            str(len(result.scans)),
            result.form,
            f"{result.hours:.3g}",
            f"{result.device_hours:.3g}",
            listed(result.scans, 2),
        )
        for result in found
    ]
    count, hours = sum(len(result.scans) for result in found), sum(result.device_hours for result in found)
    lines = [aligned([head, *rows])] if rows else []
    lines += [
        f"{result.topology}: no forecast of {listed(result.scans, 2)}: {result.problem}"
        for result in results
        if result.problem
    ]
    lines.append(f"{results[0].topology}: {count} scans, {hours:.3g} device hours in all")
    return "\n".join(lines)
