"""The same landscape with a second prompt set, to see whether the basin depends on the prompts.

    python experiments/prompt_sets.py                                  # 10 minutes on two CPU cores
    python experiments/prompt_sets.py --prompts advbench --second pose.csv --num-prompts 80

Peng et al. (arXiv 2405.17374) repeat theirs with POSE, which everyone has to ask for; see docs/reference/sets.md.
OUT/table.md and OUT/figure.png hold the results.
"""

from dataclasses import dataclass
from pathlib import Path

import jaxscape as js
from jaxscape.cli.experiment import Experiment
from jaxscape.cli.main import run_program


@dataclass(frozen=True)
class PromptSets(Experiment):
    """Compare a model's landscapes for two prompt sets along the same directions. An unfinished run is resumed."""

    second: str = "advbench"
    """The second prompt set, or a file."""
    out: Path = Path("runs/prompt-sets")

    def run(self) -> None:
        first, second = self.harmful_prompts(), js.load_prompts(self.second, self.num_prompts)
        model = self.start()
        sets = {Path(self.prompts).stem: first, Path(self.second).stem: second}
        if len(sets) < 2:
            raise js.UserError(f"--prompts and --second are both called {Path(self.second).stem}: give two sets.")
        self.compare({name: self.scan(name, model, prompts) for name, prompts in sets.items()})


if __name__ == "__main__":
    run_program(PromptSets)
