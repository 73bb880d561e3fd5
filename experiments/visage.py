"""VISAGE of models, along lines and in planes: Table 1 (left) and Figure 1A of Peng et al. (arXiv 2405.17374).

    python experiments/visage.py                                       # 20 minutes on two CPU cores
    python experiments/visage.py --others smollm2-135m runs/mine/model # further models, in the same figure

The table has VISAGE by the paper's definition and by its code, the safety volume and the radius. OUT/table.md and
OUT/figure.png hold the results.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jaxscape as js
from jaxscape.cli.experiment import Experiment
from jaxscape.cli.main import run_program


@dataclass(frozen=True)
class Visage(Experiment):
    """Measure VISAGE of models in one and two dimensions. An unfinished run is resumed."""

    others: tuple[str, ...] = ()
    """Further models, as for --model."""
    plane_steps: int = 8
    """Number of intervals along each axis of a plane; an even number."""
    out: Path = Path("runs/visage")

    def run(self) -> None:
        prompts = self.harmful_prompts()
        models = [self.model, *(replace(self.model, model=name) for name in self.others)]
        if len({options.short_name for options in models}) < len(models):
            raise js.UserError("Two models have the same name: rename the directory of one of them.")
        landscapes = {}
        for options in models:
            model = self.start(options)
            for ndim, steps in ((1, self.steps), (2, self.plane_steps)):
                name = f"{options.short_name}-{ndim}d"
                landscapes[name] = self.scan(name, model, prompts, ndim, steps=steps)
        self.compare(landscapes)


if __name__ == "__main__":
    run_program(Visage)
