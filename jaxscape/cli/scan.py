"""`jaxscape scan`: measure a model's safety landscape, and keep it in a directory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxscape.cli.options import (
    DEFAULT_NUM_PROMPTS,
    Group,
    ModelOptions,
    OutputOptions,
    RunOptions,
    ScanEvaluatorOptions,
    check_texts,
)
from jaxscape.engine.options import EngineOptions, GenerationOptions
from jaxscape.landscapes.shards import parse
from jaxscape.prompts.thinking import Thinking
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.reporting import check_target
from jaxscape.runtime.streams import write_line
from jaxscape.runtime.texts import printable

if TYPE_CHECKING:
    from jaxscape.landscapes.axes import Axis
    from jaxscape.landscapes.choice import DirectionSet
    from jaxscape.landscapes.landscape import Landscape, Measure


@dataclass(frozen=True)
class PromptOptions:
    """The prompts."""

    prompts: Annotated[str, shown(metavar="NAME|FILE")] = "harmful"
    """A prompt set (harmful, benign or harmless; downloaded once: advbench, jailbreakbench, jailbreakbench-benign,
    harmbench, strongreject, xstest, xstest-safe, xstest-unsafe or mt-bench), or a .csv, .tsv, .json, .jsonl or .txt
    file."""
    prompt_column: Annotated[str | None, shown("the first known name, such as goal or prompt", "NAME")] = None
    """The column of the file that holds the prompts."""
    num_prompts: Annotated[int | None, shown("40, or all if there are fewer", "N")] = None
    """Number of prompts, from the first one on."""
    system_prompt: Annotated[str, shown(metavar="NAME|TEXT|@FILE")] = "default"
    """default (the chat template's own), none, a name (aoa, llama2 or safety), a text of several words, text:WORD for
    any text, or @FILE for the text of a file."""
    thinking: Thinking = "default"
    """on or off switches a thinking model's thinking, by its chat template's own switch. What a model thinks before its
    answer is never judged."""


@dataclass(frozen=True)
class LandscapeOptions:
    """The directions, and the axes along them."""

    ndim: Literal[1, 2] = 1
    """Dimensions of the landscape: 1 for a line, 2 for a plane."""
    steps: int = 20
    """Intervals along each axis; an even number, so that the model itself is a point."""
    radius: Annotated[float | None, shown("0.5 for most kinds", "RADIUS")] = None
    """The axes run from -RADIUS to RADIUS, in multiples of the directions."""
    seed: int = 0
    """Seed of sampling and of the first random direction; further directions use SEED + 1, SEED + 2, and so on."""
    num_directions: int = 1
    """Number of random directions; with --ndim 2, of pairs of them."""
    direction: Annotated[tuple[str, ...], shown("random ones", "KIND:OPTION ...")] = ()
    """Directions by name, such as random:SEED, file:PATH, to:MODEL or principal:RUN[,RUN...]; see the guide "Choose a
    direction" for all kinds. With --ndim 2, two of them make a pair."""
    directions: Annotated[tuple[Path, ...], shown("none", "FILE ...")] = ()
    """Safetensors files with directions, the same as --direction file:PATH for each of them."""
    interpolate_to: Annotated[tuple[str, ...], shown("none", "MODEL ...")] = ()
    """Models to interpolate to. With --ndim 2 give two models, which span the plane, or one, which is put beside a
    random direction."""
    equal_norm: bool = False
    """Scale every direction to the norm of the weights, so that several kinds share one axis."""
    no_control: bool = False
    """Leave out the random direction of the same norm and rank that is scanned beside each special one."""
    extra_steps: int = 0
    """Number of further intervals of an interpolation beyond each of its two ends."""
    trajectory: Annotated[tuple[Path, ...], shown("none", "RUN ...")] = ()
    """Directories of finetunings of this model, whose paths are drawn on the plane (--ndim 2). Without other
    directions, the plane is that of the paths' first two principal components."""

    def grid(self) -> "tuple[list[DirectionSet], tuple[Axis, ...]]":
        """The direction sets that the options describe, and the axes along them."""
        from jaxscape.landscapes.choice import choose_axes

        sets = self.sets(self.ndim)
        return sets, choose_axes(sets, self.steps, self.radius, self.extra_steps)

    def sets(self, ndim: int) -> "list[DirectionSet]":
        """The direction sets that the options describe, with `ndim` directions each."""
        from jaxscape.landscapes.choice import choose_directions, with_controls

        sets = choose_directions(
            ndim,
            seed=self.seed,
            num_directions=self.num_directions,
            names=self.direction,
            files=[str(path) for path in self.directions],
            interpolate_to=self.interpolate_to,
            trajectories=[str(path) for path in self.trajectory],
            equal_norm=self.equal_norm,
        )
        return sets if self.no_control else with_controls(sets)


@dataclass(frozen=True)
class PointOptions:
    """Which points are evaluated, if not all of the grid."""

    points: Annotated[Path | None, shown("the grid", "FILE")] = None
    """A .csv or .json file with the coordinates of points, one for each direction. It takes the place of the grid, so
    that there may be any number of directions."""
    adaptive: bool = False
    """Evaluate points of the grid only where the landscape changes, and interpolate the others."""
    shard: Annotated[str | None, shown("all points", "I/N")] = None
    """Evaluate only part I of N parts of the points, which have about the same expected cost. `jaxscape merge` makes
    the whole run of all N parts, which may run on different machines."""

    def coordinates(self, grid: LandscapeOptions) -> "tuple[tuple[float, ...], ...] | None":
        """The points of the file; None if there is none.

        Arguments:
            grid: the options that describe a grid, which a file takes the place of.
        """
        from jaxscape.landscapes.points import load_points

        if self.points is None:
            return None
        if self.adaptive:
            raise UserError("--adaptive chooses points of a grid, and --points is no grid: give only one of them.")
        names = ("ndim", "steps", "radius", "extra_steps", "trajectory")
        given = [name for name in names if getattr(grid, name) != getattr(LandscapeOptions(), name)]
        if given:
            raise UserError(f"--points takes the place of the grid: leave out --{given[0].replace('_', '-')}.")
        return load_points(self.points)


@dataclass(frozen=True)
class ScanOutputOptions(OutputOptions):
    """The run's directory."""

    extend: bool = False
    """If the directory holds a run with fewer prompts, points or directions, continue it without generating again what
    is there."""


@dataclass(frozen=True)
class Scan:
    """Measure a model's safety landscape, and keep it in a directory. An unfinished run there is resumed.

    Examples:
      # A line through the weights of the model that comes with jaxscape: 11 points, 20 prompts
      jaxscape scan --num-prompts 20 --steps 10
      # A plane through the weights of your own model, with the paper's prompts, on a GPU
      jaxscape scan --model path/to/model --prompts advbench --num-prompts 80 --ndim 2 --gpu
      # The way to another model, judged by two evaluators
      jaxscape scan --direction to:smollm2-135m --evaluator keywords xstest --out runs/unaligned
    """

    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    prompts: Group[PromptOptions] = field(default_factory=PromptOptions)
    landscape: Group[LandscapeOptions] = field(default_factory=LandscapeOptions)
    points: Group[PointOptions] = field(default_factory=PointOptions)
    evaluators: Group[ScanEvaluatorOptions] = field(default_factory=ScanEvaluatorOptions)
    generation: Group[GenerationOptions] = field(default_factory=GenerationOptions)
    engine: Group[EngineOptions] = field(default_factory=EngineOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    output: Group[ScanOutputOptions] = field(default_factory=ScanOutputOptions)

    def run(self) -> None:
        # Whatever can be wrong is checked before anything slow is done.
        options = self.landscape
        kind = f"{options.ndim}d" if self.points.points is None else "points"
        if self.points.shard is not None:
            number, count = parse(self.points.shard)
            kind += f"-shard-{number}-of-{count}"
        out = self.output.out or Path("runs") / f"{self.model.short_name}-{kind}"
        files, trajectories = [str(path) for path in options.directions], [str(path) for path in options.trajectory]
        source, system_prompt = self.prompts.prompts, self.prompts.system_prompt
        column = self.prompts.prompt_column
        check_texts(self.model.model, source, system_prompt, out, *options.direction, *files, *trajectories)
        check_target(self.output.report_to, out)
        check_texts(column or "", self.points.points or "", self.model.base or "", *self.evaluators.names)

        from jaxscape.directions.kinds import make_directions, prepare
        from jaxscape.directions.path import load_path
        from jaxscape.engine.forms import Form
        from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR, find_evaluators
        from jaxscape.finetuning.trajectory import project, save_trajectories
        from jaxscape.landscapes.landscape import FIGURE
        from jaxscape.landscapes.preview import preview
        from jaxscape.landscapes.scan import scan
        from jaxscape.landscapes.store import SCAN
        from jaxscape.prompts.chat_format import system_prompt_text
        from jaxscape.prompts.sets import load_prompts
        from jaxscape.runtime import rundir
        from jaxscape.runtime.processes import from_first

        points = self.points.coordinates(options)
        sets, axes = options.grid() if points is None else (options.sets(len(points[0])), None)
        judges = find_evaluators(self.evaluators.names or DEFAULT_EVALUATOR)
        if system_prompt not in ("default", "none"):
            system_prompt_text(system_prompt)
        prompts = load_prompts(source, self.prompts.num_prompts, column)
        if self.prompts.num_prompts is None:
            prompts = prompts.first(DEFAULT_NUM_PROMPTS)
        is_dry = self.output.dry_run
        self.devices.start(keep_compiled=not is_dry)
        out = run_directory(out)
        from_first(lambda: rundir.check_directory(out, SCAN))
        on_host = None if self.engine.form == "auto" else self.engine.form == Form.STREAMED
        model = self.model.load(self.devices.mesh, on_host, weights=not is_dry)
        answering = {
            "prompts": prompts,
            "axes": axes,
            "points": points,
            "adaptive": self.points.adaptive,
            "system_prompt": system_prompt,
            "thinking": self.prompts.thinking,
            "shard": self.points.shard,
            "options": self.engine,
            "seed": options.seed,
            **asdict(self.generation),
        }
        if is_dry:
            text = preview(model, sets, **answering)
            from_first(lambda: write_line(text))
            return

        from jaxscape.report.figures import save_figure  # Matplotlib writes a cache when it is imported

        directions = [[prepared.recipe for prepared in item] for item in prepare(sets, model)]
        paths = []
        if trajectories:
            plane = make_directions(directions[0], model)
            paths = [project(path.name, load_path(path, model), plane) for path in options.trajectory]
        landscape = scan(
            model,
            directions,
            control=False,  # the sets have their controls
            evaluator=judges,
            free_model=True,
            shares=not self.evaluators.no_shares,
            abandon_incoherent=self.evaluators.abandon_incoherent,
            out=out,
            overwrite=self.output.overwrite,
            report_to=self.output.report_to,
            extend=self.output.extend,
            describe={
                "prompt_source": source,
                **({} if column is None else {"prompt_column": column}),
                "direction_files": files,
                "interpolate_to": list(options.interpolate_to),
                **self.model.described,
            },
            **answering,
        )

        def conclude() -> None:
            if paths:
                save_trajectories(paths, out)
            if self.points.shard is not None:
                text = f"Shard {self.points.shard} is finished: jaxscape merge makes the run of all shards."
                write_line(f"{text}\n{out}")
                return
            save_figure(landscape, out / FIGURE, trajectories=paths)
            write_line(summary(landscape, out / FIGURE))

        from_first(conclude)


def summary(landscape: "Landscape", figure: Path) -> str:
    """A few lines for the user: the ASR, VISAGE and the other numbers, those of controls, and where the figure is."""
    import numpy as np

    control, landscape = landscape.control, landscape.without_controls()
    values, numbers, origin = landscape.visage_values, landscape.numbers or {}, landscape.origin
    centre = "" if origin is None else f" of the model itself: {np.mean([asr[origin] for asr in landscape.asr]):.1f} %;"
    lines = [f"ASR{centre} over all points: {landscape.asr.mean():.1f} %"]
    if landscape.filled is not None:
        lines.append(
            f"Evaluated: {landscape.num_evaluated} of {landscape.asr.size} points; the others are interpolated"
        )
    lines += _grid_lines(values, numbers)
    if control:
        lines += [f"Control: {line}" for line in _grid_lines(control["visage"], control["numbers"])]
    if nonfinite := int(landscape.nonfinite.sum()):
        points = int((landscape.nonfinite > 0).sum())
        lines.append(f"NaN or infinite logits: {nonfinite} completions at {points} points")
    if unanswered := int(landscape.unanswered.sum()):
        points = int((landscape.unanswered > 0).sum())
        lines.append(
            f"Thinking without an answer: {unanswered} completions at {points} points, which count as no refusal; "
            f"raise --max-new-tokens, or give --thinking off"
        )
    if landscape.abandoned is not None:
        lines.append(landscape.abandoned_text)
    return "\n".join([*lines, *measure_lines(landscape), f"{figure}"])


def _grid_lines(visage: Mapping[str, Any] | None, numbers: Mapping[str, Any]) -> list[str]:
    """VISAGE and the other numbers of a grid; nothing if there are none."""
    lines = []
    if visage is not None:
        low, high = visage["interval"]
        lines.append(
            f"VISAGE: {visage['paper']:.2f} (95 % interval {low:.2f} to {high:.2f}); reference code's definition: "
            f"{visage['reference']:.2f}"
        )
    for rate, what, of in (("asr", "", "the ASR"), ("complied", " of complied alone", "the share that complies")):
        if rate in numbers:
            lines += _number_lines(numbers[rate], what, of)
    return lines


def _number_lines(numbers: Mapping[str, Any], what: str, rate: str) -> list[str]:
    """A line for the volume and one for the radius, if there is one.

    Arguments:
        what: what stands behind their names.
        rate: what the radius says of which it rises above 50 %.
    """
    from jaxscape.report.tables import estimate_text

    volume, radius = numbers["volume"], numbers["radius"]
    lines = [f"Safety volume{what} in percent: {estimate_text(volume, '.2f', '95 % interval ')}"]
    if radius is not None:
        lines.append(f"Radius{what}, where {rate} rises above 50 %: {estimate_text(radius, '.3g', '95 % interval ')}")
    return lines


def measure_lines(landscape: "Landscape") -> list[str]:
    """A line for the three shares, one for each evaluator, with the share of each label, and one for each pair of
    evaluators, with the share of the answers on which they differ: over all points, and at the model itself if it is a
    point."""
    import numpy as np

    from jaxscape.evaluate.base import LABELS
    from jaxscape.landscapes.labels import UNJUDGED

    def shares(measure: "Measure", part: Any) -> str:
        labels = [label for label in (*LABELS, UNJUDGED) if label in measure]
        if all(np.isnan(measure[label][part]).all() for label in labels):
            return "nothing judged"
        return ", ".join(f"{label} {np.nanmean(measure[label][part]):.1f} %" for label in labels)

    def difference(measure: "Measure", part: Any) -> str:
        shares = measure["differ"][part]
        return "nothing that both judged" if np.isnan(shares).all() else f"{np.nanmean(shares):.1f} % differ"

    origin = None if landscape.origin is None else (slice(None), *landscape.origin)
    judged = ({"shares": landscape.shares} if landscape.shares else {}) | dict(landscape.measures)
    return [
        f"{printable(name)}: {text(measure, ...)} over all points"
        + (f"; {text(measure, origin)} at the model itself" if origin else "")
        for text, measures in ((shares, judged), (difference, landscape.disagreement))
        for name, measure in measures.items()
    ]
