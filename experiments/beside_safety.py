"""Safety beside capability, perplexity or damage, along the same directions (Peng et al., arXiv 2405.17374).

    python experiments/beside_safety.py capability                     # 8 minutes on two CPU cores
    python experiments/beside_safety.py perplexity                     # 12 more minutes: the safety is there
    python experiments/beside_safety.py damage                         # and over-refusal; 5 more minutes
    python experiments/beside_safety.py capability --questions abstract_algebra_test.csv

Capability is the accuracy on questions of multiple choice: files in MMLU's or ARC's format, or without one, the easy
questions beside this program, written for this project. Perplexity is that of MT-Bench's questions. Damage is how far
the first token's distribution on harmless prompts has moved from the unperturbed model's (Kullback-Leibler divergence);
over-refusal is how many of these prompts are refused. OUT/WHAT/table.md and OUT/WHAT/figure.png hold the results.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import jaxscape as js
from jaxscape.cli.experiment import Experiment
from jaxscape.cli.main import run_program


@dataclass(frozen=True)
class BesideSafety(Experiment):
    """Measure what else changes where a model loses its safety. An unfinished run is resumed."""

    what: Annotated[Literal["capability", "perplexity", "damage"], tyro.conf.Positional] = "capability"
    """What is measured beside safety."""
    questions: Path = Path(__file__).parent / "questions.jsonl"
    """Questions of multiple choice: a file in MMLU's or ARC's format, or a directory of such files."""
    texts: str = "mt-bench"
    """The prompt set or file whose perplexity is measured."""
    harmless: str = "benign"
    """The harmless prompts, of which --num-prompts are taken."""
    out: Path = Path("runs/beside-safety")

    def run(self) -> None:
        prompts, harmless = self.harmful_prompts(), js.load_prompts(self.harmless, self.num_prompts)
        if self.what == "perplexity":
            js.load_prompts(self.texts)  # what is missing is an error now, not after the scan
        model = self.start()
        safety = self.scan("safety", model, prompts)
        panels = {"attack success (%)": {"attack success": mean(safety.asr_low, safety.asr, safety.asr_high)}}
        if self.what == "damage":
            asked = self.scan("harmless", model, harmless)
            refused = mean(100 - asked.asr_high, 100 - asked.asr, 100 - asked.asr_low)
            panels["refusals of harmless prompts (%)"] = {"refusals": refused}
        measures = {"capability": f"multiple-choice:{self.questions}", "perplexity": f"perplexity:{self.texts}"}
        name, out = measures.get(self.what, self.what), self.out / self.what
        options: dict[str, Any] = {"steps": self.steps, "radius": self.radius, "overwrite": self.overwrite}
        measured = js.measure(model, self.random_directions(), [name], harmless=harmless, out=out, **options)
        values = measured.measures[name]
        panels[measured.labels[name]] = {self.what: mean(values["low"], values["value"], values["high"])}
        replace(self, out=out).write_curves(safety.axes[0].values, "distance along the direction", lambda: panels)


def mean(*values: np.ndarray) -> np.ndarray:
    """The lower ends, values and upper ends, averaged over directions."""
    return np.stack(values).mean(axis=1)


if __name__ == "__main__":
    run_program(BesideSafety)
