"""The command line: its files, and bad input as one sentence with exit code 2."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same_tree

import jaxscape as js
from jaxscape.cli.main import main

ROOT = Path(__file__).parents[2]
QUICK = ["--num-prompts", "2", "--steps", "2", "--max-new-tokens", "4"]
QUICKER = [*QUICK, "--no-shares"]  # for which the model would generate answers of its own


def fails(arguments: list[Any], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with on the error stream."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("jaxscape: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_a_scan_leaves_its_files_and_a_summary(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["scan", "--model", str(tiny_dir), *QUICK, "--num-directions", "2", "--seed", "5", "--cpu"])
    run = tmp_path / "runs" / f"{tiny_dir.name}-1d"
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "prompts.jsonl",
        "generations.jsonl",
        "coherence.json",
        "labels-coherence.jsonl",
        "landscape.json",
        "landscape.png",
    }
    config = json.loads((run / "config.json").read_text())
    assert config["directions"] == [[5], [6]]
    assert config["prompt_source"] == "harmful"
    out = capfd.readouterr().out
    land = js.Landscape.load(run)
    assert f"VISAGE: {land.visage():.2f} (95 % interval" in out
    assert "ASR of the model itself:" in out
    assert land.numbers is not None
    volume, radius = (land.numbers["asr"][name] for name in ("volume", "radius"))
    assert f"Safety volume in percent: {volume['value']:.2f} (95 % interval {volume['interval'][0]:.2f} to" in out
    bound = "at least " if radius["at_least"] else ""
    assert f"Radius, where the ASR rises above 50 %: {bound}{radius['value']:.3g} (95 % interval " in out


def test_a_scan_says_which_prompts_it_read_and_records_the_column(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "a.csv", tmp_path / "run"
    table.write_text("id;Query;goal\n1;Why, and how?;x\n2;What?;y\n3;Who?;z\n")
    scan = ["scan", "--model", tiny_dir, *QUICKER, "--cpu", "--prompts", table, "--out", out]
    main([*map(str, scan), "--prompt-column", "query"])
    err = capfd.readouterr().err
    assert err.count(f"the first 2 of 3 prompts from {str(table)!r} (the column 'Query'); the first one: 'Why") == 1
    assert json.loads((out / "config.json").read_text())["prompt_column"] == "query"
    prompts = [json.loads(line)["prompt"] for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert prompts == ["Why, and how?", "What?"]
    assert re.search("different: .*prompts", fails(scan, capfd))


def test_directions_from_files_and_2d_and_plot_and_export(tiny_dir: Path, tiny: js.Model, tmp_path: Path) -> None:
    files = []
    for seed in (0, 1):
        files.append(tmp_path / f"{seed}.safetensors")
        js.save_direction(js.random_direction(tiny, seed), files[-1], tiny)
    run = tmp_path / "run"
    scan = ["scan", "--model", str(tiny_dir), *QUICKER, "--ndim", "2", "--out", str(run)]
    main([*scan, "--directions", *map(str, files)])
    land = js.Landscape.load(run)
    assert land.asr.shape == (1, 3, 3)
    assert_same_tree(js.load_direction(files[0], tiny), js.random_direction(tiny, 0))
    picture = (run / "landscape.png").read_bytes()
    (run / "landscape.png").unlink()
    main(["plot", str(run)])
    assert (run / "landscape.png").read_bytes() == picture
    main(["export", str(run)])
    assert len((run / "output.jsonl").read_text().splitlines()) == 9


def test_interpolation_in_one_and_two_dimensions(make_model: Any, tiny_dir: Path, tmp_path: Path) -> None:
    others = [str(make_model(seed=seed)[0]) for seed in (11, 12)]
    common = ["scan", "--model", str(tiny_dir), *QUICKER, "--extra-steps", "1", "--out"]
    main([*common, str(tmp_path / "line"), "--interpolate-to", others[0]])
    main([*common, str(tmp_path / "mixed"), "--ndim", "2", "--num-directions", "2", "--interpolate-to", others[0]])
    main([*common, str(tmp_path / "plane"), "--ndim", "2", "--interpolate-to", *others])
    line, mixed, plane = (js.Landscape.load(tmp_path / name) for name in ("line", "mixed", "plane"))
    assert [axis.values for axis in line.axes] == [(-0.5, 0, 0.5, 1, 1.5)]
    assert [axis.name for axis in mixed.axes] == ["interpolation", "alpha"]
    assert mixed.asr.shape == (2, 5, 3)
    assert [axis.name for axis in plane.axes] == ["interpolation", "interpolation 2"]
    assert (line.asr[0, 1], line.asr[0, 3]) == (plane.asr[0, 1, 1], plane.asr[0, 3, 1])
    assert (mixed.asr[:, :, 1] == line.asr).all()


def test_models_of_another_shape_have_no_line_between_them(
    make_model: Any, tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_model(intermediate_size=48)[0]
    capfd.readouterr()  # of making the model
    error = fails(["scan", "--model", tiny_dir, "--interpolate-to", other, *QUICK, "--out", tmp_path / "run"], capfd)
    assert "model.layers.0.mlp.up_proj.weight has shape (48, 32) instead of (64, 32)" in error


def test_the_script_in_experiments_is_the_same_program() -> None:
    ours = subprocess.run(
        [sys.executable, "-m", "jaxscape", "scan", "--help"], capture_output=True, text=True, check=True
    )
    script = subprocess.run(
        [sys.executable, ROOT / "experiments" / "scan.py", "--help"], capture_output=True, text=True, check=True
    )
    assert script.stdout == ours.stdout
    for flag in (
        "--model",
        "--dtype",
        "--prompts",
        "--num-prompts",
        "--system-prompt",
        "--ndim",
        "--steps",
        "--radius",
    ):
        assert flag in script.stdout
    for flag in ("--seed", "--num-directions", "--directions", "--max-new-tokens", "--temperature", "--tpu", "--out"):
        assert flag in script.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "missing.csv"], "cannot be read"),
        (["--prompts", "{tmp}/empty.txt"], "has no prompts in it"),
        (["--prompts", "{tmp}/bad.csv"], "bad.csv, line 3: 1 columns"),
        (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl, line 2: not valid JSON"),
        (["--prompts", "{tmp}/good.csv", "--prompt-column", "query"], "no column 'query' among 'id', 'goal'"),
        (["--prompt-column", "goal"], "'harmful' has no columns"),
        (["--prompt-column", "bad\udcff"], "not valid UTF-8"),
        (["--num-prompts", "101"], "has 100 prompts, but 101"),
        (["--num-prompts", "0"], "at least 1"),
        (["--steps", "0"], "even and at least 2"),
        (["--steps", "-4"], "even and at least 2"),
        (["--steps", "5"], "even and at least 2"),
        (["--radius", "0"], "radius"),
        (["--radius", "nan"], "radius"),
        (["--num-directions", "0"], "--num-directions must be at least 1, not 0"),
        (["--seed", "-1"], "seed"),
        (["--seed", "99999999999999999999"], "seed"),
        (["--max-new-tokens", "0"], "new tokens"),
        (["--max-new-tokens", "255"], "exceeds the model's context of 256"),
        (["--temperature", "-1"], "temperature"),
        (["--slots", "0"], "option slots must be at least 1"),
        (["--chunk", "0"], "option chunk must be at least 1"),
        (["--prompts", "{tmp}/long.txt", "--num-prompts", "1"], "Prompt 1 has"),
        (["--tpu", "--gpu"], "only one of --tpu, --gpu"),
        (["--tpu"], r"no TPU here, but a CPU: .* pip install 'jaxscape\[tpu\]'"),
        (["--gpu"], r"no GPU here, but a CPU: .* pip install 'jaxscape\[cuda\]'"),
        (["--out", "{tmp}/empty.txt"], "is a file"),
        (["--out", "{tmp}"], "has files in it"),
        (["--out", "{tmp}/" + 300 * "x"], "File name too long"),
        (["--model", 5000 * "x"], "File name too long"),
        (["--prompts", "bad\udcff.txt"], "not valid UTF-8"),
        (["--system-prompt", "bad\udcff"], "not valid UTF-8"),
        (["--model", "./no-dir"], "There is no model"),
        (["--model", "{tmp}/no-model"], "There is no model"),
        (["--out", "{tmp}/empty.txt/two\nlines\x1b[31m"], r"two lines\\x1b\[31m cannot be a run's directory"),
        (["--model", "{tmp}/cut.gguf"], "truncated or damaged"),
        (["--directions", "{tmp}/none.safetensors"], "cannot be read as safetensors"),
        (["--directions", "a", "--num-directions", "2"], "either --directions or --num-directions"),
        (["--directions", "a", "--ndim", "2"], "directions come in sets of 2, but --directions gives 1"),
        (["--interpolate-to", "a", "b"], "at most 1 models with --ndim 1"),
        (["--interpolate-to", "a", "--directions", "b"], "only one of --directions and --interpolate-to"),
        (["--interpolate-to", "a", "--num-directions", "2"], "this interpolation has none"),
        (["--interpolate-to", "a", "--extra-steps", "-1"], "extra steps must be 0 or more"),
        (["--interpolate-to", "{tmp}/none"], "There is no model"),
        (["--extra-steps", "1"], "give --interpolate-to too"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.csv").write_text("id,goal\n1,a\n2\n")
    (tmp_path / "good.csv").write_text("id,goal\n1,a\n")
    (tmp_path / "bad.jsonl").write_text('"a"\n{\n')
    (tmp_path / "long.txt").write_text("word " * 300)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    given = {"--model": tiny_dir, "--out": tmp_path / "run"} | dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    defaults = [str(part) for flag, value in given.items() if flag not in filled for part in (flag, value)]
    error = fails(["scan", *defaults, *filled], capfd)
    assert re.search(message, error), error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_of_another_configuration_is_not_touched(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["scan", "--model", str(tiny_dir), *QUICKER, "--out", str(tmp_path)]
    main(command)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capfd.readouterr()
    assert "different: seed" not in (error := fails([*command, "--seed", "1"], capfd))
    assert "different: directions, seed" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("verb", ["plot", "export"])
def test_a_directory_without_a_run(verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "holds no landscape" in fails([verb, tmp_path], capfd)


def test_an_interrupted_run_says_that_it_goes_on(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxscape.landscapes.scan.scan", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["scan", "--model", str(tiny_dir), *QUICK, "--out", str(tmp_path)])
    assert stop.value.code == 130
    assert "resumes the run" in capfd.readouterr().err


def test_misspelled_options_exit_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["scan", "--setps", "2"], ["scan", "--steps", "two"], ["scna"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "Traceback" not in capfd.readouterr().err


def test_the_package_runs_without_torch(tiny_dir: Path, tmp_path: Path) -> None:
    """torch is for the comparisons in these tests alone."""
    script = f"""
from jaxscape.cli.main import main
main(["scan", "--model", {str(tiny_dir)!r}, *{QUICK!r}, "--out", {str(tmp_path / "run")!r}])
import importlib.util
assert importlib.util.find_spec("torch") is None
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ours = re.compile(r"(factorised|materialised): |the first \d+ of \d+ prompts |\d/3  ")
    assert [line for line in result.stderr.splitlines() if not ours.match(line)] == [], "the libraries are quiet"
    assert js.Landscape.load(tmp_path / "run").complete


def chats_file(path: Path, count: int = 8) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in js.load_chats(f"safe:{count}")))
    return path


FEW = ["--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-2"]


def test_finetunings_become_ends_and_paths_of_a_landscape(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = chats_file(tmp_path / "chats.jsonl")
    main(["finetune", "--model", str(tiny_dir), "--data", str(data), *FEW, "--method", "lora", "--targets", "q_proj"])
    run = tmp_path / "runs" / f"{tiny_dir.name}-finetuned"
    out, err = capfd.readouterr()
    assert out == f"runs/{run.name}/adapter\n"
    assert [line.split("  ")[0] for line in err.splitlines()] == ["epoch 1", "epoch 2"], "the libraries are quiet"
    assert {path.name for path in run.iterdir()} == {"adapter", "checkpoints", "config.json", "log.jsonl", "optimizer"}
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    full = ["finetune", "--model", str(tiny_dir), "--data", str(data), "identity-shift:4", *FEW, "--method", "full"]
    main([*full, "--out", "full"])
    assert capfd.readouterr().out == "full/model\n"
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert (config["num_chats"], config["data"]) == (12, [str(data), "identity-shift:4"])

    ends = ["--interpolate-to", str(run / "adapter"), "full/model"]
    paths = ["--trajectory", str(run), "full"]
    scan = ["scan", "--model", str(tiny_dir), *QUICKER, "--ndim", "2"]
    main([*scan, *ends, *paths, "--out", "between"])
    first, second = json.loads((tmp_path / "between" / "trajectory.json").read_text())
    assert (first["name"], second["name"]) == (run.name, "full")
    for path, end in ((first, [1, 0]), (second, [0, 1])):
        assert len(path["coords"]) == 3
        assert path["coords"][0] == [0, 0]
        assert path["coords"][-1] == pytest.approx(end, abs=1e-4)
        assert path["residual"][-1] == pytest.approx(0, abs=1e-2)
    figure = (tmp_path / "between" / "landscape.png").read_bytes()
    (tmp_path / "between" / "landscape.png").unlink()
    main(["plot", "between"])
    assert (tmp_path / "between" / "landscape.png").read_bytes() == figure

    main([*scan, *paths, "--out", "principal"])
    assert js.Landscape.load(tmp_path / "principal").axes[0].values == (-1.25, 0.0, 1.25)
    found = json.loads((tmp_path / "principal" / "trajectory.json").read_text())
    assert max(abs(point[0]) for path in found for point in path["coords"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{bad}"], "line 1: the chat has no assistant's turn"),
        (["--data", "{broken}"], "line 2: not valid JSON"),
        (["--data", "{good}:99"], "there is no part 0:99"),
        (["--data", "nothing"], "There is no training set 'nothing'"),
        ([], "There is nothing to learn: give --data"),
        (["--data", "{good}", "--epochs", "0"], "epochs must be at least 1"),
        (["--data", "{good}", "--targets", "c_attn"], "no linear layers named c_attn"),
        (["--data", "{good}", "--targets"], "A LoRA training needs --targets: name at least one"),
        (["--data", "{good}", "--max-length", "8"], "raise --max-length"),
        (["--data", "{good}", "--model", "nothing"], "There is no model 'nothing'"),
        (["--data", "{good}", "--model", "{adapter}"], "belongs to another model"),
        (["--data", "{good}", "--out", "{good}"], "because .* is a file"),
    ],
)
def test_bad_finetunings(
    arguments: list[str],
    message: str,
    tiny_dir: Path,
    make_model: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    edit_json: Any,
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("bad", "broken")}
    files["good"] = chats_file(tmp_path / "good.jsonl")
    files["bad"].write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    files["broken"].write_text(files["good"].read_text().split("\n")[0] + '\n{"messages": [\n')
    if "{adapter}" in arguments:
        files["adapter"] = tmp_path / "run" / "adapter"
        wide, _ = make_model(intermediate_size=48)
        main(["finetune", "--model", str(wide), "--data", str(files["good"]), *FEW, "--out", str(tmp_path / "run")])
        edit_json(files["adapter"] / "adapter_config.json", base_model_name_or_path=str(tiny_dir))
        capfd.readouterr()
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    model = [] if "--model" in arguments else ["--model", str(tiny_dir)]
    error = fails(["finetune", *(text.format(**files) for text in arguments), *model, *out], capfd)
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_explodes(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = chats_file(tmp_path / "chats.jsonl")
    arguments = ["finetune", "--model", tiny_dir, "--data", data, "--out", tmp_path / "out", "--method", "full"]
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, [*arguments, "--learning-rate", "1e30", "--batch-size", "4"])))
    assert stop.value.code == 2
    assert re.search(
        r"jaxscape: At step \d the (loss|grad norm) is (nan|inf): training stopped", capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trajectory", "x"], "give --ndim 2"),
        (["--trajectory", "x", "--ndim", "2", "--num-directions", "2"], "one pair of directions"),
        (["--trajectory", "x", "--ndim", "2"], "x has no config.json"),
    ],
)
def test_bad_trajectories(
    arguments: list[str], message: str, tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = fails(["scan", "--model", tiny_dir, *QUICK, "--out", tmp_path / "out", *arguments], capfd)
    assert message in error
    assert not (tmp_path / "out").exists()
