"""The paths of finetunings: projection onto a plane, principal components, and `trajectory.json`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.principal import principal_directions
from jaxscape.directions.storage import inner
from jaxscape.finetuning.trajectory import FILE_NAME, Trajectory, load_trajectories, project, save_trajectories
from jaxscape.models.checkpoint import Params


def trees(rows: np.ndarray) -> list[Params]:
    """A tree of two tensors for each row of 12 numbers."""
    return [{"a": jnp.asarray(row[:6].reshape(2, 3)), "b": {"c": jnp.asarray(row[6:])}} for row in np.float32(rows)]


def vector(tree: Params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 2))
def test_projection_is_least_squares(seed: int, count: int, ndim: int) -> None:
    rng = np.random.default_rng(seed)
    steps, directions = rng.normal(size=(count, 12)), rng.normal(size=(ndim, 12))
    found = project("p", trees(steps), trees(directions))
    expected = np.linalg.lstsq(directions.T, steps.T, rcond=None)[0].T
    left = np.linalg.norm(steps - expected @ directions, axis=1) / np.linalg.norm(steps, axis=1)
    np.testing.assert_allclose(found.coords, np.vstack([np.zeros(ndim), expected]), atol=1e-3)
    np.testing.assert_allclose(found.residual, [0, *left], atol=1e-3)


def test_a_path_in_the_plane_has_no_residual_and_one_across_it_no_coordinates() -> None:
    directions = np.eye(12)[:2] * [[2.0], [3.0]]
    inside = project("p", trees(np.array([[4.0, 3.0, *[0] * 10]])), trees(directions))
    np.testing.assert_allclose(inside.coords[1], [2, 1], atol=1e-6)
    np.testing.assert_allclose(inside.residual, 0, atol=1e-3)
    across = project("p", trees(np.eye(12)[5:6]), trees(directions))
    np.testing.assert_allclose(across.coords, 0, atol=1e-6)
    np.testing.assert_allclose(across.residual, [0, 1])
    still = project("p", trees(np.zeros((1, 12))), trees(directions))
    np.testing.assert_allclose(still.residual, 0)


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_principal_directions_are_those_of_the_singular_value_decomposition(seed: int, count: int) -> None:
    steps = np.random.default_rng(seed).normal(size=(count, 12)) * np.linspace(3, 0.5, 12)
    found = np.array([vector(tree) for tree in principal_directions(trees(steps))])
    right = np.linalg.svd(steps)[2][:2]
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    gap = np.linalg.svd(steps)[1]
    if gap[0] > 1.05 * gap[1] and (count == 2 or gap[1] > 1.05 * gap[2]):  # otherwise the components are not unique
        np.testing.assert_allclose(np.abs((unit * right).sum(1)), 1, atol=1e-2)
    path = project("p", trees(steps), trees(found))
    assert np.abs(path.coords[:, 0]).max() == pytest.approx(1, abs=1e-3)
    assert (path.coords[-1] >= -1e-5).all()
    lengths = np.linalg.norm(found, axis=1)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_paths_and_directions_that_span_no_plane() -> None:
    line = np.outer([1, 2, 3], np.arange(12))
    with pytest.raises(js.UserError, match=r"checkpoints \(3\) span fewer than 2 dimensions: give finetunings"):
        principal_directions(trees(line))
    with pytest.raises(js.UserError, match=r"checkpoints \(1\) span fewer than 2 dimensions"):
        principal_directions(trees(line[:1]))
    with pytest.raises(js.UserError, match="do not span a 2D space to project onto"):
        project("p", trees(line), trees(line[:2]))
    with pytest.raises(js.UserError, match="do not span a 1D space to project onto"):
        project("p", trees(line), trees(np.zeros((1, 12))))


def test_the_inner_product_of_models_is_that_of_their_vectors(tiny: js.Model) -> None:
    a, b = js.random_direction(tiny, 0), js.random_direction(tiny, 1)
    assert inner(a, b) == pytest.approx(vector(a) @ vector(b), abs=1e-2)


def test_trajectories_are_kept_in_a_file_and_drawn(tmp_path: Path) -> None:
    paths = [Trajectory(f"path {i}", np.arange(6.0).reshape(3, 2) / (i + 4), np.array([0, 0.1, 0.2])) for i in range(2)]
    save_trajectories(paths, tmp_path)
    again = load_trajectories(tmp_path)
    for path, found in zip(paths, again, strict=True):
        assert found.name == path.name
        np.testing.assert_array_equal(found.coords, path.coords)
        np.testing.assert_array_equal(found.residual, path.residual)
    axes = (js.Axis("alpha", (-1.0, 0.0, 1.0)), js.Axis("beta", (-1.0, 0.0, 1.0)))
    shape = (1, 3, 3)
    refused = np.random.default_rng(0).random((*shape, 10)) < 0.5
    land = js.Landscape.from_outcomes(axes, refused, np.zeros(shape, int), np.ones(shape, bool))
    flat = js.plot_landscape(land, paths).axes[0]
    drawn = [line for line in flat.get_lines() if line.get_label().startswith("path")]
    assert [line.get_label() for line in drawn] == [f"path {i} (residual up to 20 %)" for i in range(2)]
    np.testing.assert_array_equal(drawn[1].get_xydata(), paths[1].coords)
    assert load_trajectories(tmp_path / "nothing") == []
    for text in ("{", '[{"name": "x"}]', '[{"name": "x", "coords": [1], "residual": [0]}]'):
        (tmp_path / FILE_NAME).write_text(text)
        with pytest.raises(js.UserError, match="not a file of trajectories"):
            load_trajectories(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(js.UserError, match="cannot be written"):
        save_trajectories(paths, tmp_path / "file")
