"""What the verbs share: groups of options, and the start of a run.

Importing this module does not import JAX, so that `--help` is quick.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from jaxscape.runtime.errors import UserError, is_utf8, reason
from jaxscape.runtime.help import shown
from jaxscape.runtime.reporting import Target

if TYPE_CHECKING:
    from jaxscape.models.model import Model

DEFAULT_MODEL = "smollm2-135m-safe"
DEFAULT_NUM_PROMPTS = 40  # enough for a picture, and minutes on a laptop
EXTRAS = {"tpu": "tpu", "gpu": "cuda"}  # what to write in pip install 'jaxscape[EXTRA]' for each platform

Dtype = Literal["float32", "bfloat16", "float16"]

T = TypeVar("T")
Group = tyro.conf.OmitArgPrefixes[T]
"""Options under a heading of their own in `--help`, without a prefix in their names."""


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    model: Annotated[str, shown(metavar="MODEL")] = DEFAULT_MODEL
    """A built-in name (smollm2-135m-safe or smollm2-135m), a Hugging Face directory or hub id (of a model or of a LoRA
    adapter), or a .gguf file."""
    dtype: Annotated[Dtype | None, shown(default="float32 on a CPU, bfloat16 on an accelerator")] = None
    """Dtype of weights and activations."""
    base: Annotated[str | None, shown("the one that the adapter names", "MODEL")] = None
    """The base model of a LoRA adapter, for example where it has moved."""
    keep_weights: bool = False
    """Keep the loaded weights in the cache on disk, in this dtype, which makes the next start faster."""

    def load(self, mesh: str | None, on_host: bool | None = None, weights: bool = True) -> "Model":
        """Load the model that these options name.

        Arguments:
            mesh: the value of --mesh, or None for the default mesh.
            on_host, weights: see `jaxscape.load_model`.
        """
        from jaxscape.models.model import load_model
        from jaxscape.runtime.sharding import parse_mesh_shape

        mesh_shape = None if mesh is None else parse_mesh_shape(mesh)
        return load_model(
            self.model, self.dtype, on_host, mesh_shape, self.keep_weights, base=self.base, weights=weights
        )

    @property
    def described(self) -> dict[str, str]:
        """What the options add to a run's `config.json`."""
        return {} if self.base is None else {"base": self.base}

    @property
    def short_name(self) -> str:
        """The last part of the model's path or hub id, for the name of a run's directory."""
        if Path(self.model).exists():
            path = Path(os.path.abspath(self.model))  # `.` and `..` have no name of their own
            name = path.stem if path.suffix.lower() == ".gguf" else path.name
        else:
            repository, at, revision = self.model.partition("@")
            name = Path(repository).name + at + revision.replace("/", "-")
        return name or "model"


@dataclass(frozen=True)
class EvaluatorOptions:
    """What judges the answers."""

    evaluator: Annotated[tuple[str, ...], shown("keywords", "NAME ...")] = ()
    """Evaluators: keywords (the paper's 29 refusal keywords), wei, jailbreakbench, xstest, coherence or coherence:MODEL
    (which answers make no sense), judge (a small language model that comes with jaxscape), keywords:FILE, FILE.py:NAME
    for a function or an evaluator of your own, or an LLM judge: llama-guard:MODEL, qwen3guard:MODEL,
    qwen3guard-harm:MODEL or llm:FILE. The first one decides the ASR."""
    keywords: Annotated[Path | None, shown("none", "FILE")] = None
    """A file with a refusal phrase in each line; the same as --evaluator keywords:FILE, after the other evaluators."""

    @property
    def names(self) -> tuple[str, ...]:
        """The evaluators' names, which `jaxscape.evaluator` knows; none if none was chosen."""
        return (*self.evaluator, *(() if self.keywords is None else (f"keywords:{self.keywords}",)))


@dataclass(frozen=True)
class ScanEvaluatorOptions(EvaluatorOptions):
    """What judges the answers."""

    no_shares: bool = False
    """Leave out the shares of answers that refuse, comply and make no sense, which the model that is measured judges
    after all points are decoded. `jaxscape score RUN --evaluator coherence` adds them later."""
    abandon_incoherent: bool = False
    """End each answer whose beginning makes no sense to the model that is measured. This is faster where answers are
    noise. Such an answer counts as incoherent; the ASR and VISAGE are those of cut texts."""


@dataclass(frozen=True)
class PlatformOptions:
    """The devices."""

    tpu: bool = False
    """Run on a TPU, or stop with an error if there is none."""
    gpu: bool = False
    """Run on a GPU, or stop with an error if there is none."""
    cpu: bool = False
    """Run on the CPU."""

    @property
    def platforms(self) -> list[str]:
        """The platforms that were chosen; none if JAX is to choose."""
        return [name for name in ("tpu", "gpu", "cpu") if getattr(self, name)]


@dataclass(frozen=True)
class RunOptions(PlatformOptions):
    """The devices and processes of a run."""

    mesh: Annotated[str | None, shown("weights over the fewest devices that can hold them", "points=N,model=M")] = None
    """Shard the rows of a batch over N devices and the weights over M."""
    distributed: bool = False
    """Let JAX find the other processes of this run and join them, as on a TPU pod. Those that SLURM or Open MPI started
    are joined without this option."""
    coordinator: Annotated[str | None, shown("none", "HOST:PORT")] = None
    """Address of the first process, when the processes are started by hand; needs --num-processes and
    --process-id."""
    num_processes: Annotated[int | None, shown("detected", "N")] = None
    """Number of processes of this run."""
    process_id: Annotated[int | None, shown("detected", "N")] = None
    """Number of this process, counted from 0."""

    def start(self, keep_compiled: bool = True) -> None:
        """Select JAX's platform, and join the other processes of the run if there are any.

        To be called before JAX is used.

        Arguments:
            keep_compiled: whether compiled programs are kept on disk.
        """
        from jaxscape.runtime.hardware import enable_compilation_cache
        from jaxscape.runtime.processes import join_processes

        processes = (self.coordinator, self.num_processes, self.process_id, self.distributed)
        select_platform(self.platforms, lambda: join_processes(*processes))
        if keep_compiled:
            enable_compilation_cache()


@dataclass(frozen=True)
class OutputOptions:
    """The run's directory."""

    out: Annotated[Path | None, shown("runs/MODEL-1d, -2d or -points", "DIRECTORY")] = None
    """The run's directory, or a URL such as s3://BUCKET/RUN. An unfinished run there is resumed."""
    overwrite: bool = False
    """Start over if the directory holds a run."""
    report_to: Target = "none"
    """Also report the numbers of each point, and no texts, to wandb or tensorboard."""
    dry_run: bool = False
    """Write nothing: print the plan, and the first prompt as the model gets it, with its token ids."""


def check_texts(*texts: str | Path) -> None:
    """Raise a `UserError` if an argument is not valid text: a command line may contain any bytes."""
    for text in map(str, texts):
        if not is_utf8(text):
            encoding = sys.getfilesystemencoding()
            advice = "write it in UTF-8" if encoding == "utf-8" else "set PYTHONUTF8=1"
            raise UserError(f"The argument {text!r} is not valid {encoding.upper()}: {advice}.")


def check_working_directory() -> None:
    """Raise a `UserError` if the current directory has been deleted, since nothing can be written to it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("The current directory has been deleted: change to another one.") from error


def select_platform(names: Sequence[str], join: Callable[[], None] = lambda: None) -> None:
    """Make JAX use a platform, and connect this process with the others of its run.

    Arguments:
        names: the platform as a list of one name, such as `gpu`; an empty list lets JAX choose.
        join: connects this process with the others. It is called when JAX knows the platform and has not looked for
            devices yet.

    Raises:
        UserError: there are several names, or JAX finds no device of this platform.
    """
    import jax

    from jaxscape.runtime.hardware import skip_absent_tpu

    if len(names) > 1:
        raise UserError(f"Give only one of {', '.join('--' + name for name in names)}.")
    skip_absent_tpu()
    before = jax.config.values["jax_platforms"]
    for name in names:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    join()
    if not names:
        _check_default_platform()
    for name in names:
        found, why = "none", ""
        try:
            found = jax.default_backend()
        except (RuntimeError, AssertionError) as error:  # JAX asserts that a machine without a GPU has another device
            why = f" ({reason(error)})" if str(error) else ""
            if not jax.distributed.is_initialized():  # looking for another platform could keep other processes waiting
                jax.config.update("jax_platforms", before)
                found = jax.default_backend()
        if found != name:
            raise UserError(
                f"JAX finds no {name.upper()} here, but {'nothing' if found == 'none' else f'a {found.upper()}'}{why}: "
                f"on a machine that has one, run pip install 'jaxscape[{EXTRAS.get(name, name)}]', or leave out "
                f"--{name}."
            )


def _check_default_platform() -> None:
    """Raise a `UserError` if JAX cannot start the platform that the environment chooses."""
    import jax

    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        raise UserError(
            f"JAX cannot start on this machine with JAX_PLATFORMS={platforms or ''} ({reason(error)}): unset "
            f"JAX_PLATFORMS, or give --cpu."
        ) from error
