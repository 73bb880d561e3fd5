"""Directions between models: the alignment direction, and the residual of quantisation."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import MakeModel, assert_same_tree

import jaxscape as js
from jaxscape.directions.kinds import parse_direction
from jaxscape.models.checkpoint import named_leaves


@pytest.fixture(scope="module")
def other_dir(make_model: MakeModel) -> Path:
    return make_model(seed=5)[0]


def test_the_base_lies_at_minus_one_of_the_alignment_direction(tiny: js.Model, other_dir: Path) -> None:
    base = js.load_model(other_dir, "float32")
    (away,), (towards,) = (js.make_directions([f"{kind}:{other_dir}"], tiny) for kind in ("from", "to"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, -np.asarray(b)), away, towards)
    moved = js.model_at(tiny, [f"from:{other_dir}"], [-1.0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved.params, base.params)


@pytest.mark.parametrize(
    "name",
    [
        "from:{0}",
        "weight-norm:[to:{0}]",
        "tensor-norm:[to:{0}]",
        "sum:[to:{0}][random:0]",
        "projected:[random:0][to:{0}]",
    ],
)
def test_weights_in_host_memory_have_the_same_directions(
    tiny: js.Model, tiny_dir: Path, other_dir: Path, name: str
) -> None:
    on_host, direction = js.load_model(tiny_dir, "float32", on_host=True), name.format(other_dir)
    assert_same_tree(js.make_directions([direction], on_host)[0], js.make_directions([direction], tiny)[0])
    options: dict[str, Any] = {"steps": 2, "max_new_tokens": 4, "shares": False, "progress": False}
    found = [js.scan(model, [direction], prompts=["Hi"], **options).asr.tolist() for model in (on_host, tiny)]
    assert found[0] == found[1]


def test_a_base_of_another_shape_is_a_user_error(tiny: js.Model, make_model: MakeModel) -> None:
    directory, _ = make_model(num_hidden_layers=1)
    with pytest.raises(js.UserError, match=rf"tensors of {directory} do not fit the model: missing model\.layers\.1"):
        js.make_directions([f"from:{directory}"], tiny)
    with pytest.raises(js.UserError, match="The direction 'from' needs an option: write from:BASE"):
        parse_direction("from")


def quantised(weight: np.ndarray, largest: int, group: int) -> np.ndarray:
    """Round to nearest, symmetric, one scale for each group: row by row and group by group."""
    result = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], group):
            part = weight[row, begin : begin + group]
            scale = np.float32(np.abs(part).max() / np.float32(largest))
            result[row, begin : begin + group] = np.clip(np.rint(part / scale), -largest, largest) * scale
    return result


@pytest.mark.parametrize(("name", "largest", "group"), [("int8", 127, None), ("int4", 7, 32), ("int4:8", 7, 8)])
def test_the_quantised_model_lies_at_one(tiny: js.Model, name: str, largest: int, group: int | None) -> None:
    moved = named_leaves(js.model_at(tiny, [f"quantisation:{name}"], [1.0]).params)
    for key, weight in named_leaves(tiny.params).items():
        weight = np.asarray(weight)
        is_rounded = "layers" in key and "norm" not in key
        expected = quantised(weight, largest, group or weight.shape[1]) if is_rounded else weight
        np.testing.assert_allclose(moved[key], expected, atol=1e-6, err_msg=key)
        assert is_rounded == bool((moved[key] != weight).any())


def test_a_quantisation_has_the_name_that_it_was_made_from() -> None:
    for name in ("quantisation:int8", "quantisation:int4", "quantisation:int4:128", "quantisation:int8:64"):
        assert str(parse_direction(name)) == name
    assert str(parse_direction("quantisation:int4:32")) == "quantisation:int4"


@pytest.mark.parametrize("option", ["int3", "int4:0", "int4:x", "8"])
def test_quantisations_that_are_none(option: str) -> None:
    with pytest.raises(js.UserError, match=f"Cannot read the quantisation '{option}': write int8 or int4"):
        parse_direction(f"quantisation:{option}")


def test_groups_that_do_not_divide_a_row_are_a_user_error(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="Groups of 48 weights do not divide the 64 inputs of"):
        js.make_directions(["quantisation:int4:48"], tiny)
