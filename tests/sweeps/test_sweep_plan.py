"""The device hours of a sweep, from the real TPU compiler."""

import json
from pathlib import Path

import pytest

from jaxscape.cli.main import main
from jaxscape.forecast.chips import open_slice
from jaxscape.forecast.forecast import forecast, make_workload
from jaxscape.models.gguf import open_gguf
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
    workload = make_workload(4, 56, 26, 16, (5,))
    shared = {"mesh_shape": None, "options": None, "quick": True}
    tpu_slice = open_slice("v5e:2x2")
    (alone,) = [
        item
        for item in forecast(config_of(str(tiny_dir), None), workload, tpu_slice, **shared)
        if item.form == "materialised"
    ]
    assert results[0]["form"] == "materialised"
    assert results[0]["hours"] == pytest.approx(alone.landscape_seconds / 3600)
    assert results[0]["device_hours"] == pytest.approx(3 * 4 * alone.landscape_seconds / 3600)
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ") == ["slice", "", " scans", "form", "", "", "", "", "hours of one", "device hours", "which"]
