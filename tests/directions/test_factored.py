"""Tensors of low rank that are stored as factors, and random directions of low rank."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MakeModel, assert_same_tree

import jaxscape as js
from jaxscape.directions.low_rank import LowRank, low_rank_direction
from jaxscape.directions.point import materialise
from jaxscape.directions.storage import Direction, Factored, dense, inner, on_model_mesh, stored, zero_tensor
from jaxscape.models.checkpoint import fingerprint, named_leaves, tree_of
from jaxscape.runtime.sharding import MeshShape


def assert_same_leaves(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def dense_tree(direction: Direction) -> Any:
    return tree_of({name: dense(tensor) for name, tensor in named_leaves(direction).items()})


@pytest.mark.parametrize(("left", "right"), [((3, 2), (2, 5)), ((3, 9), (9, 5)), ((4, 0), (0, 5)), ((4, 1), (1,))])
def test_a_factored_tensor_is_the_product_of_its_factors(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = (np.random.default_rng(0).normal(size=shape) for shape in (left, right))
    tensor = Factored(jnp.float32(a), jnp.float32(b))
    assert tensor.shape == (a @ b).shape
    assert tensor.rank == left[1]
    np.testing.assert_allclose(dense(tensor), a @ b, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def direction(tiny: js.Model) -> Direction:
    return low_rank_direction(tiny, 3, seed=1)


def test_each_matrix_has_the_rank_and_the_norm_of_its_weight(tiny: js.Model, direction: Direction) -> None:
    weights = named_leaves(tiny.params)
    for name, tensor in named_leaves(direction).items():
        if weights[name].ndim == 2:
            values = np.asarray(dense(tensor), np.float64)
            assert np.linalg.matrix_rank(values, tol=1e-4) == 3
            np.testing.assert_allclose(np.linalg.norm(values), np.linalg.norm(weights[name]), rtol=1e-5)
        else:
            assert tensor.rank == 0
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(tensor)) == 0


def test_factors_depend_on_seed_name_and_shape_alone(tiny: js.Model, direction: Direction, make_model: Any) -> None:
    other = js.load_model(make_model(seed=5, num_hidden_layers=3)[0], "float32")
    theirs = named_leaves(low_rank_direction(other, 3, seed=1))
    name, sibling = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(named_leaves(direction)[name].right, theirs[name].right)
    another = named_leaves(low_rank_direction(tiny, 3, seed=2))
    for different in (another[name], named_leaves(direction)[sibling]):
        assert abs(np.corrcoef(different.right.ravel(), theirs[name].right.ravel())[0, 1]) < 0.5


def test_a_factored_direction_does_all_that_a_dense_one_does(
    tiny: js.Model, direction: Direction, tmp_path: Path
) -> None:
    whole = dense_tree(direction)
    coords = jnp.array([0.3], jnp.float32)
    points = (materialise(tiny.params, [d], coords) for d in (direction, whole))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), *points)
    for a, b in ((direction, direction), (direction, whole)):
        np.testing.assert_allclose(inner(a, b), inner(whole, whole), rtol=1e-6)
    assert fingerprint(direction) == fingerprint(low_rank_direction(tiny, 3, seed=1))
    assert fingerprint(direction) != fingerprint(low_rank_direction(tiny, 3, seed=2))
    assert_same_leaves(stored(direction, "int8"), direction)
    js.save_direction(direction, tmp_path / "d.safetensors", tiny)
    assert_same_tree(js.load_direction(tmp_path / "d.safetensors", tiny), whole)
    second = js.random_direction(tiny, 7, orthogonal_to=direction)
    assert abs(inner(direction, second)) < 1e-5 * inner(direction, direction)


def test_a_factored_direction_has_the_same_bits_on_every_mesh(make_model: MakeModel) -> None:
    """The model has one shape of matrices, for which programs are compiled."""
    directory, _ = make_model(
        vocab_size=304, hidden_size=304, intermediate_size=304, num_hidden_layers=1, num_key_value_heads=4
    )
    one, many = (js.load_model(directory, "float32", mesh_shape=shape) for shape in (MeshShape(), MeshShape(2, 4)))
    direction, there = (low_rank_direction(model, 3, seed=1) for model in (one, many))
    assert_same_leaves(there, direction)
    assert_same_leaves(on_model_mesh(direction, many), direction)
    assert inner(there, there) == inner(direction, direction)
    name = "model.layers.0.mlp.down_proj.weight"
    tensor, weight = named_leaves(there)[name], named_leaves(many.params)[name]
    np.testing.assert_array_equal(dense(tensor), dense(named_leaves(direction)[name]))
    assert tensor.right.sharding.shard_shape(tensor.right.shape) == (3, weight.sharding.shard_shape(weight.shape)[1])


def test_a_tensor_of_zeros_takes_no_memory(tiny: js.Model) -> None:
    for name, weight in named_leaves(tiny.params).items():
        tensor = zero_tensor(weight.shape, named_leaves(tiny.shardings)[name])
        assert tensor.left.nbytes == tensor.right.nbytes == 0
        np.testing.assert_array_equal(dense(tensor), jnp.zeros_like(weight))


def test_names_of_low_rank_directions(tiny: js.Model, direction: Direction) -> None:
    assert str(LowRank.parse("4:7")) == "low-rank:4:7"
    (made,) = js.make_directions(["low-rank:3:1"], tiny)
    assert_same_leaves(made, direction)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("4", "The direction 'low-rank:4' has no rank or no seed: write low-rank:RANK:SEED"),
        ("", "The direction 'low-rank:' has no rank or no seed"),
        ("x:0", "The direction 'low-rank:x:0' has no rank or no seed"),
        ("0:0", "The rank of the direction low-rank:0:0 must be at least 1"),
        ("1:4294967296", "seed"),
    ],
)
def test_names_that_are_none(option: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        LowRank.parse(option)


def test_a_rank_above_the_width_is_a_sentence(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match=r"rank 17 is not possible, because .*k_proj.* give a rank from 1 to 16"):
        LowRank(17, 0).make(tiny)
