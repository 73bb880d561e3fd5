"""The command line: `jaxscape VERB`, and the programs in `experiments/`."""

import importlib
import inspect
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jaxscape
from jaxscape.cli.arguments import parse
from jaxscape.cli.options import check_working_directory
from jaxscape.runtime import preemption, remote
from jaxscape.runtime.errors import UserError, unknown_name
from jaxscape.runtime.streams import BROKEN_PIPE, safe_streams, write_line
from jaxscape.runtime.texts import printable

MEASURE, CHANGE, READ, PREPARE = "Measure a model", "Change a model", "Read results", "Before a run"


class Verb(NamedTuple):
    """A verb: the class of its options in `jaxscape.cli.MODULE`, which is imported only when the verb is used.

    Attributes:
        group: the heading under which `jaxscape --help` lists the verb.
    """

    module: str
    options: str
    description: str
    group: str = READ


VERBS = {
    "scan": Verb("scan", "Scan", "Measure a model's safety landscape, and keep it in a directory.", MEASURE),
    "measure": Verb(
        "measure", "Measure", "Measure weights along the directions of a landscape without decoding answers.", MEASURE
    ),
    "radius": Verb(
        "radius", "Radius", "Measure how far the weights can move in many directions, with a confidence.", MEASURE
    ),
    "sweep": Verb(
        "sweep", "Sweep", "Run the scans of a matrix of models, directions and other options of scan.", MEASURE
    ),
    "merge": Verb("merge", "Merge", "Make the whole run of the shards of a scan.", MEASURE),
    "finetune": Verb("finetune", "Finetune", "Finetune a chat model, and keep the result in a directory.", CHANGE),
    "check": Verb(
        "check", "Check", "Say what a model is and how it answers, and compare it with transformers.", PREPARE
    ),
    "plan": Verb(
        "plan", "Plan", "Forecast a scan on TPUs that are not here: its memory, its time, the faster form.", PREPARE
    ),
    "doctor": Verb("doctor", "Doctor", "Say what is installed, which devices are found, and what is missing.", PREPARE),
    "completion": Verb("completion", "Completion", "Print a script with which a shell completes commands.", PREPARE),
    "runs": Verb("runs", "Runs", "List the runs in a directory, with their states and numbers, the newest first."),
    "score": Verb("score", "Score", "Judge the answers of a finished scan by further evaluators."),
    "plot": Verb("plot", "Plot", "Draw the figure of a run again, finished or not."),
    "compare": Verb(
        "compare", "Compare", "Compare the landscapes of several runs, and say which differences exceed the noise."
    ),
    "report": Verb("report", "Report", "Show runs in one HTML file, in which a click on a point reads its answers."),
    "export": Verb("export", "Export", "Write a finished scan in the format of another tool."),
}

MIN_COLUMNS = 40  # of `--help`; in a terminal of one column, tyro never ends


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb of `jaxscape`; see `run_program`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        with safe_streams():
            write_line(usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        with safe_streams():
            write_line(f"jaxscape {jaxscape.__version__}")
        sys.exit(0)
    if arguments[0] not in VERBS:
        with safe_streams():
            _fail(str(unknown_name("verb", arguments[0], VERBS)))
    verb = VERBS[arguments[0]]
    options = getattr(importlib.import_module(f"jaxscape.cli.{verb.module}"), verb.options)
    run_program(options, arguments[1:], f"jaxscape {arguments[0]}")


def usage() -> str:
    """What `jaxscape --help` prints."""
    groups = dict.fromkeys(verb.group for verb in VERBS.values())
    lists = [
        "\n".join(
            [f"{group}:", *(f"  {name:12}{verb.description}" for name, verb in VERBS.items() if verb.group == group)]
        )
        for group in groups
    ]
    return (
        "Safety landscapes of large language models: how far can the weights move before the model stops refusing?\n\n"
        "Examples:\n"
        "  # A first landscape of the model that comes with jaxscape, in minutes on a laptop\n"
        "  jaxscape scan --num-prompts 20 --steps 10\n"
        "  # A plane through the weights of your own model, with the paper's prompts, on a GPU\n"
        "  jaxscape scan --model path/to/model --prompts advbench --num-prompts 80 --ndim 2 --gpu\n"
        "  # What has been measured so far\n"
        "  jaxscape runs\n\n" + "\n\n".join(lists) + "\n\n"
        "jaxscape VERB --help explains a verb and its options, with examples."
    )


def run_program(program: Any, arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Parse the options of a program and run it.

    A user error is one line on the standard error stream and exit code 2; an interruption is exit code 130, and SIGTERM
    is `jaxscape.runtime.preemption.EXIT_CODE`. When no one reads the output any more, the program ends as
    `jaxscape.runtime.streams.safe_streams` says.

    Arguments:
        program: a dataclass of options with a `run` method.
        name: what the program is called in its help.
    """
    with safe_streams():
        _run(program, arguments, name)


def _run(program: Any, arguments: Sequence[str] | None, name: str | None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if "transformers" in sys.modules:
        import transformers

        transformers.logging.set_verbosity_error()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is first imported
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    description = inspect.getdoc(program)  # with its examples, which tyro would leave out
    try:
        command = parse(program, arguments, name or Path(sys.argv[0]).name, description)
        check_working_directory()
        with preemption.preemptible():
            command.run()
    except BrokenPipeError:  # no one reads the progress any more
        _exit(BROKEN_PIPE)
    except KeyboardInterrupt:
        sys.stderr.write("jaxscape: interrupted; the same command, without --overwrite, resumes the run.\n")
        _exit(130)
    except preemption.Preempted as stop:
        sys.stderr.write(
            "jaxscape: ended by SIGTERM, with what is finished on disk; the same command, without --overwrite, resumes "
            "the run.\n"
        )
        if stop.is_agreed:  # the other processes end now too, and JAX lets each of them
            sys.exit(preemption.EXIT_CODE)
        _exit(preemption.EXIT_CODE)
    except Exception as error:
        message = user_message(error)
        if message is not None:
            _fail(message)

        import jax

        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # perhaps another process has died: JAX then ends this one, and its supervisor says so
        if jax.distributed.is_initialized():  # Python would wait for the other processes, and they for this one
            traceback.print_exc()
            _exit(1)
        raise


def user_message(error: Exception) -> str | None:
    """What is to be said to the user about an error; None if it is one of jaxscape."""
    if isinstance(error, UserError | OSError):
        return str(error)
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "The device's memory is full: lower --slots or --batch-size, choose a --dtype of 16 bits, or a --mesh that "
            "shards the weights over more devices."
        )
    return None


def _fail(message: str) -> NoReturn:
    """Report a user error and end the process."""
    # One line without control characters, whatever a library or a file name put into the message.
    line = printable(" ".join(remote.shown(message).split()))
    sys.stderr.write(f"jaxscape: {line}\n")
    _exit(2)


def _exit(code: int) -> NoReturn:
    if "jax" in sys.modules:  # otherwise no other process can have been joined
        from jaxscape.runtime.processes import exit_if_joined

        exit_if_joined(code)
    sys.exit(code)
