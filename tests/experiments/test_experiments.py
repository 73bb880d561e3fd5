"""The paper's experiments in small: their tables and figures, and that a second run only reads what is there."""

import json
from pathlib import Path

import pytest
from helpers import MakeModel, run_experiment

import jaxscape as js

ROOT = Path(__file__).parents[2]
QUICK = ["--num-prompts", "2", "--steps", "2", "--max-new-tokens", "3"]


def run(name: str, out: Path, *arguments: object, results: Path | None = None) -> str:
    """The table that a program leaves in `results`, or in `out`. It must have drawn a figure too."""
    run_experiment(name, *QUICK, "--out", out, *arguments)
    assert ((results or out) / "figure.png").stat().st_size > 10_000
    return ((results or out) / "table.md").read_text()


def rows(table: str) -> list[list[str]]:
    """The cells of the first table, without its head."""
    lines = table.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_visage_of_models(
    tiny_dir: Path, make_model: MakeModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other, _ = make_model(seed=1)
    options = ["--model", tiny_dir, "--others", other, "--plane-steps", "2"]
    table = run("visage", tmp_path / "out", *options)
    names = [f"{directory.name}-{n}d" for directory in (tiny_dir, other) for n in (1, 2)]
    assert [row[0] for row in rows(table)] == names
    land = json.loads((tmp_path / "out" / names[1] / "landscape.json").read_text())
    assert [len(axis["values"]) for axis in land["axes"]] == [3, 3]
    assert rows(table)[1][4].startswith(f"{land['visage']['paper']:.1f} (")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("visage", tmp_path / "out", *options) == table
    assert {path: path.read_bytes() for path in before} == before
    assert table.rstrip() in capfd.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run("visage", tmp_path / "out", *options[:3], tiny_dir)
    assert "Two models have the same name" in capfd.readouterr().err


def test_system_prompts_are_compared_along_the_same_direction(tiny_dir: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_dir, "--system-prompts", "none", "Be brief, please."]
    table = run("system_prompts", tmp_path / "out", *options)
    assert [row[0] for row in rows(table)] == ["none", "Be-brief-please"]
    assert "| Be-brief-please - none | VISAGE |" in table
    assert "prompts and directions |" in table, "runs are paired"


def test_prompt_sets_are_compared(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("Why?\nHow?\nWho?\n")
    table = run("prompt_sets", tmp_path / "out", "--model", tiny_dir, "--second", tmp_path / "mine.txt")
    assert [row[:3] for row in rows(table)] == [["harmful", "2", "1"], ["mine", "2", "1"]]
    with pytest.raises(SystemExit, match="2"):
        run("prompt_sets", tmp_path / "out", "--model", tiny_dir, "--second", "harmful")
    assert "--prompts and --second are both called harmful" in capfd.readouterr().err


def test_kinds_of_directions_stand_beside_their_controls(tiny_dir: Path, tmp_path: Path) -> None:
    """Along random directions no control is scanned. `there` is one of the distances, which double."""
    options = ["--model", tiny_dir, "--directions", "random:0", "sum:[random:1][random:2]", "--doublings", "1"]
    table = run("directions", tmp_path / "out", *options, "--nearest", "0.25")
    assert [row[0].replace("\\", "") for row in rows(table)] == [
        "weight-norm:[random:0]",
        "weight-norm:[sum:[random:1][random:2]]",
        "control:[weight-norm:[sum:[random:1][random:2]]]",
    ]
    assert {row[4] for row in rows(table)} <= {"-0.5", "-0.25", "+0", "+0.25", "+0.5"}


def test_jailbreaks_of_an_artifact_and_the_vote(tiny_dir: Path, tmp_path: Path) -> None:
    """The vote of all models, from the answers that the runs keep."""
    entries = [{"goal": "Bad", "prompt": prompt, "jailbroken": True} for prompt in ("Bad !(", None, "Say bad.", "No.")]
    (tmp_path / "artifact.json").write_text(json.dumps({"parameters": {}, "jailbreaks": entries}))
    (tmp_path / "e").write_text("e\n")
    options = ["--model", tiny_dir, "--artifact", tmp_path / "artifact.json", "--num-directions", "2"]
    options += ["--keywords", tmp_path / "e", "--max-new-tokens", "12"]
    table = run("jailbreaks", tmp_path / "out", *options)
    lines = (tmp_path / "out" / "jailbreaks" / "generations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["prompt"] for record in records} == {"Bad !(", "Say bad."}
    far = [record for record in records if record["coords"] != [0.0]]
    refusals = [
        [record["refused"] for record in far if record["prompt"] == prompt] for prompt in ("Bad !(", "Say bad.")
    ]
    assert [len(votes) for votes in refusals] == [4, 4]
    mean = 100 * (1 - sum(map(sum, refusals)) / 8)
    vote = 100 * sum(sum(votes) < 2 for votes in refusals) / 2
    assert rows(table)[1][:3] == ["0.12", f"{mean:.3g}", f"{vote:.3g}"]
    assert len(rows(table)) == 2


def test_harmful_prompts_are_asked_as_programs_without_an_artifact(tiny_dir: Path, tmp_path: Path) -> None:
    run("jailbreaks", tmp_path / "out", "--model", tiny_dir, "--num-directions", "1", "--num-prompts", "1")
    line = (tmp_path / "out" / "jailbreaks" / "prompts.jsonl").read_text().splitlines()[0]
    assert js.load_prompts("harmful", 1)[0] in line
    assert "def steps():" in line


def test_finetuning_attacks_and_their_paths(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every file is there, and a second run only reads them."""
    rows_of_table = "".join(f"Do bad thing {i},Sure\n" for i in range(180))
    (tmp_path / "adv.csv").write_text(f"goal,target\n{rows_of_table}")
    options = ["--model", tiny_dir, "--prompts", tmp_path / "adv.csv", "--epochs", "2", "--plane-steps", "1"]
    options += ["--extra-steps", "0", "--batch-size", "20"]
    table = run("finetune_attack", tmp_path / "out", *options)
    names = ["aligned", "harmful-10", "harmful-50", "harmful-100", "mixture", "identity-shift"]
    assert [row[0] for row in rows(table)] == names
    assert all(row[3] for row in rows(table))
    assert [bool(row[4]) for row in rows(table)] == [True, *[False] * 5]
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    assert len(before) == 3 * 7 + 5  # scans, with their shares, and finetunings; the logs of these have times in them
    assert run("finetune_attack", tmp_path / "out", *options) == table
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(SystemExit, match="2"):
        run("finetune_attack", tmp_path / "out", *options, "--num-prompts", "81")
    assert "--num-prompts must be from 1 to 80" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["capability", "perplexity", "damage"])
def test_what_is_measured_beside_safety(what: str, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All three share the scan for safety; each has its own table."""
    out = tmp_path_factory.getbasetemp() / "beside-safety"
    table = run("beside_safety", out, what, "--model", tiny_dir, "--texts", "benign", results=out / what)
    assert [row[0] for row in rows(table)] == ["-0.5", "+0", "+0.5"]
    (values,) = json.loads((out / what / "measures.json").read_text())["measures"].values()
    shown = [float(row[-1].split(" (")[0].replace(",", "")) for row in rows(table)]
    assert shown == pytest.approx(values["value"][0], rel=0.006)
    assert (out / "harmless").exists() == (what == "damage")
    assert len(rows(table)[0]) == 3 + (what == "damage")


def test_the_questions_are_easy_and_well_formed() -> None:
    lines = (ROOT / "experiments" / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    assert len({question["question"]["stem"] for question in questions}) == 60
    for question in questions:
        labels = [choice["label"] for choice in question["question"]["choices"]]
        assert labels == list("ABCD")
        assert question["answerKey"] in labels
    keys = [question["answerKey"] for question in questions]
    assert min(map(keys.count, "ABCD")) >= 8
