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

from jaxscape.models.checkpoint import Checkpoint, Params, changed_parts, named_leaves, tree_of
from jaxscape.models.huggingface import HUB_ID, read_json
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# The matrices that stand for several in some families.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PREFIX = "base_model.model."

# PEFT's options that may have any value, those that must have one of a few, and (every other) those that must be off.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base model
}
_OPTIONS = {
    *_PLAIN,
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
"""By the adapted weight's Hugging Face name: `a`, [rank, in], and `b`, [out, rank]."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is added to a base model's weights: W + alpha / rank · b a.

    Attributes:
        base: the name of the model that it belongs to, as `load_model` takes it.
        targets: the names of the linear layers that it changes.
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
    """A linear layer's weight with an adapter, whose sum is never formed: x (W + s b a)ᵀ = x Wᵀ + s (x aᵀ) bᵀ."""

    weight: Float[Array, "out in"]
    a: Float[Array, "rank in"]
    b: Float[Array, "out rank"]
    scale: float

    def apply(self, use: Callable[[Array], Array]) -> Array:
        """Of a linear layer every use is a product with [n, in] rows, so `a` can take the weight's place in it."""
        low = use(self.a)
        return use(self.weight) + self.scale * jnp.einsum(
            "...r,or->...o", low, self.b, precision=jax.lax.Precision.HIGHEST
        )


def init_factors(params: Params, targets: tuple[str, ...], rank: int, key: Array) -> Factors:
    """Float32 factors of an adapter that changes nothing yet, as PEFT starts them: `a` uniform in ±1/√in, `b` zero.

    In a model with fused matrices, a target is the one that it is a part of.

    Raises:
        UserError: the rank is not positive, or a target is no linear layer of the model.
    """
    if rank < 1:
        raise UserError(f"The LoRA rank must be at least 1, not {rank}.")
    linear = {name: leaf for name, leaf in named_leaves(params).items() if leaf.ndim == 2 and "embed" not in name}
    meant = {name: {module_name(name), *FUSED.get(module_name(name), ())} for name in linear}
    weights = {name: leaf for name, leaf in linear.items() if meant[name] & set(targets)}
    if missing := sorted(set(targets).difference(*(meant[name] for name in weights))):
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
    """The parameters with an adapter beside each adapted weight, for training: nothing is added up.

    The factors are cast to the weights' dtype.
    """
    leaves = named_leaves(params)
    adapted = {}
    for name, pair in factors.items():
        a, b = (pair[key].astype(leaves[name].dtype) for key in ("a", "b"))
        adapted[name] = LoraWeight(leaves[name], a, b, scale)
    return tree_of(leaves | adapted)


def merge(checkpoint: Checkpoint, adapter: Adapter, dtype: jnp.dtype, origin: str) -> Checkpoint:
    """The checkpoint with the adapter added to its tensors as they are read, after these are rounded to `dtype`: the
    adapter was trained on such a base.

    Raises:
        UserError: the adapter changes tensors that the checkpoint does not have, or has in another shape.
    """
    problems = []
    for name, pair in adapter.factors.items():
        shape = (pair["b"].shape[0], pair["a"].shape[1])
        if name not in checkpoint.shapes:
            problems.append(f"it changes {name}, which the model does not have")
        elif checkpoint.shapes[name] != shape:
            problems.append(f"it changes {name} as {shape}, which is {checkpoint.shapes[name]}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"The adapter {origin} belongs to another model than {adapter.base}: {'; '.join(problems[:10])}{more}."
        )

    def read(name: str, index: Any) -> np.ndarray:
        values, pair = checkpoint.read(name, index), adapter.factors.get(name)
        return values if pair is None else merged(values.astype(dtype), pair, adapter.scale, index)

    return replace(checkpoint, read=read, files=(*checkpoint.files, Path(origin) / TENSORS, Path(origin) / CONFIG))


def merged(weight: Any, pair: Mapping[str, Any], scale: float, index: Any = ...) -> Float[np.ndarray, "out in"]:
    """A weight, or the part of it that `index` takes, with its adapter added, in its dtype: summed in float64 and
    rounded once, so that every machine gets the same."""
    weight = np.asarray(weight)
    a, b = (np.asarray(pair[key]).astype(np.float64) for key in ("a", "b"))
    return (weight.astype(np.float64) + scale * (b @ a)[index]).astype(weight.dtype)


def with_factors(weight: Float[Array, "out in"], pair: Mapping[str, Any], scale: float) -> Float[Array, "out in"]:
    """A weight on the devices with its adapter added, in its dtype and sharding; see `merged`."""
    return changed_parts(jnp.asarray(weight), lambda values, index: merged(values, pair, scale, index))


def save_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter as PEFT does, `adapter_config.json` and `adapter_model.safetensors`, in the factors' dtype."""
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
        f"{_PREFIX}{name.removesuffix('.weight')}.lora_{key.upper()}.weight": jnp.asarray(pair[key])
        for name, pair in adapter.factors.items()
        for key in ("a", "b")
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / TENSORS, save(tensors, metadata={"format": "pt"}))
        write_whole(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"The adapter cannot be written to {directory} ({error}).") from error


def load_adapter(directory: str | Path) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Raises:
        UserError: it is incomplete or damaged, or of a kind that is not a plain LoRA of linear layers.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    other = {key: value for key, value in config.items() if value and key not in _OPTIONS}
    other |= {key: config[key] for key, plain in _PLAIN.items() if config.get(key) not in (*plain, None)}
    if other:
        options = ", ".join(f"{key}={value!r}" for key, value in other.items())
        raise UserError(f"The adapter {directory} is not a plain LoRA, the kind that is supported: {options}.")
    try:
        base, rank, alpha = config["base_model_name_or_path"], config["r"], float(config["lora_alpha"])
        if (revision := config.get("revision")) not in (None, "main"):
            base = f"{base}@{revision}"
        if not isinstance(base, str) or type(rank) is not int or rank < 1 or not math.isfinite(alpha):
            raise ValueError("its base model, rank or alpha is no such thing")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / CONFIG} is not a LoRA configuration ({reason(error)}).") from error
    factors = _read_factors(directory / TENSORS)
    wrong = [name for name, pair in factors.items() if {pair["a"].shape[0], pair["b"].shape[1]} != {rank}]
    if wrong:
        raise UserError(f"The adapter {directory} says that its rank is {rank}, but that of {wrong[0]} is another.")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapter(base, rank, scale * rank, tuple(sorted({module_name(name) for name in factors})), factors)


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def _read_factors(path: Path) -> Factors:
    factors: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, framework="flax") as file:  # numpy alone has no bfloat16
            for name in file.keys():  # noqa: SIM118
                match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
                tensor = file.get_tensor(name)
                if match is None or tensor.ndim != 2:
                    raise UserError(f"{path} holds {name}, which is not a factor of a linear layer's weight.")
                factors.setdefault(f"{match[1]}.weight", {})[match[2].lower()] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); an adapter needs one.") from error
    if halves := [name for name, pair in factors.items() if pair.keys() != {"a", "b"}]:
        raise UserError(f"{path} has only one of the two factors of {halves[0]}.")
    if not factors:
        raise UserError(f"{path} has no tensors in it.")
    return factors


def module_name(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
