"""The decoder against transformers' Llama, computed by torch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LLAMA3_ROPE, torch_logits

import jaxscape as js
from jaxscape.models.cache import Context, KVCache
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.decoder import forward

CONFIGS = {
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "wide heads": {"head_dim": 24, "rms_norm_eps": 1e-3},
}


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 300, shape)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_transformers(make_model: Any, options: dict[str, Any]) -> None:
    directory, torch_model = make_model(seed=1, **options)
    model = js.load_model(directory, "float32")
    tokens = random_tokens((3, 100))
    expected = torch_logits(torch_model, tokens)
    logits = model(tokens)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.008)])
def test_logits_in_16_bits_are_near_those_in_float32(make_model: Any, dtype: str, tolerance: float) -> None:
    directory, torch_model = make_model(initializer_range=0.1)
    model = js.load_model(directory, dtype)
    assert all(leaf.dtype == jnp.dtype(dtype) for leaf in jax.tree.leaves(model.params))
    tokens = random_tokens((2, 30))
    expected = torch_logits(torch_model, tokens)
    logits = model(tokens)
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-6 < difference < tolerance


def test_tokens_one_by_one_through_the_cache_give_the_logits_of_the_whole_text(tiny: js.Model) -> None:
    tokens = random_tokens((2, 12))
    run = jax.jit(partial(forward, tiny.config))
    logits, cache = run(tiny.params, tokens[:, :5], jnp.broadcast_to(jnp.arange(5), (2, 5)))
    cache = KVCache(
        keys=tuple(jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, 7))) for k in cache.keys),
        values=tuple(jnp.pad(v, ((0, 0), (0, 0), (0, 7), (0, 0))) for v in cache.values),
        positions=jnp.pad(cache.positions, ((0, 0), (0, 7)), constant_values=-1),
    )
    steps = [logits]
    for slot in range(5, 12):
        context = Context(cache, slot)
        logits, cache = run(tiny.params, tokens[:, slot : slot + 1], jnp.full((2, 1), slot), context)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), tiny(tokens), atol=2e-4)


def test_padding_on_either_side_changes_nothing(tiny: js.Model) -> None:
    tokens = random_tokens((1, 6))
    expected = tiny(tokens)[0]
    for left, right in [(3, 0), (0, 3), (2, 2)]:
        padded = np.pad(tokens, ((0, 0), (left, right)))
        positions = np.pad(np.arange(6)[None], ((0, 0), (left, right)), constant_values=-1)
        logits, _ = forward(tiny.config, tiny.params, jnp.asarray(padded), jnp.asarray(positions))
        np.testing.assert_allclose(logits[0, left : left + 6], expected, atol=2e-4)


@jax.tree_util.register_pytree_node_class
class Sum:
    """A weight that is a sum, W + c D, as a user of the decoder may define one."""

    def __init__(self, weight: Any, c: Any, direction: Any) -> None:
        self.parts = (weight, c, direction)

    def tree_flatten(self) -> tuple[Any, None]:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> "Sum":
        return cls(*parts)

    def apply(self, use: Any) -> Any:
        weight, c, direction = self.parts
        return use(weight) + c * use(direction)


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_a_weight_may_be_a_sum_and_points_may_be_vmapped(make_model: Any, options: dict[str, Any]) -> None:
    """The seam: every weight replaced by a sum gives the logits of the summed weights, the model unchanged."""
    model = js.load_model(make_model(seed=3, **options)[0], "float32")
    direction = js.random_direction(model, seed=0)
    tokens = jnp.asarray(random_tokens((2, 9)))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

    def logits_at(c: Any) -> Any:
        weights, steps = named_leaves(model.params), named_leaves(direction)
        summed = tree_of({name: Sum(weights[name], c, steps[name]) for name in weights})
        return forward(model.config, summed, tokens, positions)[0]

    coords = jnp.array([-0.2, 0.0, 0.3])
    for c, logits in zip(coords, jax.vmap(logits_at)(coords), strict=True):
        moved = jax.tree.map(lambda w, d, c=c: w + c * d, model.params, direction)
        expected = forward(model.config, moved, tokens, positions)[0]
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_heads_that_do_not_divide_are_refused(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="not a multiple"):
        type(tiny.config)(**{**vars(tiny.config), "num_kv_heads": 3})
