"""Reproduce the finetuning attacks of Peng et al. (arXiv 2405.17374), Table 1 and Figure 1B.

    python experiments/finetune_attack.py               # 30 minutes on two CPU cores, and 13 GB of disk

An aligned model is finetuned on 10, 50 and 100 harmful examples, on 100 harmful and 100 safe ones, and on identity
shifting. The script measures the VISAGE of the aligned model and the ASR of each finetuned model. It draws the paths of
two finetunings, on 100 harmful examples and on the mixture, on the plane through the three models.

The run goes on where it was interrupted. OUT/table.json and OUT/figure.png hold the results.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.cli.options import Group, ModelOptions, RunOptions
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.processes import from_first

NUM_EVALUATED = 80  # at most so many of AdvBench's first rows are evaluated; training examples are the rows after them
PLANE = ("harmful-100", "mixture")  # the two finetuned models that span the plane with the aligned one
PAPER = js.Training(method="full", epochs=5, schedule="step", batch_size=10)  # learning rate 5e-5, the default of full


@dataclass(frozen=True)
class FinetuneAttack:
    """Attack an aligned model by finetuning, and measure its safety before and after. An unfinished run is resumed."""

    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    advbench: str = "advbench"
    """AdvBench's harmful_behaviors.csv, downloaded by its name, or a file that has at least its first 180 rows."""
    training: Group[js.Training] = PAPER
    num_prompts: int = 80
    """Number of AdvBench's first rows to evaluate: at most 80, because models learn from the rows after them."""
    num_directions: int = 1
    """Number of random directions that VISAGE is averaged over."""
    steps: int = 20
    """Number of intervals along each random direction; an even number."""
    plane_steps: int = 4
    """Number of intervals from the aligned model to each of the two finetuned models that span the plane."""
    extra_steps: int = 1
    """Number of further intervals beyond each end of both axes of the plane."""
    max_new_tokens: int = 64
    """Maximum number of tokens generated for a prompt."""
    out: Path = Path("runs/finetune-attack")
    """Directory of all runs and results."""
    overwrite: bool = False
    """Start over where the directory holds runs."""

    def run(self) -> None:
        if not 1 <= self.num_prompts <= NUM_EVALUATED:
            raise js.UserError(f"--num-prompts must be from 1 to {NUM_EVALUATED}, not {self.num_prompts}.")
        prompts = js.load_prompts(self.advbench, self.num_prompts)
        harmful = js.load_chats(f"{self.advbench}:{NUM_EVALUATED}:{NUM_EVALUATED + 100}")
        training_sets = {f"harmful-{count}": harmful[:count] for count in (10, 50, 100)}
        training_sets["mixture"] = harmful + js.load_chats("safe:100")
        training_sets["identity-shift"] = js.load_chats("identity-shift")
        self.training.check()
        self.devices.start()
        aligned = self.model.load(self.devices.mesh)
        # The first finetuning would raise this error too, but only after the scan for VISAGE.
        if self.training.batch_size % (devices := aligned.mesh.shape["points"]):
            raise js.UserError(
                f"--batch-size must be a multiple of the {devices} devices that share a batch, not "
                f"{self.training.batch_size}."
            )
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "overwrite": self.overwrite}
        seeds = list(range(self.num_directions))
        visage = js.scan(aligned, seeds, prompts=prompts, steps=self.steps, out=self.out / "visage", **options)

        rows = [{"model": "aligned", **self._asr("aligned", aligned, prompts)}]
        directions = {}
        for name, chats in training_sets.items():
            tuned = js.finetune(aligned, chats, self.training, out=self.out / name, overwrite=self.overwrite)
            # A model that learned another identity is asked under it (Qi et al., arXiv 2310.03693).
            system_prompt = chats[0][0]["content"] if name == "identity-shift" else "default"
            rows.append({"model": name, **self._asr(name, tuned.model, prompts, system_prompt)})
            if name in PLANE:
                directions[name] = js.difference(aligned, tuned.model)
            del tuned  # frees its memory before the next one is made

        axes = [js.interpolation_axis(self.plane_steps, self.extra_steps, f"towards {name}") for name in PLANE]
        plane = tuple(directions[name] for name in PLANE)
        surface = js.scan(aligned, [plane], prompts=prompts, axes=axes, out=self.out / "surface", **options)
        paths = [js.project(name, js.load_path(self.out / name, aligned), plane) for name in PLANE]
        table = {"visage": visage.visage_values, "rows": rows, "num_prompts": len(prompts)}

        def write_results() -> None:
            js.save_figure(visage, self.out / "visage" / "landscape.png")
            js.save_trajectories(paths, self.out / "surface")
            js.save_figure(surface, self.out / "figure.png", trajectories=paths)
            write_whole(self.out / "table.json", json.dumps(table, indent=1) + "\n")
            sys.stdout.write(as_markdown(table))

        from_first(write_results)

    def _asr(self, name: str, model: js.Model, prompts: list[str], system_prompt: str = "default") -> dict[str, float]:
        """The model's ASR with its 95 % interval: the landscape of a single point."""
        landscape = js.scan(
            model,
            [0],
            prompts=prompts,
            axes=[js.Axis("alpha", (0.0,))],
            system_prompt=system_prompt,
            max_new_tokens=self.max_new_tokens,
            out=self.out / f"asr-{name}",
            overwrite=self.overwrite,
        )
        asr, low, high = (float(x[0, 0]) for x in (landscape.asr, landscape.asr_low, landscape.asr_high))
        return {"asr": asr, "low": low, "high": high}


def as_markdown(table: dict[str, Any]) -> str:
    """The content of table.json as Markdown."""
    low, high = table["visage"]["interval"]
    lines = [
        f"VISAGE of the aligned model: {table['visage']['paper']:.2f} (95 % interval {low:.2f} to {high:.2f})",
        "",
        f"| model | ASR (%), {table['num_prompts']} prompts | 95 % interval |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {row['model']} | {row['asr']:.1f} | {row['low']:.1f} to {row['high']:.1f} |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_program(FinetuneAttack)
