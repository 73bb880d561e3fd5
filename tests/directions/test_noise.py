"""Standard normal noise: its bits are those of JAX on every mesh, and drawing it on a CPU takes no memory beside it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxscape as js
from jaxscape.directions.noise import standard_normal, threefry
from jaxscape.directions.point import materialise, materialise_by_tensor
from jaxscape.directions.random import random_direction, tensor_key
from jaxscape.models.checkpoint import named_leaves
from jaxscape.runtime.sharding import MeshShape, make_mesh

# Known answers of Threefry-2x32 with 20 rounds, from the tests of Random123: counter, key and result.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_threefry_gives_the_known_answers(
    counter: tuple[int, int], key: tuple[int, int], result: tuple[int, int]
) -> None:
    x0, x1 = (jnp.array([part], jnp.uint32) for part in counter)
    assert tuple(int(part[0]) for part in threefry(jnp.array(key, jnp.uint32), x0, x1)) == result


@pytest.mark.parametrize("shape", [(1,), (77,), (33, 16), (4, 3, 10)])
@pytest.mark.parametrize("axis", [None, "q"])
def test_the_noise_has_the_bits_of_jax_on_every_mesh(shape: tuple[int, ...], axis: str | None) -> None:
    mesh = make_mesh(MeshShape(), 1) if axis is None else make_mesh(MeshShape(1, 2), 1)
    spec = PartitionSpec(*(None,) * (len(shape) - 1), axis if shape[-1] % 2 == 0 else None)
    key = tensor_key(3, "model.embed_tokens.weight")
    drawn = jax.jit(standard_normal, static_argnums=(1, 2))(key, shape, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(drawn, jax.random.normal(key, shape))


@pytest.mark.cpu
def test_drawing_on_a_cpu_takes_no_memory_beside_the_noise() -> None:
    shape = (512, 1024)
    sharding = NamedSharding(make_mesh(MeshShape(), 1), PartitionSpec())
    compiled = jax.jit(standard_normal, static_argnums=(1, 2)).lower(tensor_key(0, "a"), shape, sharding).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * math.prod(shape) / 100


@pytest.mark.parametrize("mesh_shape", [MeshShape(), MeshShape(1, 2)])
def test_a_point_drawn_tensor_by_tensor_is_the_point_of_the_stored_direction(
    mesh_shape: MeshShape, make_model: Any
) -> None:
    model = js.load_model(make_model()[0], "float32", mesh_shape=mesh_shape)
    stored, drawn = (random_direction(model, 0, storage=storage) for storage in ("exact", "seed"))
    assert not any(leaf.size > model.config.hidden_size for leaf in jax.tree.leaves(drawn)), "only norms are arrays"
    previous = None
    for c in (0.35, -0.2, 0.05):
        coords = np.array([c], np.float32)
        previous = materialise_by_tensor(model.params, [drawn], coords, previous, shardings=model.shardings)
        expected = named_leaves(materialise(model.params, [stored], coords))
        for name, tensor in named_leaves(previous).items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
