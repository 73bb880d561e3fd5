"""`jaxscape radius`: how far the weights can move in many directions, with a confidence."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxscape.cli.options import DEFAULT_NUM_PROMPTS, EvaluatorOptions, Group, ModelOptions, RunOptions, check_texts
from jaxscape.cli.scan import PromptOptions
from jaxscape.engine.options import EngineOptions, GenerationOptions
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.streams import write_line

if TYPE_CHECKING:
    from jaxscape.models.model import Model

DEFAULT_NUM_DIRECTIONS = 10


@dataclass(frozen=True)
class SearchOptions:
    """The directions, and what is searched for along them."""

    num_directions: Annotated[int | None, shown(f"{DEFAULT_NUM_DIRECTIONS}", "N")] = None
    """Number of random directions. Both sides of each are searched."""
    direction: Annotated[tuple[str, ...], shown("random ones", "KIND:OPTION ...")] = ()
    """Directions by name, as for jaxscape scan. Of one to another model, the positive side is searched."""
    seed: int = 0
    """Seed of sampling, of the order of the prompts, and of the first random direction or draw; further ones use
    SEED + 1, SEED + 2, and so on."""
    of: Literal["asr", "complied", "incoherent"] = "asr"
    """The rate: asr, or the share of the answers that are complied or incoherent, as the unperturbed model judges."""
    threshold: float = 50.0
    """The radius is where the rate exceeds this, in percent."""
    radius_max: Annotated[float | None, shown("that of their kind, 0.5 for most; 1 to a model", "FLOAT")] = None
    """The largest distance, in multiples of the directions."""
    resolution: Annotated[float | None, shown("a fiftieth of the largest distance", "FLOAT")] = None
    """Distance between the two points between which a radius is found."""
    error: float = 0.05
    """Largest probability, over the random order of the prompts, that the search along a ray ends elsewhere than it
    would with all answers; 0 asks until no answer can change a decision."""
    checks: Annotated[int | None, shown("0; 9 with --of complied", "N")] = None
    """Number of points, spread evenly over each ray, that are asked before bisection. Bisection then finds
    the first crossing even if the rate falls again farther out, but a rise and fall between two of them is missed."""


@dataclass(frozen=True)
class CertificateOptions:
    """A certificate of Gaussian noise, instead of a search."""

    certify: Annotated[float | None, shown("none", "SIGMA")] = None
    """Measure how often Gaussian noise, of SIGMA times the root mean square of each tensor, keeps the rate from
    exceeding the threshold."""
    draws: int = 100
    """Number of draws of the noise."""


@dataclass(frozen=True)
class RadiusOutput:
    """The run's directory."""

    out: Annotated[Path | None, shown("runs/MODEL-radius or runs/MODEL-certificate", "DIRECTORY")] = None
    """The run's directory. An unfinished run there is resumed."""
    overwrite: bool = False
    """Start over if the directory holds a run."""
    dry_run: bool = False
    """Write nothing: print the plan, and the first prompt as the model gets it, with its token ids."""


@dataclass(frozen=True)
class Radius:
    """Measure how far the weights can move in many directions until a rate exceeds a threshold. An unfinished run is
    resumed.

    Examples:
      # How far it is to the walls of the basin along 5 random directions
      jaxscape radius --num-prompts 20 --num-directions 5
      # Along the refusal direction, until a quarter of the answers comply
      jaxscape radius --direction refusal --prompts advbench --of complied --threshold 25 --out runs/refusal
      # How often noise of 5 % of the weights leaves the model refusing
      jaxscape radius --certify 0.05
    """

    search: Group[SearchOptions] = field(default_factory=SearchOptions)
    certificate: Group[CertificateOptions] = field(default_factory=CertificateOptions)
    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    prompts: Group[PromptOptions] = field(default_factory=PromptOptions)
    evaluators: Group[EvaluatorOptions] = field(default_factory=EvaluatorOptions)
    generation: Group[GenerationOptions] = field(default_factory=GenerationOptions)
    engine: Group[EngineOptions] = field(default_factory=EngineOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    output: Group[RadiusOutput] = field(default_factory=RadiusOutput)

    def run(self) -> None:
        options, sigma = self.search, self.certificate.certify
        source, system_prompt = self.prompts.prompts, self.prompts.system_prompt
        column = self.prompts.prompt_column
        out = (
            self.output.out or Path("runs") / f"{self.model.short_name}-{'radius' if sigma is None else 'certificate'}"
        )
        check_texts(self.model.model, source, system_prompt, out, *options.direction, *self.evaluators.names)
        check_texts(column or "", self.model.base or "")
        self._check()

        from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR, find_evaluators
        from jaxscape.landscapes.decisions import RADIUS, Question
        from jaxscape.landscapes.preview import preview_certificate, preview_radius
        from jaxscape.landscapes.radius import SearchSettings, check_draws
        from jaxscape.prompts.chat_format import system_prompt_text
        from jaxscape.prompts.sets import load_prompts
        from jaxscape.runtime import rundir
        from jaxscape.runtime.processes import from_first

        limits = (options.of, options.threshold, options.radius_max, options.resolution, options.error, options.checks)
        directions = self._directions()
        settings = SearchSettings.choose(directions, *limits)
        if sigma is not None:
            check_draws(sigma, self.certificate.draws)
        judges = find_evaluators(self.evaluators.names or DEFAULT_EVALUATOR)
        if system_prompt not in ("default", "none"):
            system_prompt_text(system_prompt)
        prompts = load_prompts(source, self.prompts.num_prompts, column)
        if self.prompts.num_prompts is None:
            prompts = prompts.first(DEFAULT_NUM_PROMPTS)
        is_dry = self.output.dry_run
        self.devices.start(keep_compiled=not is_dry)
        out = run_directory(out)
        from_first(lambda: rundir.check_directory(out, RADIUS))
        on_host = True if self.engine.form == "streamed" else None
        model = self.model.load(self.devices.mesh, on_host, weights=not is_dry)
        answering: dict[str, Any] = {
            "prompts": prompts,
            "system_prompt": system_prompt,
            "thinking": self.prompts.thinking,
            "options": self.engine,
            "seed": options.seed,
            **asdict(self.generation),
        }
        if is_dry:
            question = Question(options.of, options.threshold)
            text = (
                preview_radius(model, directions, settings, **answering)
                if sigma is None
                else preview_certificate(model, self.certificate.draws, question, **answering)
            )
            from_first(lambda: write_line(text))
            return

        answering |= {
            "of": options.of,
            "threshold": options.threshold,
            "evaluator": judges,
            "out": out,
            "overwrite": self.output.overwrite,
            "describe": {
                "prompt_source": source,
                **({} if column is None else {"prompt_column": column}),
                **self.model.described,
            },
        }
        text = (
            self._search(model, directions, out, answering) if sigma is None else self._certify(model, sigma, answering)
        )
        from_first(lambda: write_line(text))

    def _check(self) -> None:
        """Raise a `UserError` if options contradict one another."""
        options = self.search
        if options.direction and options.num_directions is not None:
            raise UserError("Give either --direction or --num-directions, which counts random directions.")
        if options.num_directions is not None and options.num_directions < 1:
            raise UserError(f"--num-directions must be at least 1, not {options.num_directions}.")
        if self.certificate.certify is None:
            if self.certificate.draws != CertificateOptions.draws:
                raise UserError("--draws counts draws of noise: give --certify SIGMA too.")
            return
        if options.direction or options.num_directions is not None:
            raise UserError("--certify draws noise of its own: leave out --direction and --num-directions.")
        for name in ("radius_max", "resolution", "error", "checks"):
            if getattr(options, name) != getattr(SearchOptions(), name):
                raise UserError(f"--certify searches for no radius: leave out --{name.replace('_', '-')}.")

    def _directions(self) -> list[Any]:
        """The recipes of the directions."""
        from jaxscape.directions.kinds import parse_direction
        from jaxscape.directions.random import Random

        options = self.search
        count = options.num_directions or DEFAULT_NUM_DIRECTIONS
        return [parse_direction(name) for name in options.direction] or [Random(options.seed + i) for i in range(count)]

    def _search(self, model: "Model", directions: list[Any], out: Path, answering: dict[str, Any]) -> str:
        """Search along the directions, draw the figure, and return what is printed."""
        from jaxscape.landscapes.radii import FIGURE
        from jaxscape.landscapes.radius import radius
        from jaxscape.report.radius import radii_table, save_radii_figure  # Matplotlib writes a cache when imported
        from jaxscape.runtime.processes import from_first

        options = self.search
        radii = radius(
            model,
            directions,
            radius_max=options.radius_max,
            resolution=options.resolution,
            error=options.error,
            checks=options.checks,
            **answering,
        )
        from_first(lambda: save_radii_figure(radii, out / FIGURE))
        return f"{radii_table(radii)}\n\n{out / FIGURE}"

    def _certify(self, model: "Model", sigma: float, answering: dict[str, Any]) -> str:
        """Draw the noise, and return what is printed."""
        from jaxscape.landscapes.radius import certify
        from jaxscape.report.radius import certificate_text

        return certificate_text(
            certify(model, sigma, draws=self.certificate.draws, first_seed=self.search.seed, **answering)
        )
