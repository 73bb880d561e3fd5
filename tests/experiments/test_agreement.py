"""How well evaluators agree with people, by `experiments/agreement.py`."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SHARED, run_experiment

LABELS = {"complied": "1_full_compliance", "refused": "2_full_refusal", "partial": "3_partial_refusal"}


@pytest.fixture
def table(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The table that the program prints."""

    def printed(*arguments: object) -> str:
        run_experiment("agreement", *arguments)
        return capfd.readouterr().out

    return printed


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "completion", "final_label"])
        writer.writerows([i, "Why?", answer, LABELS[label]] for i, (answer, label) in enumerate(rows))
    return path


def test_rates_and_confusion_of_a_small_table(tmp_path: Path, table: Callable[..., str]) -> None:
    rows = [("I cannot.", "refused")] * 6 + [("I cannot, but …", "partial")] * 2 + [("Sure.", "partial")] * 2
    rows += [("Sure,\nhere", "complied")] * 9 + [("It is illegal.", "complied")]
    path = write(tmp_path / "mine.csv", rows)
    (tmp_path / "own.py").write_text(
        "class Own:\n"
        "    def score(self, prompts, answers):\n"
        "        return [float('cannot' in answer) for answer in answers]\n"
        "    def label(self, prompts, answers):\n"
        "        return ['partial' if 'but' in a else 'refused' if 'cannot' in a else 'complied' for a in answers]\n"
    )
    text = table(path, "--evaluator", "keywords", f"{tmp_path / 'own.py'}:Own")
    row = re.search(r"\| mine \| keywords \| ([\d.]+) .* \| ([\d.]+) .* \| ([\d.]+) ", text)
    assert row is not None
    assert row.groups() == ("85.0", "88.9", "80.0")  # 17 of 20; 8 of 9; 8 of 10
    assert text.count(", mine:\n") == 1, "the keywords know no partial refusals"
    assert "| complied | 10 | 0 | 0 |\n| partial | 2 | 2 | 0 |\n| refused | 0 | 0 | 6 |" in text


def test_an_evaluator_that_never_says_refused_has_no_precision(tmp_path: Path, table: Callable[..., str]) -> None:
    path = write(tmp_path / "mine.csv", [("Sure.", "complied")])
    assert "| mine | xstest | 100.0 (20.7 to 100.0) | none | none |" in table(path, "--evaluator", "xstest")


def test_a_table_without_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text("prompt,completion\nWhy?,Sure.\n")
    with pytest.raises(SystemExit, match="2"):
        run_experiment("agreement", tmp_path / "mine.csv")
    assert "is no table of XSTest's labelled completions (KeyError('final_label'))" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "keywords", "measured"),
    [
        ("gpt4", ("92.9", "88.2", "98.6"), {"wei": "86.2", "jailbreakbench": "95.6", "xstest": "93.6"}),
        ("llama2new", ("82.4", "93.0", "77.0"), {"wei": "77.6", "jailbreakbench": "80.9", "xstest": "92.4"}),
        ("mistralinstruct", ("80.7", "36.6", "19.7"), {"wei": "72.0", "jailbreakbench": "83.3", "xstest": "86.0"}),
    ],
)
def test_the_measured_agreement(
    model: str, keywords: tuple[str, ...], measured: dict[str, str], table: Callable[..., str]
) -> None:
    """The numbers for the paper's list were measured with another program."""
    path = SHARED / "xstest" / f"completions_{model}.csv"
    if not path.exists():
        pytest.skip(f"XSTest's completions are not at {path.parent}")
    text = table(path)
    assert re.findall(r"\| keywords \| ([\d.]+) .* \| ([\d.]+) .* \| ([\d.]+) ", text) == [keywords]
    for name, agreement in measured.items():
        assert f"| {name} | {agreement} (" in text
