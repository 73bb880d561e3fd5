"""Reproduce the finetuning attacks of Peng et al. (arXiv 2405.17374), Table 1 and Figure 1B.

    python experiments/finetune_attack.py               # 30 minutes on two CPU cores, and 13 GB of disk

An aligned model is finetuned on 10, 50 and 100 harmful examples, on 100 harmful and 100 safe ones, and on identity
shifting. The script measures the VISAGE of the aligned model and the ASR of each finetuned model. It draws the paths of
two finetunings, on 100 harmful examples and on the mixture, on the plane through the three models.

The run goes on where it was interrupted. OUT/table.md and OUT/figure.png hold the results.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxscape as js
from jaxscape.cli.experiment import Experiment
from jaxscape.cli.main import run_program
from jaxscape.cli.options import Group
from jaxscape.report.tables import landscape_table
from jaxscape.runtime.processes import from_first

NUM_EVALUATED = 80  # at most so many of AdvBench's first rows are evaluated; training examples are the rows after them
PLANE = ("harmful-100", "mixture")  # the two finetuned models that span the plane with the aligned one
PAPER = js.Training(method="full", epochs=5, schedule="step", batch_size=10)  # learning rate 5e-5, the default of full


@dataclass(frozen=True)
class FinetuneAttack(Experiment):
    """Attack an aligned model by finetuning, and measure its safety before and after. An unfinished run is resumed."""

    training: Group[js.Training] = PAPER
    prompts: str = "advbench"
    """AdvBench, or a file that has at least its first 180 rows."""
    num_prompts: int = NUM_EVALUATED
    """Number of AdvBench's first rows to evaluate: at most 80, because models learn from the rows after them."""
    plane_steps: int = 4
    """Number of intervals from the aligned model to each of the two finetuned models that span the plane."""
    extra_steps: int = 1
    """Number of further intervals beyond each end of both axes of the plane."""
    out: Path = Path("runs/finetune-attack")

    def run(self) -> None:
        if not 1 <= self.num_prompts <= NUM_EVALUATED:
            raise js.UserError(f"--num-prompts must be from 1 to {NUM_EVALUATED}, not {self.num_prompts}.")
        prompts = self.harmful_prompts()
        harmful = js.load_chats(f"{self.prompts}:{NUM_EVALUATED}:{NUM_EVALUATED + 100}")
        training_sets = {f"harmful-{count}": harmful[:count] for count in (10, 50, 100)}
        training_sets["mixture"] = harmful + js.load_chats("safe:100")
        training_sets["identity-shift"] = js.load_chats("identity-shift")
        self.training.check()
        aligned = self.start()
        # The first finetuning would raise this error too, but only after the scan for VISAGE.
        if self.training.batch_size % (devices := aligned.mesh.shape["points"]):
            raise js.UserError(
                f"--batch-size must be a multiple of the {devices} devices that share a batch, not "
                f"{self.training.batch_size}."
            )
        landscapes = {"aligned": self.scan("visage", aligned, prompts)}
        directions = {}
        for name, chats in training_sets.items():
            tuned = js.finetune(aligned, chats, self.training, out=self.out / name, overwrite=self.overwrite)
            # A model that learned another identity is asked under it (Qi et al., arXiv 2310.03693).
            system_prompt = chats[0][0]["content"] if name == "identity-shift" else "default"
            point: dict[str, Any] = {
                "axes": [js.Axis("alpha", (0.0,))],
                "directions": [0],
                "system_prompt": system_prompt,
            }
            landscapes[name] = self.scan(f"asr-{name}", tuned.model, prompts, **point)
            if name in PLANE:
                directions[name] = js.difference(aligned, tuned.model)
            del tuned  # frees its memory before the next one is made

        axes = [js.interpolation_axis(self.plane_steps, self.extra_steps, f"towards {name}") for name in PLANE]
        plane = tuple(directions[name] for name in PLANE)
        surface = self.scan("surface", aligned, prompts, directions=[plane], axes=axes)
        paths = [js.project(name, js.load_path(self.out / name, aligned), plane) for name in PLANE]
        from_first(lambda: js.save_trajectories(paths, self.out / "surface"))
        self.write_results(lambda: (landscape_table(landscapes), js.plot_landscape(surface, paths)))


if __name__ == "__main__":
    run_program(FinetuneAttack)
