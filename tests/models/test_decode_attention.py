"""The kernel for the attention of a decode step, emulated on a CPU, against plain attention."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.models import decode_attention
from jaxscape.models.decode_attention import TOLERANCES, attention, plain_attention, relative_error
from jaxscape.runtime.sharding import MeshShape, make_mesh, on_mesh, replicated


def arrays(seed: int, batch: int, heads: int, group: int, dim: int, sizes: list[tuple[int, int]]) -> tuple[Any, Any]:
    """Queries, and keys and values of sources with these numbers of rows and of slots."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((batch, heads, group, dim)), jnp.float32)
    sources = [
        tuple(jnp.asarray(rng.standard_normal((rows, heads, slots, dim)), jnp.float32) for _ in range(2))
        for rows, slots in sizes
    ]
    return q, sources


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_it_is_within_its_tolerance_of_plain_attention(dtype: str, head_dim: int) -> None:
    assert 0 < relative_error(jax.devices()[0], dtype, head_dim, interpret=True) < TOLERANCES[dtype] / 2


@settings(max_examples=15)
@given(
    batch=st.sampled_from([2, 4]),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 17]),
    dim=st.sampled_from([8, 24]),
    slots=st.lists(st.sampled_from([1, 5, 64, 70]), min_size=1, max_size=2),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_masks(
    batch: int, heads: int, group: int, dim: int, slots: list[int], softcap: float | None, seed: int
) -> None:
    q, sources = arrays(seed, batch, heads, group, dim, [(1 + i, size) for i, size in enumerate(slots)])
    visible = np.random.default_rng(seed).random((batch, sum(slots))) < 0.5
    visible[:, 0] = True
    chosen = {"scale": dim**-0.5, "softcap": softcap}
    y = attention(q, sources, jnp.asarray(visible), **chosen)
    expected = plain_attention(q, [x for source in sources for x in source], jnp.asarray(visible), **chosen)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_gets_zeros_and_what_is_hidden_does_no_harm() -> None:
    q, [(keys, values)] = arrays(0, 2, 1, 2, 8, [(2, 10)])
    visible = jnp.asarray(np.array([[False] * 10, [True] * 4 + [False] * 6]))
    spoiled = (keys.at[:, :, 4:].set(jnp.nan), values.at[:, :, 4:].set(jnp.inf))
    y = attention(q, [spoiled], visible, scale=1.0, softcap=None)
    assert (y[0] == 0).all()
    np.testing.assert_array_equal(y, attention(q, [(keys, values)], visible, scale=1.0, softcap=None))


def test_a_visible_value_that_is_not_a_number_spoils_its_own_row_only() -> None:
    q, [(keys, values)] = arrays(1, 2, 1, 2, 8, [(2, 10)])
    visible = jnp.ones((2, 10), bool)
    y = attention(q, [(keys, values.at[0, 0, 3].set(jnp.nan))], visible, scale=1.0, softcap=None)
    assert jnp.isnan(y[0]).any()
    np.testing.assert_array_equal(y[1], attention(q, [(keys, values)], visible, scale=1.0, softcap=None)[1])


def test_on_a_mesh_each_device_computes_its_part() -> None:
    q, sources = arrays(2, 4, 2, 2, 8, [(2, 5), (4, 12)])
    visible = jnp.asarray(np.random.default_rng(0).random((4, 17)) < 0.7)
    mesh = make_mesh(MeshShape(2, 4), 2)

    @jax.jit
    def sharded(*given: Any) -> Any:
        with on_mesh(mesh):
            return attention(*given, scale=0.3, softcap=None)

    expected = attention(q, sources, visible, scale=0.3, softcap=None)
    placed = jax.device_put((q, sources, visible), replicated(mesh))
    np.testing.assert_allclose(sharded(*placed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_is_lowered_for_a_gpu(dtype: str) -> None:
    shape = partial(jax.ShapeDtypeStruct, dtype=dtype)
    keys = [shape((rows, 2, slots, 96)) for rows, slots in ((2, 20), (2, 20), (8, 100), (8, 100))]
    run = partial(decode_attention._device_attention, scale=1.0, softcap=30.0, interpret=False)
    traced = jax.jit(run).trace(shape((8, 2, 4, 96)), jax.ShapeDtypeStruct((8, 120), jnp.int8), *keys)
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.cpu
def test_it_is_not_used_elsewhere_or_where_it_is_wrong_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    assert not decode_attention.matches_reference(make_mesh(MeshShape(), 1), "float32", 64), "it is a CPU"
    is_accurate = decode_attention._is_accurate.__wrapped__
    with pytest.warns(UserWarning, match="does not run on a cpu: Only interpret mode"):
        assert not is_accurate(device, "float32", 64)
    monkeypatch.setattr(decode_attention, "_device_attention", lambda q, *_, **__: q)
    with pytest.warns(UserWarning, match=r"plain attention by [\d.]+ on a cpu, more than 0\.0001; it is not used"):
        assert not is_accurate(device, "float32", 64)
