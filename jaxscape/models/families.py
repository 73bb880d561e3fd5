"""The model families: how the decoder's options follow from a transformers configuration of each family.

`docs/how-to/add-a-model-family.md` says how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from jaxscape.models.config import NORMS_AFTER, NORMS_AROUND, LayerKind, ModelConfig
from jaxscape.models.rope import Rope, make_rope
from jaxscape.runtime.errors import UserError

Options = dict[str, Any]
"""Arguments of `ModelConfig`, by name."""

# Fields of a configuration that may have any value, because they do not change the logits, with the reason. All other
# fields that nothing reads must have their default values.
_IGNORED_FIELDS = {
    # They name the model, its files and the programs that wrote it. Code that `auto_map` names is never run.
    *("_name_or_path", "model_name", "model_type", "architectures", "auto_map", "tokenizer_class", "_commit_hash"),
    *("transformers_version", "unsloth_fixed", "unsloth_version", "is_llama_config", "transformers.js_config"),
    # The dtype is an option of `load_model`.
    *("dtype", "torch_dtype"),
    # Special tokens are read from the tokenizer and from `eos_token_id` itself.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    # They concern only training: dropout, noise, recomputation, initial values.
    *("attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "hidden_dropout", "dropout"),
    *("initializer_range", "neftune_noise_alpha", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    # They choose how attention is computed, with the same result up to rounding, or split products over devices.
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("use_flash_attn", "use_flash_attention", "use_flash_attention_2", "_flash_attn_2_enabled", "use_sdpa"),
    *("chunk_size_feed_forward", "pretraining_tp"),
    # They choose the cache and the form of transformers' outputs.
    *("use_cache", "cache_implementation", "hybrid_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("torchscript", "num_logits_to_keep"),
    # They set limits of tokenizers and of generation, or say how other programs sample; a run has options for that.
    *("model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side", "max_sequence_length"),
    *("max_seq_length", "max_seq_len", "seq_length", "max_length", "min_length", "max_new_tokens", "do_sample"),
    *("temperature", "top_p", "top_k", "typical_p", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("early_stopping", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    # They belong to classifiers and to other tasks.
    *(
        "classifier_dropout",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "is_encoder_decoder",
        "task_specific_params",
    ),
    # transformers computes other fields from them, or has them for its own checks.
    *("default_theta", "layer_type_validation"),
    # Phi-4-mini has them, and no code reads them.
    *("full_attn_mod", "interpolate_factor"),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class ConfigReader:
    """A transformers configuration that records which of its fields were read, so that a field that nothing reads is
    not ignored by mistake (see `_check_unread_fields`)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config, self.fields_read = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.fields_read.add(name)
        return getattr(self._config, name)

    def get(self, name: str) -> Any:
        """The field, or None if the configuration does not have it."""
        self.fields_read.add(name)
        return getattr(self._config, name, None)


@dataclass(frozen=True)
class Family:
    """A model family: all models that one class of transformers can load.

    Attributes:
        architecture: the name of the class.
        options: a function from a configuration to the arguments of `ModelConfig` in which the family differs from
            Llama without biases.
        derived_from: fields of the configuration that `options` does not read, because transformers computes other
            fields from them, which it does read.
    """

    architecture: str
    options: Callable[[ConfigReader], Options]
    derived_from: tuple[str, ...] = ()


def _attention_biases(c: ConfigReader) -> Options:
    return {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias}


def _llama(c: ConfigReader) -> Options:
    return _attention_biases(c) | {"mlp_bias": c.mlp_bias}


def _mistral(c: ConfigReader) -> Options:
    return {"layers": (LayerKind(_rope(c), c.sliding_window),)}


def _qwen2(c: ConfigReader) -> Options:
    return {"qkv_bias": True, "layers": _layers_by_type(c)}


def _qwen3(c: ConfigReader) -> Options:
    return _qwen2(c) | _attention_biases(c) | {"qk_norm": "head"}


def _gemma2(c: ConfigReader) -> Options:
    return _attention_biases(c) | {
        "layers": _layers_by_type(c),
        "activation": _activation(c, "hidden_activation"),
        "norms": NORMS_AROUND,
        "norm_offset": 1.0,
        "norm_in_float32": True,
        "embedding_scale": c.hidden_size**0.5,
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "attention_softcap": c.attn_logit_softcapping,
        "logit_softcap": c.final_logit_softcapping,
    }


def _gemma3(c: ConfigReader) -> Options:
    # transformers has this field but ignores it, so it is not known what a model that sets it should compute.
    if c.attn_logit_softcapping:
        raise _unsupported({"attn_logit_softcapping": c.attn_logit_softcapping})
    return _gemma2(c) | {"qk_norm": "head"}


def _phi3(c: ConfigReader) -> Options:
    return {"is_fused": True, "layers": (LayerKind(_rope(c, may_be_partial=True), c.sliding_window),)}


def _smollm3(c: ConfigReader) -> Options:
    if len(c.no_rope_layers) < c.num_hidden_layers:
        raise _unsupported({"no_rope_layers": c.no_rope_layers})
    kinds = zip(c.no_rope_layers, _layers_by_type(c), strict=False)  # no_rope_layers may have more entries than layers
    layers = tuple(kind if has_rope else replace(kind, rope=None) for has_rope, kind in kinds)
    return _attention_biases(c) | {"mlp_bias": c.mlp_bias, "layers": layers}


def _olmo2(c: ConfigReader) -> Options:
    return _attention_biases(c) | {"norms": NORMS_AFTER, "qk_norm": "heads", "norm_in_float32": True}


_WINDOWS = ("use_sliding_window", "max_window_layers")
_GEMMA = ("hidden_act", "sliding_window_size")
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _WINDOWS),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _WINDOWS),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _GEMMA),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, (*_GEMMA, *_PATTERNS)),
    "phi3": Family("Phi3ForCausalLM", _phi3, ("original_max_position_embeddings", "partial_rotary_factor")),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, (*_WINDOWS, "no_rope_layer_interval")),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2),
}
"""The supported families, by the `model_type` in config.json."""
_VISION = ("vision_tower.", "multi_modal_projector.")
TEXT_MODELS = {"gemma3": (*_VISION, *(f"model.{part}" for part in _VISION))}
"""For each `model_type` of multimodal models whose text model can be loaded: the beginnings of its other tensors'
names."""


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`; a `UserError` if it is not supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"The model's architecture is {model_type!r}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def from_transformers(config: PreTrainedConfig) -> ModelConfig:
    """The decoder's configuration for a transformers model.

    Raises:
        UserError: the family, or an option in its configuration, is not supported.
    """
    family, c = family_of(config.model_type), ConfigReader(config)
    options = family.options(c)
    if "layers" not in options:
        options["layers"] = (LayerKind(_rope(c)),)
    if "activation" not in options:
        options["activation"] = _activation(c, "hidden_act")
    decoder_config = ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=_head_dim(c),
        max_positions=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        **options,
    )
    _check_unread_fields(config, {*c.fields_read, *family.derived_from, *_IGNORED_FIELDS})
    return decoder_config


def _check_unread_fields(config: PreTrainedConfig, known_fields: set[str]) -> None:
    """Raise a `UserError` if a field that is not in `known_fields` differs from its default, and so may change the
    logits.

    A field that is None, False, zero or empty counts as switched off, so these values are equal to each other. Only
    `is_causal` is switched on where it is missing.
    """
    default = type(config)().to_dict() | {"is_causal": True}
    unread = {name: getattr(config, name, None) for name in config.to_dict().keys() - known_fields}
    changed = {name: unread[name] for name in sorted(unread) if (unread[name] or None) != (default.get(name) or None)}
    if changed:
        raise _unsupported(changed)


def _unsupported(options: Options) -> UserError:
    """The error that lists options of a configuration that are not supported."""
    unsupported = ", ".join(f"{name}={value!r}"[:100] for name, value in options.items())
    return UserError(f"The model's configuration has options that are not supported: {unsupported}.")


def _activation(c: ConfigReader, field: str) -> str:
    """The activation function that a field of the configuration names, by its name in `ModelConfig`."""
    name = getattr(c, field)
    if name not in _ACTIVATIONS:
        raise _unsupported({field: name})
    return _ACTIVATIONS[name]


def _head_dim(c: ConfigReader) -> int:
    size: int = c.get("head_dim") or c.hidden_size // c.num_attention_heads
    return size


def _rope(c: ConfigReader, layer_type: str | None = None, may_be_partial: bool = False) -> Rope:
    """The RoPE of the layers of type `layer_type`, or the one RoPE of all layers if they share it."""
    c.standardize_rope_params()  # transformers calls it too, when it builds the model
    options = c.rope_parameters
    if layer_type is not None and layer_type in options:
        options = options[layer_type]
        # transformers ignores `truncate` inside of a layer type, so it is not known what the model should compute.
        if not options.get("truncate", True):
            raise _unsupported({"truncate": options["truncate"]})
    return make_rope(_head_dim(c), options, c.max_position_embeddings, may_be_partial)


def _layers_by_type(c: ConfigReader) -> tuple[LayerKind, ...]:
    """The kind of each layer, local or global, as the configuration's `layer_types` lists them."""
    kinds = {
        "full_attention": LayerKind(_rope(c, "full_attention")),
        "sliding_attention": LayerKind(_rope(c, "sliding_attention"), c.sliding_window),
    }
    if unknown := sorted(set(c.layer_types) - kinds.keys()):
        raise _unsupported({"layer_types": unknown})
    if "sliding_attention" in c.layer_types and c.sliding_window is None:
        raise _unsupported({"layer_types": ["sliding_attention"], "sliding_window": None})
    return tuple(kinds[name] for name in c.layer_types)
