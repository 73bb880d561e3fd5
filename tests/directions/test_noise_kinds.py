"""Random directions of other kinds: Gaussian, filter-normalised, sparse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.kinds import parse_direction
from jaxscape.models.checkpoint import named_leaves


def leaves(model: js.Model, name: str) -> dict[str, np.ndarray]:
    (direction,) = js.make_directions([name], model)
    return {key: np.asarray(leaf) for key, leaf in named_leaves(direction).items()}


@pytest.mark.parametrize("name", ["gaussian:3", "filter:3", "sparse:0.25:3"])
def test_the_noise_is_that_of_the_seed_and_norms_are_left_alone(tiny: js.Model, name: str) -> None:
    noise, drawn = leaves(tiny, "random:3"), leaves(tiny, name)
    for key, tensor in drawn.items():
        if "norm" in key:
            assert not tensor.any()
            continue
        kept = tensor != 0
        signs = np.sign(noise[key])
        np.testing.assert_array_equal(np.sign(tensor)[kept], signs[kept])
        assert kept.all() or name.startswith("sparse")


def test_gaussian_noise_has_the_standard_deviation_one(tiny: js.Model) -> None:
    values = np.concatenate([leaf.ravel() for key, leaf in leaves(tiny, "gaussian:0").items() if "norm" not in key])
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * values.size)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)


def test_each_filter_has_the_norm_of_the_one_it_perturbs(tiny: js.Model) -> None:
    weights = named_leaves(tiny.params)
    for key, tensor in leaves(tiny, "filter:0").items():
        if "norm" not in key:
            np.testing.assert_allclose(
                np.linalg.norm(tensor, axis=-1), np.linalg.norm(weights[key], axis=-1), rtol=1e-5, err_msg=key
            )


@settings(max_examples=5, deadline=None)
@given(fraction=st.floats(0.05, 1), seed=st.integers(0, 2**32 - 1))
def test_a_sparse_direction_changes_its_fraction_of_the_weights(tiny: js.Model, fraction: float, seed: int) -> None:
    weights, drawn = named_leaves(tiny.params), leaves(tiny, f"sparse:{fraction!r}:{seed}")
    changed = total = 0
    for key, tensor in drawn.items():
        if "norm" not in key:
            np.testing.assert_allclose(np.linalg.norm(tensor), np.linalg.norm(weights[key]), rtol=1e-5, err_msg=key)
            changed, total = changed + np.count_nonzero(tensor), total + tensor.size
    assert abs(changed / total - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / total) + 1e-9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gaussian", "The direction 'gaussian' needs an option: write gaussian:SEED"),
        ("gaussian:one", "The seed of the direction 'gaussian' is a number, not 'one'"),
        ("filter:", "The direction 'filter' needs an option"),
        ("sparse:0.1", "The direction 'sparse' needs an option: write sparse:FRACTION:SEED"),
        ("sparse:few:0", "The fraction of a sparse direction is a number, not 'few'"),
        ("sparse:0:0", r"above 0 and at most 1, not 0\.0"),
        ("sparse:nan:0", "above 0 and at most 1, not nan"),
        ("gaussian:4294967296", "A seed is a number from 0"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        parse_direction(name)
