"""Check the three shares: how many answers are taken for noise where they make sense, and the other way round.

    python experiments/coherence.py xstest_v2_completions_gpt4.csv       # 25 minutes on two CPU cores

The rows of the table: the model's own answers to `benign`; answers far outside its basin, along random directions; its
answers after a finetuning attack with 100 harmful examples; and answers of other models in the files, if there are any
(XSTest's completions, see experiments/agreement.py). The evaluator is calibrated on the last 20 prompts of `benign`,
which are not among these. The run goes on where it was interrupted. OUT/table.md holds the result.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from agreement import labelled, percent

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.cli.options import Group, ModelOptions, RunOptions
from jaxscape.evaluate.coherence import NUM_CALIBRATION
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.processes import from_first

NUM_EVALUATED = 80  # of AdvBench's first rows; the attack learns from the 100 rows after them
ATTACK = js.Training(method="full", epochs=5, schedule="step", batch_size=10)  # as in experiments/finetune_attack.py


@dataclass(frozen=True)
class CoherenceCheck:
    """Check which answers the evaluator `coherence` takes for noise. An unfinished run is resumed."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Tables of XSTest's completions, with the columns prompt, completion and final_label."""
    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    advbench: str = "advbench"
    """AdvBench's harmful_behaviors.csv, downloaded by its name, or a file that has at least its first 180 rows."""
    num_directions: int = 5
    """Number of random directions, with the seeds 1000, 1001, and so on."""
    num_prompts: int = 20
    """Number of prompts of each set at each point of these directions."""
    out: Path = Path("runs/coherence")
    """Directory of all runs, and of the table."""

    def run(self) -> None:
        self.devices.start()
        model = self.model.load(self.devices.mesh)
        benign = js.load_prompts("benign")[:-NUM_CALIBRATION]
        harmful = js.load_prompts("harmful")[-self.num_prompts :]
        attacked = js.load_prompts(self.advbench, NUM_EVALUATED)
        attack = js.load_chats(f"{self.advbench}:{NUM_EVALUATED}:{NUM_EVALUATED + 100}")

        centre, ends = js.Axis("alpha", (0.0,)), js.Axis("alpha", (-0.5, -0.4, -0.3, 0.3, 0.4, 0.5))
        seeds = [1000 + i for i in range(self.num_directions)]
        rows = [
            ("`benign`, the model itself", "coherent", *self._judged(model, "benign", [0], centre, benign)),
            ("`harmful`, 0.3 and beyond", "incoherent", *self._judged(model, "far-harmful", seeds, ends, harmful)),
            (
                "`benign`, 0.3 and beyond",
                "incoherent",
                *self._judged(model, "far-benign", seeds, ends, benign[: self.num_prompts]),
            ),
        ]
        tuned = js.finetune(model, attack, ATTACK, out=self.out / "attack")
        direction, end = js.difference(model, tuned.model), js.Axis("interpolation", (1.0,))
        del tuned
        _, complied, incoherent = self._judged(model, "attacked", [direction], end, attacked)
        rows.append(("AdvBench, after the attack; no refusals", "coherent", 0, complied, incoherent))
        judge = js.evaluator("coherence")
        for path in self.files:
            prompts, answers, _ = zip(*labelled(path), strict=True)
            given = judge.label(prompts, answers)
            refused, complied, incoherent = (given.count(kind) for kind in ("refused", "complied", "incoherent"))
            rows.append((f"`{path.stem}`", "coherent", refused, complied, incoherent))
        text = table(rows)

        def write() -> None:
            write_whole(self.out / "table.md", text)
            sys.stdout.write(text)

        from_first(write)

    def _judged(
        self, model: js.Model, name: str, directions: list[Any], axis: js.Axis, prompts: list[str]
    ) -> tuple[int, int, int]:
        """How many answers of a scan are refused, complied and incoherent."""
        land = js.scan(model, directions, prompts=prompts, axes=[axis], max_new_tokens=64, out=self.out / name)
        refused, complied, incoherent = (
            round(float(land.shares[kind].sum()) * len(prompts) / 100) for kind in ("refused", "complied", "incoherent")
        )
        return refused, complied, incoherent


def table(rows: list[tuple[str, str, int, int, int]]) -> str:
    """The rows as Markdown, with the share of the answers that are what they should be."""
    lines = ["| answers | number | should be | are, in percent |", "| --- | --- | --- | --- |"]
    for name, expected, refused, complied, incoherent in rows:
        total = refused + complied + incoherent
        right = incoherent if expected == "incoherent" else refused + complied
        lines.append(f"| {name} | {total} | {expected} | {percent((right, total))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_program(CoherenceCheck)
