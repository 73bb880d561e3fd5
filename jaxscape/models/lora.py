"""Low-rank adapters (Hu et al., arXiv 2106.09685), read and written in the format of Hugging Face's PEFT."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from jaxscape.models.checkpoint import Checkpoint, Params, map_shards, named_leaves, tree_of
from jaxscape.models.huggingface import HUB_ID, read_json
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# The fused matrices of some families, and the linear layers that each of them consists of.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PEFT_PREFIX = "base_model.model."

# PEFT's options that must have one of these values, and those that may have any. Every other option must be off:
# None, false, zero or empty.
_SUPPORTED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # other values change the base model
}
_FREE_OPTIONS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}

Factors = dict[str, dict[str, Any]]
"""The factors `a` [rank, in] and `b` [out, rank] of each adapted weight, by its Hugging Face name."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank change of a base model's weights: W + alpha / rank · b a.

    Attributes:
        base: the base model, as `load_model` takes it.
        targets: names of the linear layers that the adapter changes, such as `q_proj`.
    """

    base: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    factors: Factors

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class LoraWeight:
    """A linear layer's weight W + s b a, kept as its parts: x (W + s b a)ᵀ = x Wᵀ + s (x aᵀ) bᵀ."""

    weight: Float[Array, "out in"]
    a: Float[Array, "rank in"]
    b: Float[Array, "out rank"]
    scale: float

    def apply(self, use: Callable[[Array], Array]) -> Array:
        """Apply `use` to the sum of the parts.

        Every use of a linear layer's weight W is a product x Wᵀ, so `use(a)` is x aᵀ.
        """
        low_rank = use(self.a)
        return use(self.weight) + self.scale * jnp.einsum(
            "...r,or->...o", low_rank, self.b, precision=jax.lax.Precision.HIGHEST
        )


def init_factors(params: Params, targets: tuple[str, ...], rank: int, key: Array) -> Factors:
    """Float32 factors of an adapter that does not change the model yet: `a` is uniform in ±1/√in, `b` is zero, as in
    PEFT.

    Arguments:
        targets: names of linear layers. If a family fuses a target with others, the fused matrix is adapted.

    Raises:
        UserError: the rank is not positive, or a target is not a linear layer of the model.
    """
    if rank < 1:
        raise UserError(f"The LoRA rank must be at least 1, not {rank}.")
    linear = {name: leaf for name, leaf in named_leaves(params).items() if leaf.ndim == 2 and "embed" not in name}
    target_names = {name: {module_name(name), *FUSED.get(module_name(name), ())} for name in linear}
    weights = {name: leaf for name, leaf in linear.items() if target_names[name] & set(targets)}
    if missing := sorted(set(targets).difference(*(target_names[name] for name in weights))):
        choice = ", ".join(sorted(set(map(module_name, linear))))
        raise UserError(f"The model has no linear layers named {', '.join(missing)}; choose among {choice}.")
    factors = {}
    for number, (name, weight) in enumerate(weights.items()):
        rows, columns = weight.shape
        limit = 1 / math.sqrt(columns)
        a = jax.random.uniform(jax.random.fold_in(key, number), (rank, columns), jnp.float32, -limit, limit)
        factors[name] = {"a": a, "b": jnp.zeros((rows, rank), jnp.float32)}
    return factors


def attach(params: Params, factors: Factors, scale: float) -> Params:
    """The parameters with each adapted weight as a `LoraWeight`, for training. The factors are cast to the weights'
    dtype."""
    leaves = named_leaves(params)
    adapted = {}
    for name, pair in factors.items():
        a, b = (pair[key].astype(leaves[name].dtype) for key in ("a", "b"))
        adapted[name] = LoraWeight(leaves[name], a, b, scale)
    return tree_of(leaves | adapted)


def merge(checkpoint: Checkpoint, adapter: Adapter, dtype: jnp.dtype, origin: str) -> Checkpoint:
    """The checkpoint with the adapter added to its tensors when they are read.

    The tensors are rounded to `dtype` before the adapter is added, because the adapter was trained on such a base.

    Arguments:
        origin: the directory of the adapter.

    Raises:
        UserError: the adapter changes tensors that the checkpoint does not have, or has in another shape.
    """
    problems = []
    for name, pair in adapter.factors.items():
        shape = (pair["b"].shape[0], pair["a"].shape[1])
        if name not in checkpoint.shapes:
            problems.append(f"it changes {name}, which the model does not have")
        elif checkpoint.shapes[name] != shape:
            problems.append(
                f"it changes {name} with shape {shape}, but the model's has shape {checkpoint.shapes[name]}"
            )
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"The adapter {origin} belongs to another model than {adapter.base}, the base in its {CONFIG}: "
            f"{'; '.join(problems[:10])}{more}."
        )

    def read(name: str, index: Any) -> np.ndarray:
        values, pair = checkpoint.read(name, index), adapter.factors.get(name)
        return values if pair is None else _merged(values.astype(dtype), pair, adapter.scale, index)

    return replace(checkpoint, read=read, files=(*checkpoint.files, Path(origin) / TENSORS, Path(origin) / CONFIG))


def with_factors(weight: Float[Array, "out in"], pair: Mapping[str, Any], scale: float) -> Float[Array, "out in"]:
    """A weight on the devices with its adapter added, in the weight's dtype and sharding."""
    return map_shards(jnp.asarray(weight), lambda values, index: _merged(values, pair, scale, index))


def _merged(part: np.ndarray, pair: Mapping[str, Any], scale: float, index: Any) -> Float[np.ndarray, "out in"]:
    """The part of a weight that `index` selects, with its adapter added.

    The sum is computed in float64 and rounded once to the weight's dtype, so every machine gets the same.
    """
    a, b = (np.asarray(pair[key]).astype(np.float64) for key in ("a", "b"))
    return (part.astype(np.float64) + scale * (b @ a)[index]).astype(part.dtype)


def save_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, in the factors' dtype.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = Path(directory)
    is_pinned = HUB_ID.fullmatch(adapter.base) and not Path(adapter.base).exists()
    base, _, revision = adapter.base.partition("@") if is_pinned else (adapter.base, "", "")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {
        f"{_PEFT_PREFIX}{name.removesuffix('.weight')}.lora_{key.upper()}.weight": jnp.asarray(pair[key])
        for name, pair in adapter.factors.items()
        for key in ("a", "b")
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / TENSORS, save(tensors, metadata={"format": "pt"}))
        write_whole(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"The adapter cannot be written to {directory} ({reason(error)}); make room there, or choose another "
            f"directory."
        ) from error


def load_adapter(directory: str | Path) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Raises:
        UserError: the adapter is incomplete or damaged, or is not a plain LoRA of linear layers.
    """
    directory = Path(directory)
    path = directory / CONFIG
    config = read_json(path)
    if unsupported := _unsupported_options(config):
        options = ", ".join(f"{key}={value!r:.60}" for key, value in unsupported.items())
        raise UserError(
            f"The adapter {directory} is not a plain LoRA, the only kind that is supported: it has {options}; merge it "
            f"into its base model with PEFT's merge_and_unload, and use the merged model."
        )
    try:
        base, rank, alpha = config["base_model_name_or_path"], config["r"], float(config["lora_alpha"])
        if (revision := config.get("revision")) not in (None, "main"):
            base = f"{base}@{revision}"
        if not isinstance(base, str):
            raise ValueError(f"base_model_name_or_path is {base!r:.60}, not a name")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"r is {rank!r:.60}, not a positive integer")
        if not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a LoRA configuration ({reason(error)}); fix it, or download it again."
        ) from error
    factors = _read_factors(directory / TENSORS)
    for name, pair in factors.items():
        if {pair["a"].shape[0], pair["b"].shape[1]} != {rank}:
            raise UserError(
                f"{path} says that the rank is {rank}, but the factors of {name} have the shapes {pair['a'].shape} and "
                f"{pair['b'].shape}; download the adapter again."
            )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapter(base, rank, scale * rank, tuple(sorted({module_name(name) for name in factors})), factors)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PEFT's format."""
    return (directory / CONFIG).is_file()


def _unsupported_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make an adapter something else than a plain LoRA."""
    unsupported = {}
    for key, value in config.items():
        if key in _SUPPORTED_VALUES:
            if value not in (*_SUPPORTED_VALUES[key], None):
                unsupported[key] = value
        elif value and key not in _FREE_OPTIONS:
            unsupported[key] = value
    return unsupported


def _read_factors(path: Path) -> Factors:
    factors: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, framework="flax") as file:  # framework="numpy" cannot read bfloat16
            for name in file.keys():  # noqa: SIM118
                match = re.fullmatch(rf"{re.escape(_PEFT_PREFIX)}(.+)\.lora_([AB])\.weight", name)
                tensor = file.get_tensor(name)
                if match is None or tensor.ndim != 2:
                    raise UserError(
                        f"{path} holds {name}, which is not a factor of a linear layer's weight; only plain LoRA "
                        f"adapters of linear layers are supported."
                    )
                factors.setdefault(f"{match[1]}.weight", {})[match[2].lower()] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({reason(error)}); it is missing or damaged, so download it again."
        ) from error
    if incomplete := [name for name, pair in factors.items() if pair.keys() != {"a", "b"}]:
        raise UserError(f"{path} has only one of the two factors of {incomplete[0]}; download it again.")
    if not factors:
        raise UserError(f"{path} has no tensors in it; download it again.")
    return factors


def module_name(name: str) -> str:
    """The last part of a weight's name without `.weight`, such as `q_proj`."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
