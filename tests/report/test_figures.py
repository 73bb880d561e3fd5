"""Figures, drawn and looked at by their parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import random_landscape, with_shares
from matplotlib import colormaps
from matplotlib.colors import to_rgb

import jaxscape as js
from jaxscape.finetuning.trajectory import Trajectory
from jaxscape.report import figures as plotting
from jaxscape.report.canvas import png


@pytest.mark.parametrize("num_sets", [1, 3])
def test_a_1d_figure_shows_each_direction_with_its_interval(num_sets: int) -> None:
    land = random_landscape(1, num_sets)
    (axes,) = js.plot_landscape(land).axes
    assert f"VISAGE {land.visage():.1f} (95 % interval" in axes.get_title()
    assert axes.get_ylabel() == "attack success rate (%)"
    assert "α" in axes.get_xlabel()
    curves = [line for line in axes.lines if len(line.get_xdata()) == 5]
    np.testing.assert_array_equal([curve.get_ydata() for curve in curves], land.asr)
    assert len(axes.collections) == num_sets, "a band for each direction"
    assert len({curve.get_linestyle() for curve in curves}) == len({c.get_marker() for c in curves}) == num_sets
    assert (axes.get_legend() is not None) == (num_sets > 1)


def test_interpolations_name_both_ends() -> None:
    shape = (1, 5)
    line = js.Landscape.from_outcomes(
        [js.interpolation_axis(2, 1)], np.zeros((*shape, 4), bool), np.zeros(shape, int), np.ones(shape, bool)
    )
    (axes,) = js.plot_landscape(line).axes
    assert axes.get_xlabel() == "interpolation (0: the model, 1: the other)"
    assert [(text.get_position()[0], text.get_text().strip()) for text in axes.texts] == [
        (0, "the model"),
        (1, "the other model"),
    ]


@pytest.mark.parametrize("num_sets", [1, 2])
def test_a_2d_figure_has_a_contour_and_a_surface(num_sets: int) -> None:
    figure = js.plot_landscape(random_landscape(2, num_sets))
    assert "VISAGE" in figure.get_suptitle()
    names = [axes.name for axes in figure.axes]
    assert names.count("3d") == num_sets
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert {"β (distance along the direction)", "attack success rate (%)"} <= labels


@pytest.mark.parametrize("ndim", [1, 2])
def test_names_are_no_formulas(ndim: int) -> None:
    names = (("$\\x$ and $", "b")[:ndim], ("$y$", "c")[:ndim])
    land = replace(random_landscape(ndim, 2), directions=names)
    path = Trajectory("$\\z$ $", np.array([[0.0, 0.0], [0.2, 0.1]]), np.zeros(2))
    assert png(js.plot_landscape(with_shares(land), [path][: ndim - 1])).startswith(b"\x89PNG")


@pytest.mark.parametrize("has_shares", [False, True])
def test_paths_are_drawn_on_their_own_plane_and_not_on_that_of_a_control(has_shares: bool) -> None:
    land = replace(random_landscape(2, 2), directions=(("refusal", "random:0"), ("control:[refusal]:0", "random:0")))
    path = Trajectory("attack", np.array([[0.0, 0.0], [0.2, 0.1]]), np.zeros(2))
    figure = js.plot_landscape(with_shares(land) if has_shares else land, [path])
    contours = [plot for plot in figure.axes if plot.get_ylabel().startswith("β") and plot.name != "3d"]
    assert [plot.get_legend() is not None for plot in contours] == [True] * (3 if has_shares else 1) + [False] * (
        3 if has_shares else 1
    )


@pytest.mark.parametrize(("ndim", "done"), [(1, 0), (1, 3), (2, 0), (2, 7)])
def test_unfinished_landscapes_are_drawn_too(ndim: int, done: int, tmp_path: Path) -> None:
    land = random_landscape(ndim, done=done)
    figure = js.plot_landscape(land)
    assert f"unfinished: {done} of {5**ndim} points" in (
        figure.axes[0].get_title() if ndim == 1 else figure.get_suptitle()
    )
    plotting.save_figure(land, tmp_path / "a.png")


def test_the_colour_map_rises_in_lightness() -> None:
    weights = [0.299, 0.587, 0.114]
    grey = colormaps[plotting.COLOUR_MAP](np.linspace(0, 1, 11))[:, :3] @ weights
    assert (np.diff(grey) > 0.02).all()


def test_the_same_landscape_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plotting.save_figure(random_landscape(1), tmp_path / name)
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    assert content.startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(js.UserError, match="cannot be written"):
        plotting.save_figure(random_landscape(1), tmp_path / "no" / "a.png")


@pytest.mark.parametrize("num_sets", [1, 3])
def test_a_1d_figure_stacks_the_shares_to_100(num_sets: int) -> None:
    land = with_shares(random_landscape(1, num_sets))
    (axes,) = js.plot_landscape(land).axes
    assert axes.get_ylabel() == "share of the answers (%)"
    areas = {area.get_label(): area for area in axes.collections if area.get_label() in plotting.SHARES}
    assert list(areas) == ["complied", "incoherent", "refused"]
    tops = {}
    for name, area in areas.items():
        (path,) = area.get_paths()
        tops[name] = [path.vertices[path.vertices[:, 0] == x, 1].max() for x in land.axes[0].values]
    mean = {kind: land.shares[kind].mean(axis=0) for kind in areas}
    np.testing.assert_allclose(tops["complied"], mean["complied"])
    np.testing.assert_allclose(tops["incoherent"], mean["complied"] + mean["incoherent"])
    np.testing.assert_allclose(tops["refused"], 100)
    curves = [line for line in axes.lines if str(line.get_label()).startswith(("ASR", "attack success rate"))]
    np.testing.assert_array_equal([curve.get_ydata() for curve in curves], land.asr)
    assert len({curve.get_linestyle() for curve in curves}) == num_sets
    assert areas["incoherent"].get_hatch()
    (radii,) = (line for line in axes.lines if str(line.get_label()).startswith("radius"))
    assert land.numbers is not None
    sides = [
        entry[side]["value"]
        for entry in land.numbers["asr"]["radius"]["directions"]
        for side in ("negative", "positive")
    ]
    np.testing.assert_allclose(np.abs(radii.get_xdata()), sides)
    assert set(radii.get_ydata()) == {50}
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 4 + num_sets


def test_shares_can_be_told_apart_in_grey() -> None:
    weights = [0.299, 0.587, 0.114]
    grey = [float(np.array(to_rgb(style["facecolor"])) @ weights) for style in plotting.SHARES.values()]
    complied, incoherent, refused = grey
    assert complied + 0.3 < incoherent < refused - 0.05


@pytest.mark.parametrize("done", [None, 7])
def test_a_2d_figure_has_the_shares_beside_the_asr(done: int | None, tmp_path: Path) -> None:
    land = with_shares(random_landscape(2, 2, done))
    figure = js.plot_landscape(land)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        f"{name}, direction set {i}"
        for i in range(2)
        for name in ("attack success rate (%)", "complied (%)", "incoherent (%)")
    ]
    plotting.save_figure(land, tmp_path / "a.png")


@pytest.mark.parametrize("done", [0, 3])
def test_a_line_whose_shares_are_unfinished_is_drawn(done: int, tmp_path: Path) -> None:
    plotting.save_figure(with_shares(random_landscape(1, done=done)), tmp_path / "a.png")
