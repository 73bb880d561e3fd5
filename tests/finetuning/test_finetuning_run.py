"""The files of a finetuning: checkpoints, resuming after a kill, adapters, and what goes wrong."""

import copy
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_same_tree, device_flags, losses

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.directions.path import load_path
from jaxscape.directions.storage import inner
from jaxscape.finetuning.options import TARGETS
from jaxscape.models.lora import save_adapter

finetune_module = importlib.import_module("jaxscape.finetuning.run")

CHATS = js.load_chats("safe:22")
SHORT = js.Training(epochs=2, batch_size=4, learning_rate=5e-3)


def finetune_command(out: Path, model: Path, data: Path, *options: str) -> list[str]:
    command = ["finetune", "--model", str(model), "--data", str(data), "--epochs", "6", "--batch-size", "4"]
    return [*command, "--learning-rate", "1e-3", "--out", str(out), *options]


def result_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for part in ("adapter", "model")
        for path in (directory / part).glob("*.safetensors")
    }


@pytest.mark.parametrize(("method", "moments"), [("full", [20]), ("lora", [1, 20])])
def test_a_killed_finetuning_ends_with_the_same_weights(
    tiny_dir: Path, tmp_path: Path, method: str, moments: list[int]
) -> None:
    """Processes that are killed and one that finishes the run leave the weights of one process that does it all."""
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    killed = tmp_path / "killed"
    report_to = "tensorboard" if method == "lora" and find_spec("tensorboard") else "none"
    command = finetune_command(killed, tiny_dir, data, "--method", method, "--report-to", report_to)
    log = killed / "log.jsonl"
    for count in moments:  # logged steps before the kill: in the first epoch, and in the middle of a later one
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxscape", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (log.exists() and log.read_bytes().count(b"\n") >= count) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was killed, not finished"
    main(command)
    main(finetune_command(tmp_path / "unbroken", tiny_dir, data, "--method", method))
    assert result_of(killed) == result_of(tmp_path / "unbroken")
    assert len(result_of(killed)) == 1
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 6 * 6 + 1))
    if report_to == "tensorboard":  # it drops what is reported twice
        accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(killed / "tensorboard")).Reload().Scalars("loss")
        reported = {event.step: event.value for event in events}
        assert [event.step for event in events] == steps
        assert reported == pytest.approx(
            {line["step"]: line["loss"] for line in map(json.loads, log.read_text().splitlines())}
        )
    # A finished run is not trained again.
    before = log.read_bytes()
    main(command)
    assert log.read_bytes() == before


def test_a_kill_between_the_two_checkpoints_of_an_epoch(tiny: js.Model, tmp_path: Path) -> None:
    """If the weights of an epoch are on disk but its optimiser is not, the epoch is trained again."""
    expected = js.finetune(tiny, CHATS, replace(SHORT, epochs=3), progress=False)
    checkpoints = finetune_module.Checkpoints
    save = checkpoints.save

    class Killed(BaseException):
        pass

    def half(self: Any, epoch: int, state: Any, *, last: bool) -> None:
        if epoch == 2:
            self.moments.save = lambda *args, **kwargs: (_ for _ in ()).throw(Killed())
        save(self, epoch, state, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", half)
        with pytest.raises(Killed):
            js.finetune(tiny, CHATS, replace(SHORT, epochs=3), out=tmp_path, progress=False)
    found = js.finetune(tiny, CHATS, replace(SHORT, epochs=3), out=tmp_path, progress=False)
    assert_same_tree(found.model.params, expected.model.params)
    assert losses(found) == losses(expected)


def test_the_path_of_a_finetuning_is_read_from_its_checkpoints(tiny: js.Model, tmp_path: Path) -> None:
    for method in ("full", "lora"):
        training = replace(SHORT, method=method, epochs=3)
        result = js.finetune(tiny, CHATS, training, out=tmp_path / method, progress=False)
        path = list(load_path(tmp_path / method, tiny))
        assert len(path) == 3
        moved = js.difference(tiny, result.model)
        away = jax.tree.map(lambda a, b: a - b, moved, path[-1])
        assert inner(away, away) < 1e-10 * inner(moved, moved)
        lengths = [inner(step, step) for step in path]
        assert lengths == sorted(lengths)
    other = js.Model(**{**vars(tiny), "params": jax.tree.map(lambda x: 2 * x, tiny.params)})
    with pytest.raises(js.UserError, match="did not start from the weights of"):
        next(load_path(tmp_path / "full", other))
    with pytest.raises(js.UserError, match=r"has no config\.json"):
        next(load_path(tmp_path, tiny))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(js.UserError, match="holds no finetuning"):
        next(load_path(tmp_path, tiny))


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_last_checkpoint(
    tiny: js.Model, tmp_path: Path
) -> None:
    training = replace(SHORT, method="full", epochs=3)

    def explode(training: js.Training, steps: int) -> Any:
        return np.array([1e-3] * 8 + [1e30] * (steps * training.epochs - 8), np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "learning_rates", explode)
        with pytest.raises(js.UserError, match=r"At step 1\d the (loss|grad norm) is (nan|inf): training stopped"):
            js.finetune(tiny, CHATS, training, out=tmp_path, progress=False)
    assert [int(path.name) for path in (tmp_path / "checkpoints").iterdir()] == [1]
    assert not (tmp_path / "model").exists()
    assert len(list(load_path(tmp_path, tiny))) == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps[:8] == list(range(1, 9))


def test_several_devices_share_a_batch(
    tiny_dir: Path, tiny: js.Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    command = ["finetune", "--model", str(tiny_dir), "--data", str(data), "--epochs", "2", "--learning-rate", "5e-3"]
    command += ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--mesh", "points=8", "--batch-size", "6"])
    assert "batch size 6 is not a multiple of the 8 devices" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    command = [sys.executable, "-m", "jaxscape", *command, "--mesh", "points=4", "--batch-size", "4"]
    subprocess.run(command, env=os.environ | device_flags(4), check=True, capture_output=True)
    found = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    alone = js.finetune(tiny, CHATS, SHORT, progress=False)
    np.testing.assert_allclose(found, losses(alone), rtol=1e-3)
    # One device reads the checkpoints that several wrote.
    assert len(list(load_path(tmp_path / "run", tiny))) == 2


def test_a_run_cannot_replace_the_model_that_it_starts_from(tiny: js.Model, tmp_path: Path) -> None:
    js.finetune(tiny, CHATS, replace(SHORT, epochs=1), out=tmp_path, progress=False)
    model = js.load_model(tmp_path / "adapter", "float32")
    with pytest.raises(js.UserError, match="choose another --out"):
        js.finetune(model, CHATS, SHORT, out=tmp_path, overwrite=True, progress=False)
    assert js.load_model(tmp_path / "adapter")


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(tiny_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); import signal; "
    program += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from jaxscape.cli.main import main; main()"
    command = finetune_command(tmp_path / "run", tiny_dir, data, "--method", "full", "--epochs", "1")
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # in which it would leave halves of programs
    failed = subprocess.run(
        [sys.executable, "-c", program, *command], env=env, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2, failed.stderr
    # The checkpoint is written in the background, beside the model: either may be the first that finds no room.
    assert re.search("jaxscape: The (checkpoint of epoch 1|model) cannot be written", failed.stderr), failed.stderr
    main(command)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_path_is_read_in_the_dtype_it_was_made_in(tiny_dir: Path, tiny: js.Model, tmp_path: Path) -> None:
    js.finetune(js.load_model(tiny_dir, "bfloat16"), CHATS, SHORT, out=tmp_path, progress=False)
    with pytest.raises(js.UserError, match="was made in bfloat16"):
        next(load_path(tmp_path, tiny))
    assert len(list(load_path(tmp_path, js.load_model(tiny_dir, "bfloat16")))) == 2


def test_the_adapter_of_a_run_is_loaded_as_a_model(tiny_dir: Path, tiny: js.Model, tmp_path: Path) -> None:
    half = js.finetune(js.load_model(tiny_dir, "bfloat16"), CHATS, SHORT, out=tmp_path / "half", progress=False)
    assert_same_tree(js.load_model(tmp_path / "half" / "adapter", "bfloat16").params, half.model.params)
    run = tmp_path / "whole"
    result = js.finetune(tiny, CHATS, SHORT, out=run, progress=False)
    assert_same_tree(js.load_model(run / "adapter", "float32").params, result.model.params)
    assert result.adapter is not None
    assert result.adapter.base == str(tiny_dir)
    assert result.adapter.targets == tuple(sorted(TARGETS))
    save_adapter(result.adapter, tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_another_configuration_is_refused_and_overwritten_on_request(tiny: js.Model, tmp_path: Path) -> None:
    js.finetune(tiny, CHATS, SHORT, out=tmp_path, progress=False)
    with pytest.raises(js.UserError, match=r"different: epochs\); choose another --out"):
        js.finetune(tiny, CHATS, replace(SHORT, epochs=1), out=tmp_path, progress=False)
    with pytest.raises(js.UserError, match="different: chats, num_chats"):
        js.finetune(tiny, CHATS[1:], SHORT, out=tmp_path, progress=False)
    result = js.finetune(tiny, CHATS, replace(SHORT, epochs=1), out=tmp_path, overwrite=True, progress=False)
    assert len(losses(result)) == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(js.UserError, match="checkpoint of epoch 1 cannot be read"):
        js.finetune(tiny, CHATS, replace(SHORT, epochs=1), out=tmp_path, progress=False)


def test_a_switch_of_thinking_is_part_of_the_run(tiny: js.Model, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    no_thoughts = "{% if not thinking %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}" + no_thoughts + "{% endif %}"
        "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n" + no_thoughts + "{% endif %}"
    )
    model, options = replace(tiny, tokenizer=tokenizer), {"training": replace(SHORT, epochs=1), "progress": False}
    js.finetune(model, CHATS, out=tmp_path / "on", thinking="on", **options)
    assert json.loads((tmp_path / "on" / "config.json").read_text())["thinking"] == "on"
    with pytest.raises(js.UserError, match=r"different: chats, thinking"):
        js.finetune(model, CHATS, out=tmp_path / "on", thinking="off", **options)
    js.finetune(tiny, CHATS, out=tmp_path / "default", **options)
    assert "thinking" not in json.loads((tmp_path / "default" / "config.json").read_text())
    with pytest.raises(js.UserError, match="Thinking cannot be switched off"):
        js.finetune(tiny, CHATS, out=tmp_path / "off", thinking="off", **options)
    assert not (tmp_path / "off").exists()
