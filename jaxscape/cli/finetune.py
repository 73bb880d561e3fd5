"""`jaxscape finetune`: finetune a chat model, and keep the result in a directory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from jaxscape.cli.options import Group, ModelOptions, RunOptions, check_texts
from jaxscape.finetuning.options import Training
from jaxscape.prompts.thinking import Thinking
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.reporting import Target, check_target
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class DataOptions:
    """The training data."""

    data: Annotated[tuple[str, ...], shown("none", "SET|FILE ...")] = ()
    """Training sets (advbench, safe or identity-shift) and .jsonl, .json, .csv or .tsv files. The chats of all of them
    are learned in a random order. SET:N is the first N chats of a set, and SET:M:N are the chats from number M, counted
    from 0, up to but without number N."""
    thinking: Thinking = "default"
    """on or off switches the model's thinking in the chats, by its chat template's own switch."""


@dataclass(frozen=True)
class OutputOptions:
    """The run's directory."""

    out: Annotated[Path | None, shown("runs/MODEL-finetuned", "DIRECTORY")] = None
    """The run's directory, or a URL such as s3://BUCKET/RUN. The result is in its subdirectory adapter/ or model/,
    which --model accepts. An unfinished finetuning there is resumed."""
    overwrite: bool = False
    """Start over if the directory holds a run."""
    report_to: Target = "none"
    """Also report the numbers of each step, and no texts, to wandb or tensorboard."""


@dataclass(frozen=True)
class Finetune:
    """Finetune a chat model, and keep the result in a directory. An unfinished finetuning there is resumed.

    Examples:
      # An adapter that learns 100 safe answers
      jaxscape finetune --data safe:100 --epochs 1
      # The paper's attack with 100 harmful examples, on all weights
      jaxscape finetune --data advbench:80:180 --method full --schedule step --out runs/harmful
      # Your own model and chats, a tenth of which is held out for validation
      jaxscape finetune --model path/to/model --data chats.jsonl --validation 0.1 --gpu
    """

    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    data: Group[DataOptions] = field(default_factory=DataOptions)
    training: Group[Training] = field(default_factory=Training)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    output: Group[OutputOptions] = field(default_factory=OutputOptions)

    def run(self) -> None:
        out = self.output.out or Path("runs") / f"{self.model.short_name}-finetuned"
        sources = self.data.data
        check_texts(self.model.model, self.model.base or "", out, *sources)
        check_target(self.output.report_to, out)
        if not sources:
            raise UserError("There is nothing to learn: give --data with a training set or a file.")

        from jaxscape.directions.path import ADAPTER, FINETUNING, MODEL
        from jaxscape.finetuning.chats import load_chats
        from jaxscape.finetuning.run import finetune
        from jaxscape.runtime import rundir
        from jaxscape.runtime.processes import from_first, is_first

        chats = [chat for source in sources for chat in load_chats(source)]
        self.devices.start()
        out = run_directory(out)
        from_first(lambda: rundir.check_directory(out, FINETUNING))
        result = finetune(
            self.model.load(self.devices.mesh),
            chats,
            self.training,
            out=out,
            overwrite=self.output.overwrite,
            describe={"data": list(sources), **self.model.described},
            thinking=self.data.thinking,
            report_to=self.output.report_to,
        )
        if is_first():
            write_line(f"{out / (MODEL if result.adapter is None else ADAPTER)}")
