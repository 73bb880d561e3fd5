"""The device hours of a sweep, from the real TPU compiler."""

import json
from pathlib import Path

import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.engine.options import EngineOptions
from jaxscape.forecast.chips import open_slice
from jaxscape.forecast.forecast import forecast, make_workload
from jaxscape.sweeps.forecasts import config_of

pytest.importorskip("libtpu")


def sweep_file(directory: Path, text: str) -> str:
    path = directory / "sweep.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def test_scans_of_one_shape_share_a_forecast(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(
        tmp_path,
        f"scan: {{model: {tiny_dir}, num_prompts: 4, steps: 4, max_new_tokens: 16, form: materialised}}\n"
        "matrix: {adaptive: [false, true], seed: [0, 1, 2], dtype: [bfloat16, float16]}",
    )
    command = ["plan", "--sweep", path, "--topology", "v5e:2x2", "--quick"]
    main([*command, "--json"])
    results = json.loads(capsys.readouterr().out)
    assert [(len(result["scans"]), result["problem"]) for result in results] == [
        (3, ""),
        (3, "TPUs have no float16."),
        (6, "How many points an adaptive scan evaluates depends on what it finds."),
    ]
    # The same scan, as jaxscape plan without --sweep forecasts it.
    options, tpu_slice = EngineOptions(form="materialised"), open_slice("v5e:2x2")
    (alone,) = forecast(
        config_of(str(tiny_dir), None), make_workload(4, 56, 26, 16, (5,)), tpu_slice, options=options, quick=True
    )
    assert results[0]["form"] == "materialised"
    assert results[0]["hours"] == pytest.approx(alone.landscape_seconds / 3600)
    assert results[0]["device_hours"] == pytest.approx(3 * 4 * alone.landscape_seconds / 3600)
    main(command)
    head, scans, *problems, total, _, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["slice", "scans", "form", "hours", "of", "one", "device", "hours", "which"]
    assert scans.split()[:5] == [
        "v5e:2x2",
        "3",
        "materialised",
        f"{results[0]['hours']:.3g}",
        f"{results[0]['device_hours']:.3g}",
    ]
    assert [problem.rpartition(": ")[2] for problem in problems] == [result["problem"] for result in results[1:]]
    assert total == f"v5e:2x2: 3 scans, {results[0]['device_hours']:.3g} device hours in all"
    assert note.startswith("Hours are forecasts")


def test_models_have_the_configuration_that_a_scan_would_load(tiny_dir: Path, tmp_path: Path) -> None:
    assert config_of("smollm2-135m-safe", None) == config_of("smollm2-135m", None)
    with pytest.raises(js.UserError, match="Unknown model 'smollm2-135'"):
        config_of("smollm2-135", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "llama-2-7b-x"], "--model is given by the scans of a sweep: leave it out."),
        (["--points", "11"], "--points is given by the scans of a sweep: leave it out."),
        (["--slots", "8"], "--slots is given by the scans of a sweep: leave it out."),
        (["--topology", "v9:2x2"], "Cannot parse the topology 'v9:2x2'"),
    ],
)
def test_options_that_a_sweep_has_itself_are_errors(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--sweep", sweep_file(tmp_path, "scan: {steps: 4}"), *options])
    assert message in capsys.readouterr().err


def test_several_slices_are_for_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--topology", "v5e:1x1", "v5e:2x2"])
    assert "give one --topology" in capsys.readouterr().err
