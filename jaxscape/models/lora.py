"""Low-rank adapters (Hu et al., arXiv 2106.09685), read and written in the format of Hugging Face's PEFT."""

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from jaxscape.models.builtin import ADAPTERS
from jaxscape.models.checkpoint import Checkpoint, Params, map_shards, named_leaves, tree_of
from jaxscape.models.decoder import LookUp, Product
from jaxscape.models.fusion import FUSED
from jaxscape.models.huggingface import HUB_ID
from jaxscape.models.weights import EMBEDDING, HEAD, INDEX, MLX_ADAPTER, WEIGHTS, damaged, parameter_name
from jaxscape.runtime.errors import UserError, as_list, reason
from jaxscape.runtime.files import check_not_pointer, read_json, write_whole
from jaxscape.runtime.texts import listed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."

# PEFT's options that must have one of these values, and those that may have any. Every other option must be off:
# None, false, zero or empty.
_SUPPORTED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # other values change the base model
}
_FREE_OPTIONS = {
    # They are read here.
    *("base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "use_dora"),
    # They say which weights are adapted, which the tensors' names say too.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"),
    # PEFT sets it to false for the linear layers of these models.
    "fan_in_fan_out",
    # They affect only training, or features that other options switch on.
    *("auto_mapping", "inference_mode", "lora_dropout", "eva_config", "megatron_core", "peft_version"),
    "qalora_group_size",
}
_LORA_NAME = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_MAGNITUDE_NAME = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_WHOLE_NAME = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?(?:\.base_layer)?\.(weight|bias)")

Factors = dict[str, dict[str, Any]]
"""The factors `a` [rank, in] and `b` [out, rank] of each adapted weight, by its Hugging Face name."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A change of a base model's weights: W + scale · b a for some, other values for others.

    Attributes:
        base: the base model, as `load_model` takes it.
        targets: names of the linear layers that the adapter changes, such as `q_proj`.
        scales: the scale of each weight for which it is not alpha / rank, by name.
        magnitudes: norms of the rows of some weights after the change, by name (DoRA, Liu et al., arXiv 2402.09353).
        replaced: whole tensors that are put in place of the base model's, by name.
        copied: names of those tensors in `replaced` that PEFT trained as a copy of the base model's, so that a tensor
            which was tied to the base model's keeps its value.
    """

    base: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    factors: Factors
    scales: Mapping[str, float] = field(default_factory=dict)
    magnitudes: Mapping[str, Any] = field(default_factory=dict)
    replaced: Mapping[str, Any] = field(default_factory=dict)
    copied: frozenset[str] = frozenset()

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

    def apply(self, use: Product | LookUp) -> Array:
        """Apply `use` to the sum of the parts."""
        return use(self.weight) + self.scale * use.of_factors(self.b.T, self.a)


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
    adapter = _of_text_model(adapter, checkpoint.other_parts)
    checkpoint, adapter = _with_ends(checkpoint, adapter)
    _check_fits(checkpoint, adapter, origin)

    def read(name: str, index: Any) -> np.ndarray:
        pair, magnitude = adapter.factors.get(name), adapter.magnitudes.get(name)
        part = index if magnitude is None else ...  # a magnitude is the norm of a whole row
        whole = adapter.replaced.get(name)
        values = checkpoint.read(name, part) if whole is None else np.asarray(whole)[part]
        if pair is None:
            return values
        values = _merged(values.astype(dtype), pair, adapter.scales.get(name, adapter.scale), part, magnitude)
        return values if magnitude is None else values[index]

    files = (*checkpoint.files, Path(origin) / TENSORS, Path(origin) / CONFIG)
    return replace(checkpoint, read=read, files=files)


def _of_text_model(adapter: Adapter, other_parts: tuple[str, ...]) -> Adapter:
    """The adapter without its changes of a multimodal model's other parts."""

    def of_text(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(other_parts)}

    if not other_parts:
        return adapter
    return replace(
        adapter,
        factors=of_text(adapter.factors),
        magnitudes=of_text(adapter.magnitudes),
        replaced=of_text(adapter.replaced),
    )


def _with_ends(checkpoint: Checkpoint, adapter: Adapter) -> tuple[Checkpoint, Adapter]:
    """The checkpoint with the vocabulary of an adapter that replaces the embedding, and with an output head of its own
    where the adapter changes only one of two that are tied; and the adapter, which replaces both if they are tied."""
    replaced = dict(adapter.replaced)
    is_tied = checkpoint.config.tie_word_embeddings
    if is_tied and {HEAD, EMBEDDING} & {*adapter.factors, *replaced}:
        for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if name in replaced and name not in adapter.copied and other not in replaced:
                replaced[other] = replaced[name]  # PEFT loads it into the one parameter that both are
        is_tied = not {HEAD, EMBEDDING} & adapter.factors.keys() and (
            HEAD in replaced and EMBEDDING in replaced and np.array_equal(replaced[HEAD], replaced[EMBEDDING])
        )
        if is_tied:
            del replaced[HEAD]
    shapes = dict(checkpoint.shapes)
    if checkpoint.config.tie_word_embeddings and not is_tied:
        shapes[HEAD] = shapes[EMBEDDING]
    ends = [name for name in (HEAD, EMBEDDING) if name in shapes]
    vocab_size = checkpoint.config.vocab_size
    if all(name in replaced for name in ends):
        vocab_size = len(replaced[EMBEDDING])
        shapes |= {name: (vocab_size, shapes[name][1]) for name in ends}
    transformers_config = copy.deepcopy(checkpoint.transformers_config)
    transformers_config.tie_word_embeddings, transformers_config.vocab_size = is_tied, vocab_size
    changed = replace(
        checkpoint,
        config=replace(checkpoint.config, tie_word_embeddings=is_tied, vocab_size=vocab_size),
        transformers_config=transformers_config,
        shapes=shapes,
        read=lambda name, index: checkpoint.read(name if name in checkpoint.shapes else EMBEDDING, index),
    )
    return changed, replace(adapter, replaced=replaced)


def _check_fits(checkpoint: Checkpoint, adapter: Adapter, origin: str) -> None:
    shapes = {name: (pair["b"].shape[0], pair["a"].shape[1]) for name, pair in adapter.factors.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.replaced.items()}
    wrong = {name: shape for name, shape in shapes.items() if checkpoint.shapes.get(name) != shape}
    sizes = {shape[0] for shape in wrong.values()}
    if wrong and wrong.keys() <= {HEAD, EMBEDDING} & checkpoint.shapes.keys():
        raise UserError(
            f"The adapter {origin} was trained with a vocabulary of {min(sizes)} tokens, and its base {adapter.base} "
            f"has {checkpoint.config.vocab_size}; save the adapter again with its embeddings (PEFT's "
            f"save_embedding_layers=True), or give the base that has them."
        )
    problems = [
        f"it changes {name} with shape {shape}, but the model's has shape {checkpoint.shapes[name]}"
        if name in checkpoint.shapes
        else f"it changes {name}, which the model does not have"
        for name, shape in wrong.items()
    ]
    if problems:
        raise UserError(
            f"The adapter {origin} belongs to another model than {adapter.base}, its base: "
            f"{listed(problems, 10, '; ')}."
        )


def with_factors(weight: Float[Array, "out in"], pair: Mapping[str, Any], scale: float) -> Float[Array, "out in"]:
    """A weight on the devices with its adapter added, in the weight's dtype and sharding."""
    return map_shards(jnp.asarray(weight), lambda values, index: _merged(values, pair, scale, index))


def _merged(
    part: np.ndarray, pair: Mapping[str, Any], scale: float, index: Any, magnitude: Any = None
) -> Float[np.ndarray, "out in"]:
    """The part of a weight that `index` selects, with its adapter added.

    The sum is computed in float64 and rounded once to the weight's dtype, so every machine gets the same.

    Arguments:
        magnitude: the norms of the rows after the change; None to leave them.
    """
    a, b = (np.asarray(pair[key]).astype(np.float64) for key in ("a", "b"))
    total = part.astype(np.float64) + scale * (b @ a)[index]
    if magnitude is not None:
        norms = np.asarray(magnitude).astype(np.float64).ravel() / np.linalg.norm(total, axis=1)
        total = norms[:, None] * total
    return total.astype(part.dtype)


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


def load_adapter(directory: str | Path, base: str | None = None) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Arguments:
        base: the base model, instead of the one that the adapter names. If the adapter was trained on another adapter,
            that stays its base.

    Raises:
        UserError: the adapter is incomplete or damaged, or has options that are not supported.
    """
    directory = Path(directory)
    path = directory / CONFIG
    config = read_json(path)
    _check_is_lora(directory, config)
    try:
        rank, alpha = config["r"], float(config["lora_alpha"])
        base = _base_of(directory, config, base)
        if type(rank) is not int or rank < 1:
            raise ValueError(f"r is {rank!r:.60}, not a positive integer")
        if not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha}")
        patterns = {key: dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
        factors, magnitudes, replaced, modules = _read_tensors(directory / TENSORS)
        ranks = {name: _matched(patterns["rank_pattern"], modules[name], rank) for name in factors}
        alphas = {name: float(_matched(patterns["alpha_pattern"], modules[name], alpha)) for name in factors}
        copied = _copied(directory, config, factors, magnitudes, replaced)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{path} is not a LoRA configuration ({reason(error)}); fix it, or download it again."
        ) from error
    for name, pair in factors.items():
        if {pair["a"].shape[0], pair["b"].shape[1]} != {ranks[name]}:
            raise UserError(
                f"{path} says that the rank is {ranks[name]}, but the factors of {name} have the shapes "
                f"{pair['a'].shape} and {pair['b'].shape}; download the adapter again."
            )

    def scale(alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    return Adapter(
        base,
        rank,
        scale(alpha, rank) * rank,
        tuple(sorted({module_name(name) for name in factors})),
        factors,
        scales={name: scale(alphas[name], ranks[name]) for name in factors},
        magnitudes=magnitudes,
        replaced=replaced,
        copied=copied,
    )


def _copied(
    directory: Path,
    config: Mapping[str, Any],
    factors: Factors,
    magnitudes: Mapping[str, Any],
    replaced: Mapping[str, Any],
) -> frozenset[str]:
    """The names of the whole tensors that PEFT trained as copies of the base model's (`modules_to_save`).

    Raises:
        UserError: the file lacks tensors of the modules that the configuration names, or magnitudes that it needs.
    """
    modules = as_list(config.get("modules_to_save") or (), f"{directory / CONFIG}: modules_to_save")
    saved = {str(name).rpartition(".")[2] for name in modules}
    copied = frozenset(name for name in replaced if saved & set(name.split(".")))
    missing = [f"modules_to_save={name!r}" for name in sorted(saved.difference(*(name.split(".") for name in copied)))]
    if bool(config.get("use_dora")) != bool(magnitudes) or (magnitudes and magnitudes.keys() != factors.keys()):
        missing.append(f"use_dora={config.get('use_dora')}")
    if missing:
        raise UserError(
            f"The adapter {directory} is not a plain LoRA, and {TENSORS} does not hold what belongs to "
            f"{', '.join(missing)}; save it again with PEFT."
        )
    return copied


def _base_of(directory: Path, config: Mapping[str, Any], base: str | None) -> str:
    """The base model of an adapter, as `load_model` takes it: the one that its configuration names, or `base`."""
    named = config.get("base_model_name_or_path")
    is_stacked = isinstance(named, str) and (named in ADAPTERS or is_adapter(Path(named)))
    if base is not None and not is_stacked:
        return base
    if named in (None, ""):
        raise UserError(
            f"The adapter {directory} names no base model (base_model_name_or_path in its {CONFIG}): name it with "
            f"--base (base= in load_model)."
        )
    if not isinstance(named, str):
        raise ValueError(f"base_model_name_or_path is {named!r:.60}, not a name")
    revision = config.get("revision")
    has_revision = revision not in (None, "", "main") and not Path(named).exists()  # a directory has no revisions
    return f"{named}@{revision}" if has_revision else named


def _matched(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches it; else the default."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_is_lora(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise a `UserError` if an adapter is no LoRA of PEFT, is pickled, or has options that are not supported."""
    if "peft_type" not in config and (directory / "adapters.safetensors").is_file():
        raise UserError(f"{directory} {MLX_ADAPTER}.")
    if unsupported := _unsupported_options(config):
        options = ", ".join(f"{key}={value!r:.60}" for key, value in unsupported.items())
        raise UserError(
            f"The adapter {directory} is not a plain LoRA, the only kind that is supported: it has {options}; merge it "
            f"into its base model with PEFT's merge_and_unload, and use the merged model."
        )
    if not (directory / TENSORS).exists():
        raise UserError(
            f"The adapter {directory} has no {TENSORS}: finish its download, or, if it is pickled (adapter_model.bin), "
            f"which can run any code when it is loaded, load it with PEFT and save it again with save_pretrained."
        )
    if weights := [name for name in (WEIGHTS, INDEX) if (directory / name).is_file()]:
        raise UserError(
            f"{directory} holds two models, a LoRA adapter ({CONFIG}) and the weights of {weights[0]}: move one of "
            f"them to another directory."
        )


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


def _read_tensors(path: Path) -> tuple[Factors, dict[str, Any], dict[str, Any], dict[str, str]]:
    """The factors, magnitudes and whole tensors of an adapter's file, by the decoder's names; and by the same names of
    factors, the names of modules that PEFT uses."""
    factors: Factors = {}
    magnitudes: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    modules: dict[str, str] = {}
    for name, tensor in _stored(path).items():
        if ".original_module." in name:  # PEFT uses it only where the adapter is switched off
            continue
        if (match := _LORA_NAME.fullmatch(name)) and tensor.ndim == 2:
            module, is_embedding, part = match.groups()
            weight = parameter_name(f"{module}.weight")
            # An embedding W [vocab, dim] has the factors A [rank, vocab] and B [dim, rank] of its transpose.
            key, tensor = ("ab"[part == "A"], tensor.T) if is_embedding else (part.lower(), tensor)
            pair = factors.setdefault(weight, {})
            modules[weight] = re.sub(r"(^|\.)_orig_mod\.", r"\1", module).removeprefix(_PEFT_PREFIX)
            store, key_name = pair, key
        elif match := _MAGNITUDE_NAME.fullmatch(name):
            store, key_name = magnitudes, parameter_name(f"{match[1]}.weight")
        elif (match := _WHOLE_NAME.fullmatch(name)) and ".lora_" not in name and "token_adapter" not in name:
            store, key_name = replaced, parameter_name(f"{match[1]}.{match[2]}")
        else:
            raise UserError(
                f"{path} holds {name}, which is not a factor of a linear layer's weight, nor a tensor of the model; "
                f"only plain LoRA adapters of linear layers are supported."
            )
        if key_name in store and not (store is replaced and np.array_equal(store[key_name], tensor)):
            raise UserError(f"{path} holds {name} twice, under two names; keep only the adapter's own tensors.")
        store[key_name] = tensor
    if incomplete := [name for name, pair in factors.items() if pair.keys() != {"a", "b"}]:
        raise UserError(f"{path} has only one of the two factors of {incomplete[0]}; download it again.")
    if strange := sorted(magnitudes.keys() - factors.keys()) or [name for name in (EMBEDDING,) if name in magnitudes]:
        raise UserError(f"{path} holds a magnitude of {strange[0]} (DoRA), which is not supported; merge it with PEFT.")
    if not factors and not replaced:
        raise UserError(f"{path} has no tensors in it; download it again.")
    return factors, magnitudes, replaced, modules


def _stored(path: Path) -> dict[str, Any]:
    """The tensors of an adapter's file, by their names in it."""
    try:
        check_not_pointer(path)
        with safe_open(path, framework="flax") as file:  # framework="numpy" cannot read bfloat16
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def module_name(name: str) -> str:
    """The last part of a weight's name without `.weight`, such as `q_proj`."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
