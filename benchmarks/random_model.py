"""Models of the shapes of large ones with random weights, and prompts for them."""

import random
import time
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # to try this program without a GPU
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 30000,
        "tie_word_embeddings": True,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
SHAPES["8b-quarter"] = SHAPES["8b"] | {"num_hidden_layers": 8}  # compiles in a quarter of the time
"""The sizes of SmolLM2-135M, Llama-3.2-1B and Llama-3-8B, in the spelling of transformers."""

COMMON: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPENING = " ".join(f"w{i}" for i in range(5, 29))
"""The words with which the chat template begins each prompt."""


def random_model(shape: str, dtype: str) -> Any:
    """A `Model` of a shape with random weights; each word w0, w1, … is a token."""
    import jax
    import jax.numpy as jnp
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from jaxscape.models.checkpoint import named_leaves, tree_of
    from jaxscape.models.decoder import parameter_shapes
    from jaxscape.models.families import from_transformers
    from jaxscape.models.model import Model

    settings = transformers.LlamaConfig(**SHAPES[shape], **COMMON)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(settings.vocab_size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w3"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}w1 " + OPENING + " {{ m['content'] }} w30 {% endfor %}"
        "{% if add_generation_prompt %}w31 w32{% endif %}"
    )
    config = from_transformers(settings)
    draw = jax.jit(lambda key, shape: (jax.random.normal(key, shape) * 0.02).astype(dtype), static_argnums=1)
    params = {
        name: jnp.ones(leaf.shape, dtype) if "norm" in name else draw(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(named_leaves(parameter_shapes(config)).items())
    }
    return Model(shape, config, tree_of(params), tokenizer, (2,), settings)


def random_prompts(count: int) -> list[str]:
    """Prompts of 8 to 30 words."""
    choice = random.Random(1)
    return [" ".join(f"w{choice.randrange(100, 30000)}" for _ in range(choice.randint(8, 30))) for _ in range(count)]


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def lap(self) -> float:
        started, self._started = self._started, time.perf_counter()
        return self._started - started
