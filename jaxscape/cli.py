"""The command line: `jaxscape VERB`, and the programs in `experiments/`, which are single verbs of it."""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import transformers
import tyro

from jaxscape import rundir
from jaxscape.chats import load_chats
from jaxscape.device import keep_compiled_programs
from jaxscape.errors import UserError, is_utf8
from jaxscape.finetune import ADAPTER, FINETUNING, MODEL, finetune, load_path
from jaxscape.forecast import as_json, describe, finetune_step, forecast, make_work, open_slice, shape_on
from jaxscape.landscape import Axis, Landscape, interpolation_axis, symmetric_axes
from jaxscape.models import Model, load_model
from jaxscape.models.shapes import shape_config
from jaxscape.perturb import difference, load_direction
from jaxscape.plan import EngineOptions
from jaxscape.plotting import save_figure
from jaxscape.processes import from_first, is_first, leave, start
from jaxscape.prompts import load_prompts
from jaxscape.scan import Direction, resolve, scan
from jaxscape.sharding import parse_split, split_of
from jaxscape.store import FIGURE, SCAN, export_reference
from jaxscape.training import Training, check_batch
from jaxscape.trajectory import load_trajectories, principal_directions, project, save_trajectories

DEFAULT_MODEL = "smollm2-135m-safe"
DEFAULT_NUM_PROMPTS = 40  # enough for a picture, and minutes on a laptop
EXTRAS = {"tpu": "tpu", "gpu": "cuda"}


@dataclass(frozen=True)
class Machine:
    """Options of every verb that runs a model."""

    model: str = DEFAULT_MODEL
    """A built-in name (smollm2-135m-safe or smollm2-135m), a Hugging Face directory or hub id (of a model or a LoRA
    adapter), or a .gguf file."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations; by default float32 on a CPU and bfloat16 on an accelerator."""
    tpu: bool = False
    """Run on a TPU, or fail."""
    gpu: bool = False
    """Run on a GPU, or fail."""
    cpu: bool = False
    """Run on the CPU."""
    mesh: str | None = None
    """points=N,model=M: N devices share the rows of a batch, and M the weights; by default as few share the weights as
    can hold them, and all others the rows."""
    keep_weights: bool = False
    """Keep the weights in the cache as they lie on the devices, from where the next start reads them faster."""
    distributed: bool = False
    """Join the other processes that the machine knows of, on the hosts of a TPU pod, say. SLURM and Open MPI are found
    without it."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, where nothing else tells; with --num-processes and --process-id."""
    num_processes: int | None = None
    """How many processes compute together."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    overwrite: bool = False
    """Start over in a directory that holds a run."""

    def start(self) -> None:
        """Find the platform that was asked for, and the other processes."""
        names = [name for name in ("tpu", "gpu", "cpu") if getattr(self, name)]
        select_platform(names, lambda: start(self.coordinator, self.num_processes, self.process_id, self.distributed))
        keep_compiled_programs()

    def load(self, on_host: bool | None = None) -> Model:
        """The model, on its mesh; `on_host` as in `load_model`."""
        split = None if self.mesh is None else parse_split(self.mesh)
        return load_model(self.model, self.dtype, on_host, split, self.keep_weights)

    @property
    def short_name(self) -> str:
        return Path(self.model).name.removesuffix(".gguf")


@dataclass(frozen=True)
class Scan(Machine):
    """Measure a model's safety landscape, and keep it in a directory. An unfinished run there is resumed."""

    prompts: str = "harmful"
    """harmful, benign or advbench, or a .csv, .jsonl or .txt file."""
    num_prompts: int | None = None
    """How many of them, from the first on; by default 40, or all if there are fewer."""
    system_prompt: str = "default"
    """default (the chat template's own), none, aoa, llama2, safety, or the text of one."""
    ndim: Literal[1, 2] = 1
    """1 for a line, 2 for a plane."""
    steps: int = 20
    """Intervals along each axis; even, so that the model itself is a point."""
    radius: float | None = None
    """How far the axes go, in multiples of the directions; by default 0.5, and 1.25 in the plane of --trajectory."""
    seed: int = 0
    """Of the random directions, which have the seeds SEED, SEED + 1, and so on; and of sampling."""
    num_directions: int = 1
    """How many random directions (with --ndim 2, pairs of them)."""
    directions: tuple[Path, ...] = ()
    """Safetensors files to take directions from instead of random ones (with --ndim 2, two for each pair)."""
    interpolate_to: tuple[str, ...] = ()
    """Models to go to, instead of along random directions. With --ndim 1 one model; with --ndim 2 one, beside a random
    direction, or two, which span the plane."""
    extra_steps: int = 0
    """Steps of an interpolation beyond both of its ends."""
    max_new_tokens: int = 64
    """The most tokens generated for a prompt."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities reach p."""
    engine: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)
    trajectory: tuple[Path, ...] = ()
    """Directories of finetunings of this model, whose paths are drawn on the landscape (with --ndim 2). Without
    --interpolate-to and --directions, the plane is that of the paths' first two principal components."""
    out: Path | None = None
    """The run's directory; by default runs/MODEL-1d or runs/MODEL-2d."""

    def run(self) -> None:
        out = self.out or Path("runs") / f"{self.short_name}-{self.ndim}d"
        # What can be wrong is looked at before anything slow is done.
        check_texts(self.model, self.prompts, self.system_prompt, out, *self.directions, *self.trajectory)
        self._check_direction_counts()
        axes = self._axes()
        prompts = load_prompts(self.prompts, self.num_prompts)
        if self.num_prompts is None:
            prompts = prompts[:DEFAULT_NUM_PROMPTS]
        self.start()
        from_first(lambda: rundir.check(out, SCAN, self.overwrite))
        model = self.load(on_host=None if self.engine.form == "auto" else self.engine.form == "streamed")
        sets = self._direction_sets(model)
        trajectories = []
        if self.trajectory:
            directions = resolve(sets[0], model)
            trajectories = [project(path.name, load_path(path, model), directions) for path in self.trajectory]
        landscape = scan(
            model,
            sets,
            prompts=prompts,
            axes=axes,
            system_prompt=self.system_prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            options=self.engine,
            out=out,
            overwrite=self.overwrite,
            describe={
                "prompt_source": self.prompts,
                "direction_files": [str(path) for path in self.directions],
                "interpolate_to": list(self.interpolate_to),
            },
        )

        def conclude() -> None:
            if trajectories:
                save_trajectories(trajectories, out)
            save_figure(landscape, out / FIGURE, trajectories=trajectories)
            write_line(summary(landscape, out))

        from_first(conclude)

    def _check_direction_counts(self) -> None:
        if self.num_directions < 1:
            raise UserError(f"The number of directions must be at least 1, not {self.num_directions}.")
        if self.directions and self.num_directions != 1:
            raise UserError("Give either --directions or --num-directions: files are as many as there are.")
        if len(self.directions) % self.ndim:
            raise UserError(f"A 2D landscape takes pairs of directions, but {len(self.directions)} files were given.")
        num_models = len(self.interpolate_to)
        if num_models > self.ndim:
            raise UserError(f"--interpolate-to takes at most {self.ndim} models with --ndim {self.ndim}.")
        if num_models and self.directions:
            raise UserError("Give either --interpolate-to or --directions.")
        if num_models == self.ndim and self.num_directions != 1:
            raise UserError("--num-directions counts random directions, and this interpolation has none.")
        if self.trajectory and (self.ndim != 2 or self.num_directions != 1 or len(self.directions) > 2):
            raise UserError("--trajectory is drawn on one plane: give --ndim 2, and one pair of directions at most.")
        if self.extra_steps and not num_models:
            raise UserError("--extra-steps go beyond the ends of an interpolation; give --interpolate-to too.")

    def _axes(self) -> tuple[Axis, ...]:
        names = ("interpolation", "interpolation 2")[: len(self.interpolate_to)]
        interpolated = tuple(interpolation_axis(self.steps, self.extra_steps, name) for name in names)
        random = self.ndim - len(interpolated)
        radius = (1.25 if self._is_principal else 0.5) if self.radius is None else self.radius
        return interpolated + (symmetric_axes(random, self.steps, radius) if random else ())

    @property
    def _is_principal(self) -> bool:
        return bool(self.trajectory) and not (self.interpolate_to or self.directions)

    def _direction_sets(self, model: Model) -> list[tuple[Direction, ...]]:
        if self._is_principal:
            return [tuple(principal_directions([step for path in self.trajectory for step in load_path(path, model)]))]
        if self.interpolate_to:
            ends = [
                difference(model, load_model(name, self.dtype, split=split_of(model.mesh)))
                for name in self.interpolate_to
            ]
            if len(ends) == self.ndim:
                return [tuple(ends)]
            return [(ends[0], seed) for seed in range(self.seed, self.seed + self.num_directions)]
        directions: list[Direction] = [load_direction(path, model) for path in self.directions]
        directions = directions or list(range(self.seed, self.seed + self.num_directions * self.ndim))
        return [tuple(directions[i : i + self.ndim]) for i in range(0, len(directions), self.ndim)]


@dataclass(frozen=True)
class Finetune(Machine):
    """Finetune a chat model, and keep the result in a directory. An unfinished finetuning there is resumed."""

    data: tuple[str, ...] = ()
    """What to learn, mixed: advbench, safe or identity-shift, or .jsonl or .csv files. SET:N is the first N chats of
    one, and SET:M:N those from number M up to N: advbench:80:180 safe:100 is the paper's mixture."""
    training: tyro.conf.OmitArgPrefixes[Training] = field(default_factory=Training)
    out: Path | None = None
    """The finetuning's directory; by default runs/MODEL-finetuned. It gets adapter/ or model/, which --model takes."""

    def run(self) -> None:
        out = self.out or Path("runs") / f"{self.short_name}-finetuned"
        check_texts(self.model, out, *self.data)
        if not self.data:
            raise UserError("Say what to learn: --data, and a training set or a file.")
        chats = [chat for source in self.data for chat in load_chats(source)]
        self.start()
        from_first(lambda: rundir.check(out, FINETUNING, self.overwrite))
        result = finetune(
            self.load(),
            chats,
            self.training,
            out=out,
            overwrite=self.overwrite,
            describe={"data": list(self.data)},
        )
        if is_first():
            write_line(f"{out / (MODEL if result.adapter is None else ADAPTER)}")


@dataclass(frozen=True)
class PlanRun:
    """Say what a scan would take on TPUs that are not here: memory, time, and which form is better."""

    model: str = "llama-2-7b"
    """A model known by its shapes, a config.json, or a directory that has one. Its weights are not needed."""
    topology: str = "v5e:2x4"
    """The TPU chips: v4, v5e, v5p or v6e, and how they are arranged (three numbers for v4 and v5p)."""
    mesh: str | None = None
    """points=N,model=M; by default as few chips share the weights as can hold them."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations."""
    points: tuple[int, ...] = (21,)
    """Points along each axis: one number for a line, two for a plane."""
    num_directions: int = 1
    """How many random directions (or pairs of them)."""
    prompts: int = 80
    """How many prompts."""
    prompt_tokens: int = 56
    """Tokens of a prompt in the model's chat format."""
    shared_tokens: int = 26
    """Those that all prompts begin with."""
    max_new_tokens: int = 512
    """The most tokens generated for a prompt; every row is taken to reach it."""
    engine: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)
    quick: bool = False
    """Compile only one layer and two, and take every further one for another of what the second adds."""
    finetune: tuple[int, int] | None = None
    """Chats of a batch and tokens of a chat: also compile a step of full finetuning, with --remat."""
    json: bool = False
    """Write JSON instead of a table."""

    def run(self) -> None:
        jax.config.update("jax_platforms", "cpu")  # the compiler needs no device, and none should be taken
        if not 1 <= len(self.points) <= 2:
            raise UserError("Give one number of points for a line, or two for a plane.")
        if self.num_directions < 1:
            raise UserError(f"The number of directions must be at least 1, not {self.num_directions}.")
        config = shape_config(self.model)
        split = None if self.mesh is None else parse_split(self.mesh)
        work = make_work(self.prompts, self.prompt_tokens, self.shared_tokens, self.max_new_tokens, self.points)
        there = open_slice(self.topology)
        if self.finetune is not None:
            check_batch(self.finetune[0], shape_on(config, there, split, self.dtype).mesh)
        found = forecast(
            config,
            work,
            there,
            num_sets=self.num_directions,
            split=split,
            dtype=self.dtype,
            options=self.engine,
            quick=self.quick,
        )
        step = None
        if self.finetune is not None:
            batch, length = self.finetune
            step = finetune_step(
                config,
                there,
                batch_size=batch,
                length=length,
                remat=True,
                split=split,
                dtype=self.dtype,
                quick=self.quick,
            )
        if self.json:
            write_line(json.dumps({"forms": as_json(found), "finetune": None if step is None else as_json([step])[0]}))
        else:
            write_line(describe(found, step, f"{self.model} on {self.topology}, {found[0].mesh}"))


@dataclass(frozen=True)
class Plot:
    """Draw a run's landscape from its saved files, be it finished or not."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The run's directory."""

    def run(self) -> None:
        landscape, trajectories = Landscape.load(self.directory), load_trajectories(self.directory)
        save_figure(landscape, self.directory / FIGURE, trajectories=trajectories)
        write_line(f"{self.directory / FIGURE}")


@dataclass(frozen=True)
class Export:
    """Write a finished run's generations in the format of the paper's code (output.jsonl)."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The run's directory."""

    def run(self) -> None:
        for path in export_reference(self.directory):
            write_line(f"{path}")


VERBS: dict[str, Callable[..., Any]] = {
    "scan": Scan,
    "finetune": Finetune,
    "plan": PlanRun,
    "plot": Plot,
    "export": Export,
}


def check_texts(*texts: str | Path) -> None:
    """Raise a `UserError` if one is no text: a command line may hold any bytes."""
    for text in map(str, texts):
        if not is_utf8(text):
            raise UserError(f"{text!r} is not valid UTF-8.")


def select_platform(names: Sequence[str], join: Callable[[], None] = lambda: None) -> None:
    """Have JAX use the platform that was asked for; without one, JAX chooses. `join` connects this process with others,
    for which JAX must know the platform, and must not have looked for devices yet.

    Raises:
        UserError: several were asked for, or JAX does not find the one.
    """
    if len(names) > 1:
        raise UserError(f"Give only one of {', '.join('--' + name for name in names)}.")
    before = jax.config.values["jax_platforms"]
    for name in names:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    join()
    for name in names:
        found, why = "none", ""
        try:
            found = jax.default_backend()
        except RuntimeError as error:
            why = f" ({' '.join(str(error).split())[:200]})"
            if not jax.distributed.is_initialized():  # the others may be waiting for this one's
                jax.config.update("jax_platforms", before)
                found = jax.default_backend()
        if found != name:
            raise UserError(
                f"JAX finds no {name.upper()} here, but {'nothing' if found == 'none' else f'a {found.upper()}'}{why}; "
                f"on a machine that has one, run pip install 'jaxscape[{EXTRAS.get(name, name)}]', or leave out "
                f"--{name}."
            )


def summary(landscape: Landscape, out: Path) -> str:
    """A few lines that say what was found, and where it is."""
    values = landscape.visage_values or {}
    origin = tuple(axis.values.index(0.0) for axis in landscape.axes)
    centre = np.mean([asr[origin] for asr in landscape.asr])
    low, high = values["interval"]
    lines = [
        f"ASR of the model itself: {centre:.1f} %; over all points: {landscape.asr.mean():.1f} %",
        f"VISAGE: {values['paper']:.2f} (95 % interval {low:.2f} to {high:.2f}); reference code's definition: "
        f"{values['reference']:.2f}",
    ]
    if bad := int(landscape.nonfinite.sum()):
        points = int((landscape.nonfinite > 0).sum())
        lines.append(f"NaN or infinite logits: {bad} completions at {points} points")
    return "\n".join([*lines, f"{out / FIGURE}"])


def write_line(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb of `jaxscape`; see `run_program`."""
    run_program(VERBS, arguments, "jaxscape")


def run_program(program: Any, arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run a program: an options class with a `run` method, or several by name.

    User errors are one line on the standard error stream, and exit code 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    transformers.logging.set_verbosity_error()
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
    if isinstance(program, dict):
        command = tyro.extras.subcommand_cli_from_dict(program, prog=name, args=arguments, config=config)
    else:
        command = tyro.cli(program, prog=name, args=arguments, config=config)
    try:
        command.run()
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            error = UserError(
                "The device's memory is full; lower --slots or --batch-size, choose a --dtype of 16 bits, or a --mesh "
                "that splits the weights over more devices."
            )
        # One line, whatever a library or a file name put into it; nothing that a terminal would act on.
        line = "".join(character if character.isprintable() else "?" for character in " ".join(str(error).split()))
        sys.stderr.write(f"jaxscape: {line}\n")
        leave(2)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("jaxscape: interrupted; the same command, without --overwrite, goes on where it stopped.\n")
        leave(130)
        sys.exit(130)
    except Exception:
        if jax.distributed.is_initialized():  # Python would wait for the others, and they for this process
            traceback.print_exc()
            leave(1)
        raise
