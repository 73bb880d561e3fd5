"""Figures by name: the registry, and `jaxscape plot --figure`."""

from pathlib import Path
from typing import Any

import pytest
from helpers import random_landscape
from matplotlib.figure import Figure

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.report.registry import FIGURES, draw_run


def empty(land: js.Landscape, trajectories: Any) -> Figure:
    return Figure(figsize=(1, 1))


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("done", [0, 3, None])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_lines_and_planes_finished_or_not(
    name: str, ndim: int, done: int | None, tmp_path: Path
) -> None:
    random_landscape(ndim, num_sets=2, done=done).save(tmp_path)
    assert draw_run(tmp_path, name).read_bytes().startswith(b"\x89PNG")


def test_the_default_figure_is_the_one_that_a_scan_leaves(tmp_path: Path) -> None:
    land = random_landscape(1)
    land.save(tmp_path)
    js.save_figure(land, tmp_path / "expected.png")
    main(["plot", str(tmp_path)])
    assert (tmp_path / "landscape.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_a_registered_figure_is_drawn_into_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FIGURES, "empty", empty)
    random_landscape(1).save(tmp_path)
    main(["plot", str(tmp_path), "--figure", "empty"])
    assert capfd.readouterr().out == f"{tmp_path / 'landscape-empty.png'}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"landscape.json", "landscape-empty.png"}


def test_an_unknown_figure_is_a_user_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    random_landscape(1).save(tmp_path)
    with pytest.raises(js.UserError, match="Unknown figure 'none': choose landscape"):
        draw_run(tmp_path, "none")
