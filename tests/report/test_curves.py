"""Several quantities along one axis, and the table of landscapes."""

import numpy as np

import jaxscape as js
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.report.curves import curves_table, plot_curves
from jaxscape.report.tables import landscape_table

X = [-0.5, 0.0, 0.5]
PANELS = {
    "attack success (%)": {
        "one model": np.array([[90.0, 0, 80], [100, 0, 90], [100, 4.5, 100]]),
        "vote": np.array([100.0, 0, 50]),
    },
    "perplexity": {"perplexity": np.array([12345.6, 9.876, 1234.5])},
}


def test_a_table_has_intervals_where_there_are_some() -> None:
    assert curves_table(X, "α", PANELS).splitlines() == [
        "| α | attack success (%): one model | attack success (%): vote | perplexity |",
        "| --- | --- | --- | --- |",
        "| -0.5 | 100 (90 to 100) | 100 | 12,346 |",
        "| +0 | 0 (0 to 4.5) | 0 | 9.88 |",
        "| +0.5 | 90 (80 to 100) | 50 | 1,234 |",
    ]
    assert curves_table([0.0, 1.0], "x", {"y": {"y": np.array([1.0, np.nan])}}).splitlines()[2:] == [
        "| 0 | 1 |",
        "| 1 | nan |",
    ]


def test_a_figure_has_a_panel_for_each_quantity_with_its_own_scale() -> None:
    rates, values = plot_curves(X, "α", PANELS).axes
    assert [line.get_label() for line in rates.lines] == ["one model", "vote"]
    assert rates.get_ylim() == (-3, 103)
    assert (rates.get_yscale(), values.get_yscale()) == ("linear", "log")
    assert values.get_xlabel() == "α"
    np.testing.assert_allclose(rates.lines[0].get_ydata(), [100, 0, 90])
    (plain,) = plot_curves([0.0, 1.0], "x", {"divergence": {"d": np.array([0.0, 500.0])}}).axes
    assert plain.get_yscale() == "linear", "zero has no logarithm"


def test_landscapes_in_a_table() -> None:
    """By hand: 1 of 2 prompts is refused everywhere, so VISAGE and the volume are 50, and the radius has no end."""
    axes = symmetric_axes(1, 2, 0.5)
    refused = np.array([[[True, False]] * 3] * 2)
    none = np.zeros((2, 3), int)
    land = js.Landscape.from_outcomes(axes, refused, none, none == 0)
    point = js.Landscape.from_outcomes([js.Axis("alpha", (0.0,))], refused[:, :1], none[:, :1], none[:, :1] == 0)
    head, _, whole, single = landscape_table({"line": land, "point": point}).splitlines()
    assert head.endswith("| ASR of the model (%) | VISAGE | VISAGE (code) | safety volume (%) | radius |")
    assert whole.startswith("| line | 2 | 2 | 50.0 (9.5 to 90.5) | 50.0 (")
    assert whole.endswith(" | at least 0.500 (0.000 to at least 0.500) |")
    assert single == "| point | 2 | 2 | 50.0 (9.5 to 90.5) |  |  |  |  |"
