"""The attention kernel, emulated on a CPU and compiled for a TPU, against the plain path."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MakeModel

import jaxscape as js
from jaxscape.forecast import hlo
from jaxscape.forecast.known_models import shape_config
from jaxscape.models import kernels
from jaxscape.models.loss import summed_loss
from jaxscape.runtime.sharding import MeshShape, make_mesh, on_mesh


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as an ordinary program."""
    make = kernels.splash.make_splash_mqa_single_device
    monkeypatch.setattr(kernels.splash, "make_splash_mqa_single_device", partial(make, interpret=True))


def test_outputs_and_gradients_are_those_of_attention(emulated: None) -> None:
    assert kernels.relative_error(jax.devices()[0]) < kernels.TOLERANCE / 2


@pytest.mark.cpu
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_device_attention", lambda q, k, v, is_token: q)
    with pytest.warns(UserWarning, match=r"plain attention by [\d.]+ on a cpu, more than 0\.02; it is not used"):
        assert not kernels._is_accurate.__wrapped__(jax.devices()[0])


def test_it_is_used_where_scores_are_many() -> None:
    config = shape_config("llama-2-7b")
    assert kernels.saves_traffic(config, "bfloat16", 16, 512, 4)
    assert not kernels.saves_traffic(config, "bfloat16", 16, 512, 16)
    assert not kernels.saves_traffic(config, "float32", 16, 512, 4)
    assert not kernels.saves_traffic(config, "bfloat16", 256, 192, 4), "rows are cut into blocks"
    assert not kernels.saves_traffic(replace(config, head_dim=64), "bfloat16", 16, 512, 4)
    assert not kernels.matches_reference(make_mesh(MeshShape(), 1)), "it is a CPU"


@pytest.mark.parametrize("split", [MeshShape(), MeshShape(2, 4)], ids=str)
def test_a_model_learns_the_same_with_it(
    emulated: None, monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, split: MeshShape
) -> None:
    """On a mesh too, whose devices hold a query head each, and copies of the key-value heads."""
    monkeypatch.setattr(kernels, "ON_CHIP_BYTES", 0)
    directory, _ = make_model(head_dim=128, num_hidden_layers=1, max_position_embeddings=512, initializer_range=0.1)
    model = js.load_model(directory, "bfloat16", mesh_shape=split)
    rng = np.random.default_rng(0)
    lengths = np.array([256, 140], np.int32)
    tokens = rng.integers(3, 300, (2, 256)).astype(np.int32)
    counted = (np.arange(256) < lengths[:, None]).astype(np.float32)

    def of(kernel: bool) -> tuple[float, Any]:
        def loss_of(params: Any) -> jax.Array:
            with on_mesh(model.mesh):
                return summed_loss(model.config, params, tokens, lengths, counted, remat=True, kernel=kernel)

        loss, gradient = jax.jit(jax.value_and_grad(loss_of))(model.params)
        return float(loss), jax.tree.map(lambda g: np.asarray(g, np.float32), gradient)

    (plain, expected), (loss, found) = of(False), of(True)
    assert loss != plain, "it is another program"
    assert loss == pytest.approx(plain, rel=1e-3)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)


def test_a_tpu_moves_fewer_bytes_with_it() -> None:
    pytest.importorskip("libtpu")
    from jaxscape.forecast.chips import open_slice
    from jaxscape.forecast.compile import compile_program

    where = jax.sharding.SingleDeviceSharding(open_slice("v5e:2x2").devices[0])
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in ((4, 8, 4, 512, 128), (4, 8, 512, 128))
    )

    def bytes_of(attend: Any) -> float:
        def total(*x: Any) -> jax.Array:
            return attend(*x, jnp.ones((4, 512), bool)).astype(jnp.float32).sum()

        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k)
        return compile_program(lowered, hlo.program_traffic).hbm_bytes

    assert bytes_of(kernels.attention) < 0.3 * bytes_of(kernels._plain_attention)
