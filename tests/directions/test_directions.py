"""Directions and the model at a point."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import assert_same_tree
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

import jaxscape as js
from jaxscape.directions.point import materialise
from jaxscape.models.checkpoint import named_leaves


def inner(a: Any, b: Any) -> float:
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_each_tensor_has_the_norm_of_the_one_it_perturbs_and_norms_are_left_alone(make_model: Any) -> None:
    model = js.load_model(make_model(attention_bias=True, mlp_bias=True)[0], "float32")
    direction = named_leaves(js.random_direction(model, seed=0))
    weights = named_leaves(model.params)
    assert direction.keys() == weights.keys()
    for name, leaf in direction.items():
        if "norm" in name:
            assert not leaf.any()
        else:
            np.testing.assert_allclose(np.linalg.norm(leaf), np.linalg.norm(weights[name]), rtol=1e-5, err_msg=name)
            assert abs(float(leaf.mean())) < 4 * float(leaf.std()) / leaf.size**0.5
    assert any("bias" in name and leaf.any() for name, leaf in direction.items())


def test_a_tied_embedding_is_one_tensor(make_model: Any) -> None:
    model = js.load_model(make_model(tie_word_embeddings=True)[0], "float32")
    assert not any("lm_head" in name for name in named_leaves(js.random_direction(model, seed=0)))


def test_a_tensors_noise_depends_on_seed_name_and_shape_alone(tiny: js.Model, make_model: Any) -> None:
    """The same in another model that has that tensor, whatever else it has; another for another seed or name."""
    other = js.load_model(make_model(seed=5, num_hidden_layers=3, attention_bias=True)[0], "float32")
    ours, theirs = named_leaves(js.random_direction(tiny, 4)), named_leaves(js.random_direction(other, 4))
    again, another = named_leaves(js.random_direction(tiny, 4)), named_leaves(js.random_direction(tiny, 5))
    name, sibling = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"

    def unit(leaf: Any) -> np.ndarray:
        return np.asarray(leaf / np.linalg.norm(leaf))

    np.testing.assert_array_equal(ours[name], again[name])
    np.testing.assert_allclose(unit(ours[name]), unit(theirs[name]), rtol=1e-5)
    for different in (another[name], ours[sibling]):
        assert abs(np.vdot(unit(ours[name]), unit(different))) < 0.1


def test_the_noise_is_that_of_the_first_release(tiny: js.Model) -> None:
    """A seed in a paper must name the same direction tomorrow: the values are fixed."""
    leaf = named_leaves(js.random_direction(tiny, 0))["model.layers.0.self_attn.q_proj.weight"]
    weight = named_leaves(tiny.params)["model.layers.0.self_attn.q_proj.weight"]
    unit = np.asarray(leaf) * np.sqrt(leaf.size) / np.linalg.norm(weight)
    np.testing.assert_allclose(unit[0, :3], [0.49255350, 1.36545502, -0.76969722], rtol=1e-4)


@pytest.mark.cpu
def test_noise_is_bit_identical_on_many_devices() -> None:
    """Drawn on one device, and sharded over eight."""
    script = """
import jax, numpy as np
import jaxscape as js
from jax.sharding import NamedSharding, PartitionSpec
from jaxscape.directions.random import tensor_key
assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("x",))
draw = lambda key: jax.random.normal(key, (64, 32), "float32")
sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec("x")))
key = tensor_key(3, "model.layers.0.mlp.up_proj.weight")
np.testing.assert_array_equal(sharded(key), jax.jit(draw)(key))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_second_direction_can_be_made_orthogonal_to_a_first(tiny: js.Model) -> None:
    first = js.random_direction(tiny, 0)
    second = js.random_direction(tiny, 1, orthogonal_to=first)
    plain = js.random_direction(tiny, 1)
    square = inner(first, first)
    assert abs(inner(first, second)) < 1e-5 * square
    assert abs(inner(first, plain)) > 1e-4 * square
    np.testing.assert_allclose(inner(second, second), square, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert abs(np.vdot(a, b)) <= 1e-5 * np.vdot(a, a)


def test_a_point_is_the_model_plus_its_steps(tiny: js.Model) -> None:
    first, second = js.random_direction(tiny, 0), js.random_direction(tiny, 1)
    point = materialise(tiny.params, [first, second], jnp.array([0.25, -0.5]))
    expected = jax.tree.map(lambda w, a, b: w + 0.25 * a - 0.5 * b, tiny.params, first, second)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), point, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_centre_is_the_model_to_the_bit_after_any_walk(tiny_dir: Path, dtype: str) -> None:
    model = js.load_model(tiny_dir, dtype)
    direction = js.random_direction(model, 0)
    point = None
    for c in (0.5, -0.3, 0.0):
        point = materialise(model.params, [direction], jnp.array([c]), point)
    assert_same_tree(point, model.params)


def test_the_last_points_buffers_are_reused(tiny: js.Model) -> None:
    direction = js.random_direction(tiny, 0)
    first = materialise(tiny.params, [direction], jnp.array([0.1]))
    materialise(tiny.params, [direction], jnp.array([0.2]), first)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((tiny.params, direction)))


def test_points_do_not_recompile(tiny: js.Model) -> None:
    direction, point = js.random_direction(tiny, 0), None
    for c in (0.1, 0.2):  # the first point has no buffers to reuse, the second has
        point = materialise(tiny.params, [direction], jnp.array([c]), point)
    compiled = materialise._cache_size()
    for c in (0.3, 0.4, 0.5):
        point = materialise(tiny.params, [direction], jnp.array([c]), point)
    assert materialise._cache_size() == compiled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_directions_come_back_bit_for_bit(tiny_dir: Path, tmp_path: Path, dtype: str) -> None:
    model = js.load_model(tiny_dir, dtype)
    direction = js.random_direction(model, 0)
    js.save_direction(direction, tmp_path / "d.safetensors", model)
    assert_same_tree(js.load_direction(tmp_path / "d.safetensors", model), direction)


def test_other_tools_can_add_a_saved_direction(make_model: Any, tmp_path: Path) -> None:
    """torch adds it to its own state dictionary by name, and computes what jaxscape computes at that point."""
    directory, torch_model = make_model()
    model = js.load_model(directory, "float32")
    direction = js.random_direction(model, 0)
    js.save_direction(direction, tmp_path / "d.safetensors", model)
    steps = load_torch_file(tmp_path / "d.safetensors")
    state = torch_model.state_dict()
    moved = type(torch_model)(torch_model.config).eval()
    moved.load_state_dict({name: state[name] + 0.1 * steps[name] for name in state})
    tokens = np.arange(3, 20)[None]
    with torch.no_grad():
        expected = moved(torch.tensor(tokens)).logits.numpy()
    point = js.Model(**{**vars(model), "params": materialise(model.params, [direction], jnp.array([0.1]))})
    assert np.abs(point(tokens) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_direction_of_another_model_is_refused_by_the_tensors_names(tiny: js.Model, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    js.save_direction(js.random_direction(tiny, 0), path, tiny)
    tensors = load_file(path)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)
    tensors["strange"] = tensors.pop("lm_head.weight")
    save_file(tensors, path)
    with pytest.raises(js.UserError) as error:
        js.load_direction(path, tiny)
    for part in ("missing lm_head.weight", "not expected strange", "model.norm.weight has shape (5,) instead of (32,)"):
        assert part in str(error.value)


def test_unreadable_and_unwritable_files_are_user_errors(tiny: js.Model, tmp_path: Path) -> None:
    direction = js.random_direction(tiny, 0)
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors at all")
    for path in (tmp_path / "bad.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(js.UserError, match="cannot be read"):
            js.load_direction(path, tiny)
    with pytest.raises(js.UserError, match="cannot be written"):
        js.save_direction(direction, tmp_path / "no" / "d.safetensors", tiny)
    with pytest.raises(js.UserError, match=r"missing lm_head.weight"):
        js.save_direction({"model": direction["model"]}, tmp_path / "d.safetensors", tiny)
