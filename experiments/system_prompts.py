"""Landscapes under system prompts, along the same directions: Table 2 and Figure 3 of Peng et al. (arXiv 2405.17374).

    python experiments/system_prompts.py                               # 25 minutes on two CPU cores

The system prompts are the chat template's own, an empty one, the role play of an Absolutely Obedient Agent, that of
Llama-2-chat, and one that is written for safety. OUT/table.md and OUT/figure.png hold the results.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from jaxscape.cli.experiment import Experiment
from jaxscape.cli.main import run_program


@dataclass(frozen=True)
class SystemPrompts(Experiment):
    """Compare a model's landscapes under several system prompts. An unfinished run is resumed."""

    system_prompts: tuple[str, ...] = ("default", "none", "aoa", "llama2", "safety")
    """System prompts, as for `jaxscape scan`. Each run is kept in a directory with its name."""
    out: Path = Path("runs/system-prompts")

    def run(self) -> None:
        prompts, model = self.harmful_prompts(), self.start()
        names = {re.sub(r"\W+", "-", text).strip("-")[:40]: text for text in self.system_prompts}
        self.compare({name: self.scan(name, model, prompts, system_prompt=text) for name, text in names.items()})


if __name__ == "__main__":
    run_program(SystemPrompts)
