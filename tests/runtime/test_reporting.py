"""`--report-to`: what TensorBoard and wandb, offline, are told. `test_finetuning_run.py` has that of a finetuning."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.runtime.reporting import open_reporter

QUICK = ["--num-prompts", "2", "--steps", "2", "--max-new-tokens", "4", "--cpu", "--no-shares"]


def payloads(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which wandb writes after 7 bytes of its own. They are short."""
    place = 7
    while place < len(content):
        _, size, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1, "a whole record"
        yield content[place + 7 : place + 7 + size]
        place += 7 + size


@pytest.fixture(scope="module")
def run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished scan that was reported to TensorBoard."""
    pytest.importorskip("tensorboard")
    out = tmp_path_factory.mktemp("reported") / "run"
    main(["scan", "--model", str(tiny_dir), *QUICK, "--out", str(out), "--report-to", "tensorboard"])
    return out


def test_tensorboard_shows_the_numbers_of_each_point(run: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"asr", "nonfinite", "unanswered", "direction", "coord_0"}
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in ("asr", "coord_0")}
    assert found["asr"] == list(enumerate(js.Landscape.load(run).asr[0].tolist(), 1))
    assert found["coord_0"] == [(1, -0.5), (2, 0.0), (3, 0.5)]


def test_wandb_gets_the_numbers_and_the_configuration_and_goes_on_with_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id.txt").write_text("0123abcd")  # of the process that began the run
    with open_reporter("wandb", tmp_path, config) as reporter:
        for step in (3, 4):
            reporter.log(step, {"asr": 10.0 * step})
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(map(Record.FromString, payloads(path.read_bytes())))
    (reported,) = (record.run for record in records if record.HasField("run"))
    assert reported.run_id.startswith("0123abcd-")
    assert (reported.project, reported.display_name) == ("jaxscape", tmp_path.name)
    settings = {update.key: json.loads(update.value_json) for update in reported.config.update}
    assert settings["direction_names"] == config["direction_names"] == [["random:0"]]
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["asr"]) for row in history] == [(3, 30), (4, 40)]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"Write a" in path.read_bytes()]


def test_a_program_that_is_missing_is_named_before_anything_is_written(
    tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    out = tmp_path / "run"
    for command in (["scan", *QUICK], ["finetune", "--data", "safe:2"]):
        with pytest.raises(SystemExit):
            main([*command, "--model", "none", "--out", str(out), "--report-to", "wandb"])
        assert "run pip install 'jaxscape[wandb]', or leave out --report-to" in capfd.readouterr().err
    with pytest.raises(js.UserError, match="Unknown program 'excel' to report to: choose wandb, tensorboard or none"):
        js.scan(tiny, [0], prompts=["Hi"], report_to="excel", out=out)
    with pytest.raises(js.UserError, match="kept in the run's directory"):
        js.scan(tiny, [0], prompts=["Hi"], report_to="wandb")
    assert not out.exists()
