"""`jaxscape score`: judge the answers of a finished scan by further evaluators."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.cli.options import EvaluatorOptions, Group, PlatformOptions, check_texts, select_platform
from jaxscape.cli.scan import measure_lines
from jaxscape.runtime.help import shown
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class Score:
    """Judge the answers of a finished scan by further evaluators. Nothing is generated again.

    Examples:
      # By two other lists of refusal phrases
      jaxscape score runs/smollm2-135m-safe-1d --evaluator wei xstest
      # By a function of your own
      jaxscape score runs/smollm2-135m-safe-1d --evaluator my_file.py:my_score
      # By a language model
      jaxscape score runs/paper-2d --evaluator llama-guard:meta-llama/Llama-Guard-3-8B --gpu
    """

    directory: Annotated[Path, tyro.conf.Positional, shown(metavar="RUN")]
    """The run's directory."""
    evaluators: Group[EvaluatorOptions] = field(default_factory=EvaluatorOptions)
    devices: Group[PlatformOptions] = field(default_factory=PlatformOptions)

    def run(self) -> None:
        check_texts(self.directory, *self.evaluators.names)

        from jaxscape.evaluate.base import uses_model
        from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR, find_evaluators
        from jaxscape.landscapes.landscape import FILE_NAME
        from jaxscape.landscapes.score import score
        from jaxscape.runtime.hardware import enable_compilation_cache

        judges = find_evaluators(self.evaluators.names or DEFAULT_EVALUATOR)
        if any(map(uses_model, judges)):
            select_platform(self.devices.platforms)
            enable_compilation_cache()
        else:
            select_platform(["cpu"])  # phrases need no accelerator, whose memory JAX would take
        directory = run_directory(self.directory)
        landscape = score(directory, judges)
        write_line("\n".join([*measure_lines(landscape.without_controls()), f"{directory / FILE_NAME}"]))
