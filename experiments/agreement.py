"""How well evaluators agree with people, on answers that people have labelled.

    python experiments/agreement.py xstest_v2_completions_gpt4.csv xstest_v2_completions_llama2new.csv

The files are XSTest's completions (github.com/paul-rottger/exaggerated-safety, model_completions/), with the columns
`prompt`, `completion` and `final_label`. Partial refusals count as refusals.
"""

import csv
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import jaxscape as js
from jaxscape.cli.main import run_program

PEOPLE = {"1_full_compliance": "complied", "2_full_refusal": "refused", "3_partial_refusal": "partial"}
REFUSALS = ("refused", "partial")


@dataclass(frozen=True)
class Agreement:
    """Print how well evaluators agree with people, as a Markdown table; 95 % intervals are in brackets."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Tables with the columns prompt, completion and final_label."""
    evaluator: tuple[str, ...] = ("keywords", "wei", "jailbreakbench", "xstest")
    """Evaluators, as for `jaxscape scan`."""

    def run(self) -> None:
        evaluators = {name: js.evaluator(name) for name in self.evaluator}
        table = ["| answers | evaluator | agreement | precision | recall |", "| --- | --- | --- | --- | --- |"]
        confusions = []
        for path in self.files:
            rows = labelled(path)
            prompts, answers, people = ([row[i] for row in rows] for i in range(3))
            for name, evaluator in evaluators.items():
                given = [label or "unjudged" for label in evaluator.label(prompts, answers)]
                table.append(f"| {path.stem} | {name} | {' | '.join(map(percent, rates(people, given)))} |")
                if not {"refused", "complied"} >= set(given):
                    confusions += ["", f"{name}, {path.stem}:", "", *confusion(people, given)]
        sys.stdout.write("\n".join([*table, *confusions]) + "\n")


def labelled(path: Path) -> list[tuple[str, str, str]]:
    """The prompts, answers and people's labels in a file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [(row["prompt"], row["completion"], PEOPLE[row["final_label"]]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError) as error:
        raise js.UserError(f"{path} is no table of XSTest's labelled completions ({error!r}).") from error


def rates(people: Sequence[str], given: Sequence[str]) -> list[tuple[int, int]]:
    """Agreement, precision and recall of refusals, each as a numerator and a denominator."""
    counts = Counter((a in REFUSALS, b in REFUSALS) for a, b in zip(people, given, strict=True))
    both, only_people, only_given = counts[True, True], counts[True, False], counts[False, True]
    return [(both + counts[False, False], len(people)), (both, both + only_given), (both, both + only_people)]


def percent(rate: tuple[int, int]) -> str:
    """A rate in percent with its 95 % Wilson interval."""
    part, whole = rate
    if not whole:
        return "none"
    low, high = js.wilson_interval(100 * part / whole, whole)
    return f"{100 * part / whole:.1f} ({low:.1f} to {high:.1f})"


def confusion(people: Sequence[str], given: Sequence[str]) -> list[str]:
    """A table of how often each label of people's (rows) meets each label of the evaluator's (columns)."""
    counts, columns = Counter(zip(people, given, strict=True)), sorted(set(given))
    head = [f"| people | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    return head + [f"| {row} | {' | '.join(str(counts[row, c]) for c in columns)} |" for row in sorted(set(people))]


if __name__ == "__main__":
    run_program(Agreement)
