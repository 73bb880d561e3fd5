"""Finetuning attacks (Table 1 and Figure 1B of the paper): who leaves the safety basin, and who stays in it?

Finetunes an aligned model on 10, 50 and 100 harmful examples, on 100 harmful and 100 safe ones, and on identity
shifting; measures the VISAGE of the aligned model and the ASR of each finetuned one; and draws the paths of the 100
harmful examples and of the mixture on the plane through the three models.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.cli.options import Group, ModelOptions, RunOptions
from jaxscape.directions.path import load_path
from jaxscape.finetuning.training import check_batch
from jaxscape.finetuning.trajectory import project, save_trajectories
from jaxscape.landscapes.store import FIGURE
from jaxscape.report.figures import save_figure
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.processes import from_first

FIRST_FREE = 80  # of AdvBench's rows: those before are evaluated, and never learned
PLANE = ("harmful-100", "mixture")
PAPER = js.Training(method="full", epochs=5, schedule="step", batch_size=10)  # at 5e-5, the default in full


@dataclass(frozen=True)
class FinetuneAttack:
    """Attack an aligned model by finetuning it, and see how far each attack gets. What is finished is kept."""

    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    advbench: str = "advbench"
    """AdvBench's harmful_behaviors.csv, downloaded by its name, or a file that has at least its first 180 rows."""
    training: Group[js.Training] = PAPER
    num_prompts: int = 80
    """How many of AdvBench's first rows are evaluated: at most 80, so that none is learned."""
    num_directions: int = 1
    """Random directions that VISAGE is averaged over."""
    steps: int = 20
    """Intervals along each random direction."""
    plane_steps: int = 4
    """Intervals between the models that span the plane."""
    extra_steps: int = 1
    """Intervals of the plane beyond them."""
    max_new_tokens: int = 64
    """The most tokens generated for a prompt."""
    out: Path = Path("runs/finetune-attack")
    """Directory of all runs and results."""
    overwrite: bool = False
    """Start over where the directory holds runs."""

    def run(self) -> None:
        if not 1 <= self.num_prompts <= FIRST_FREE:
            raise UserError(f"--num-prompts must be from 1 to {FIRST_FREE}, not {self.num_prompts}.")
        prompts = js.load_prompts(self.advbench, self.num_prompts)
        harmful = js.load_chats(f"{self.advbench}:{FIRST_FREE}:{FIRST_FREE + 100}")
        recipes = {f"harmful-{count}": harmful[:count] for count in (10, 50, 100)}
        recipes["mixture"] = harmful + js.load_chats("safe:100")
        recipes["identity-shift"] = js.load_chats("identity-shift")
        self.training.check()
        self.devices.start()
        aligned = self.model.load(self.devices.mesh)
        check_batch(self.training.batch_size, aligned.mesh)
        scan: dict[str, Any] = {"prompts": prompts, "max_new_tokens": self.max_new_tokens, "overwrite": self.overwrite}
        visage = js.scan(aligned, list(range(self.num_directions)), steps=self.steps, out=self.out / "visage", **scan)

        rows = [{"model": "aligned", **self._asr("aligned", aligned, prompts)}]
        ends = {}
        for name, chats in recipes.items():
            tuned = js.finetune(aligned, chats, self.training, out=self.out / name, overwrite=self.overwrite)
            # A model with another identity is asked under it, as Qi et al. do.
            system_prompt = chats[0][0]["content"] if name == "identity-shift" else "default"
            rows.append({"model": name, **self._asr(name, tuned.model, prompts, system_prompt)})
            if name in PLANE:
                ends[name] = js.difference(aligned, tuned.model)
            del tuned

        axes = [js.interpolation_axis(self.plane_steps, self.extra_steps, f"towards {name}") for name in PLANE]
        plane = tuple(ends[name] for name in PLANE)
        surface = js.scan(aligned, [plane], axes=axes, out=self.out / "surface", **scan)
        paths = [project(name, load_path(self.out / name, aligned), plane) for name in PLANE]
        table = {"visage": visage.visage_values, "rows": rows, "num_prompts": len(prompts)}

        def conclude() -> None:
            save_figure(visage, self.out / "visage" / FIGURE)
            save_trajectories(paths, self.out / "surface")
            save_figure(surface, self.out / "figure.png", trajectories=paths)
            write_whole(self.out / "table.json", json.dumps(table, indent=1) + "\n")
            sys.stdout.write(as_text(table))

        from_first(conclude)

    def _asr(self, name: str, model: js.Model, prompts: list[str], system_prompt: str = "default") -> dict[str, float]:
        """The model's ASR with its 95 % interval, from the directory if it has been measured."""
        land = js.scan(
            model,
            [0],
            prompts=prompts,
            axes=[js.Axis("alpha", (0.0,))],
            system_prompt=system_prompt,
            max_new_tokens=self.max_new_tokens,
            out=self.out / f"asr-{name}",
            overwrite=self.overwrite,
        )
        return {"asr": float(land.asr[0, 0]), "low": float(land.asr_low[0, 0]), "high": float(land.asr_high[0, 0])}


def as_text(table: dict[str, Any]) -> str:
    """The table in Markdown."""
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
