"""`jaxscape measure`: measure weights along the directions of a landscape without decoding, and keep the numbers."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from jaxscape.cli.options import DEFAULT_NUM_PROMPTS, Group, ModelOptions, RunOptions, check_texts
from jaxscape.cli.scan import LandscapeOptions, PromptOptions
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured."""

    measures: Annotated[tuple[str, ...], shown("first-token damage", "NAME ...")] = ("first-token", "damage")
    """first-token, damage, likelihood, multiple-choice:FILE (or a directory) or perplexity:SET|FILE."""
    like: Annotated[Path | None, shown("none", "RUN")] = None
    """The directory of a scan. Its model, directions, axes, prompts and system prompt are taken."""
    target: Annotated[str | None, shown("the prompt file's column target", "TEXT")] = None
    """For likelihood: the beginning of an answer that complies, the same for all prompts."""
    refusal: Annotated[str | None, shown("those of the model's own answers", "TEXT")] = None
    """For first-token and likelihood: the beginning of a refusal."""
    harmless: Annotated[str, shown("the first 40 of benign", "SET|FILE")] = ""
    """For damage: harmless prompts."""
    shots: Annotated[int | None, shown("5 where there is a file of examples, and else 0", "K")] = None
    """For multiple-choice: number of solved examples before each question."""


_USERS = {
    "target": ("likelihood",),
    "refusal": ("first-token", "likelihood"),
    "harmless": ("damage",),
    "shots": ("multiple-choice",),
}
"""The measures that use an option."""


@dataclass(frozen=True)
class MeasureOutput:
    """The run's directory."""

    out: Annotated[Path | None, shown("runs/MODEL-measures-1d or RUN-measures", "DIRECTORY")] = None
    """The run's directory. An unfinished run there is resumed."""
    overwrite: bool = False
    """Start over if the directory holds a run."""


@dataclass(frozen=True)
class Measure:
    """Measure a model's weights along the directions of a landscape, without decoding. An unfinished run is resumed.

    Examples:
      # Refusal and damage along a random direction, without decoding answers
      jaxscape measure --num-prompts 20 --steps 10
      # The same and perplexity, at the points of a scan
      jaxscape measure --like runs/smollm2-135m-safe-1d --measures first-token damage perplexity:harmless
      # Capability, by a directory of MMLU's files, along three directions
      jaxscape measure --measures multiple-choice:path/to/mmlu --num-directions 3
    """

    measures: Group[MeasureOptions] = field(default_factory=MeasureOptions)
    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    prompts: Group[PromptOptions] = field(default_factory=PromptOptions)
    landscape: Group[LandscapeOptions] = field(default_factory=LandscapeOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    output: Group[MeasureOutput] = field(default_factory=MeasureOutput)

    def run(self) -> None:
        options, what = self.landscape, self.measures
        files = [str(path) for path in options.directions]
        check_texts(*what.measures, what.like or "", what.target or "", what.refusal or "", what.harmless)
        check_texts(self.model.model, self.prompts.prompts, self.prompts.system_prompt, *options.direction, *files)
        check_texts(self.output.out or "", self.prompts.prompt_column or "", self.model.base or "")
        if options.trajectory:
            raise UserError("A trajectory is drawn by jaxscape scan: leave out --trajectory.")
        if what.like is not None and (self.prompts, options) != (PromptOptions(), LandscapeOptions()):
            raise UserError("--like takes the prompts and the directions from its run: leave out your own.")
        if what.like is not None and replace(self.model, keep_weights=False) != ModelOptions():
            raise UserError("--like takes the model from its run: leave out --model, --dtype and --base.")

        from jaxscape.evaluate.measures import check_names
        from jaxscape.landscapes.landscape import FILE_NAME, Landscape
        from jaxscape.landscapes.measure import FIGURE, MEASURE, measure
        from jaxscape.landscapes.scan_settings import ScanSettings
        from jaxscape.prompts.chat_format import system_prompt_text
        from jaxscape.prompts.sets import load_prompts
        from jaxscape.runtime import rundir
        from jaxscape.runtime.processes import from_first

        check_names(what.measures)
        measured = {name.partition(":")[0] for name in what.measures}
        for option, users in _USERS.items():
            if getattr(what, option) not in (None, "") and not measured.intersection(users):
                raise UserError(
                    f"--{option} is for {' and '.join(users)}, which --measures does not name: name it, or leave out "
                    f"--{option}."
                )
        if self.prompts.system_prompt not in ("default", "none"):
            system_prompt_text(self.prompts.system_prompt)
        model_options, source = self.model, self.prompts.prompts
        out = self.output.out or Path("runs") / f"{self.model.short_name}-measures-{options.ndim}d"
        if what.like is not None:
            scanned = ScanSettings.load(run_directory(what.like))
            model_options = replace(self.model, model=scanned.model, dtype=scanned.dtype, base=scanned.base)  # type: ignore[arg-type]
            source, prompts = scanned.prompt_source or "", list(scanned.prompts)
            out = self.output.out or _beside(what.like)
            points: dict[str, Any] = {"like": what.like}
        else:
            loaded = load_prompts(source, self.prompts.num_prompts, self.prompts.prompt_column)
            prompts = loaded if self.prompts.num_prompts is not None else loaded.first(DEFAULT_NUM_PROMPTS)
            points = self._points() | {"prompts": prompts}
        targets = None
        if "likelihood" in what.measures:
            targets = [what.target] * len(prompts) if what.target is not None else _targets(source, prompts)
        harmless = load_prompts(what.harmless) if what.harmless else None
        self.devices.start()
        out = run_directory(out)
        from_first(lambda: rundir.check_directory(out, MEASURE))
        measurement = measure(
            model_options.load(self.devices.mesh),
            measures=what.measures,
            targets=targets,
            refusal=what.refusal,
            harmless=harmless,
            num_shots=what.shots,
            out=out,
            overwrite=self.output.overwrite,
            describe={"prompt_source": source, **model_options.described},
            **points,
        )

        from jaxscape.report.measures import save_measures_figure  # Matplotlib writes a cache when it is imported

        def conclude() -> None:
            landscape = None
            if what.like is not None and ((like := run_directory(what.like)) / FILE_NAME).exists():
                landscape = Landscape.load(like)
            save_measures_figure(measurement, out / FIGURE, landscape)
            write_line(f"{out / FIGURE}")

        from_first(conclude)

    def _points(self) -> dict[str, Any]:
        """The arguments of `measure` that say where and how prompts are asked."""
        sets, axes = self.landscape.grid()
        return {
            "directions": [list(item) for item in sets],
            "axes": axes,
            "control": False,  # the sets have their controls
            "system_prompt": self.prompts.system_prompt,
            "thinking": self.prompts.thinking,
        }


def _beside(run: Path) -> Path:
    """The directory for measures at the points of a run, beside the run's directory, which may be a URL."""
    parent = run.resolve().parent if run.name in ("", "..") else run.parent
    return parent / f"{run.resolve().name}-measures"


def _targets(source: str, prompts: list[str]) -> list[str]:
    """The target that the source has for each prompt."""
    from jaxscape.evaluate.likelihood import NO_TARGETS
    from jaxscape.finetuning.chats import SETS, load_chats
    from jaxscape.prompts.sets import PROMPT_SETS

    if not source or (source in PROMPT_SETS and source not in SETS):
        raise UserError(NO_TARGETS)
    targets = {chat[-2]["content"].strip(): chat[-1]["content"] for chat in load_chats(source)}
    missing = [prompt for prompt in prompts if prompt.strip() not in targets]
    if missing:
        raise UserError(
            f"{source} has no target for the prompt {missing[0]!r:.60}: give --target TEXT for all prompts."
        )
    return [targets[prompt.strip()] for prompt in prompts]
