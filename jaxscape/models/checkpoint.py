"""A checkpoint as the rest of the package sees it, and the step from its tensors to the decoder's parameters."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, UInt32
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import parameter_axes, parameter_shapes
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import cache_dir, checksum
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.sharding import sharding

Params = dict[str, Any]

# Tokens that end a turn in the usual chat formats; a model's files often name only the one that ends a text.
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),
    *("<|end_of_text|>", "<|endoftext|>", "</s>"),
)

# Vicuna's chat format (Zheng et al., arXiv 2306.05685), as FastChat writes it; its tokenizer has none of its own.
_VICUNA = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% set system = "A chat between a curious user and an artificial intelligence \
assistant. The assistant gives helpful, detailed, and polite answers to the user's questions." %}{% endif %}
{%- if system %}{{ system + ' ' }}{% endif %}
{%- for turn in turns %}
{%- if turn['role'] == 'user' %}{{ 'USER: ' + turn['content'] + ' ' }}
{%- elif turn['role'] == 'assistant' %}{{ 'ASSISTANT: ' + turn['content'] }}{{ eos_token }}
{%- else %}{{ raise_exception('only the first message may be the system\\'s') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer; if it has no chat template, with Vicuna's, after the token that it begins texts with, if any."""
    if tokenizer.chat_template is None:
        begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * begins + _VICUNA
    return tokenizer


def without_given_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as its model has it: without the template of `with_chat_template`."""
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.chat_template.endswith(_VICUNA):
        return tokenizer
    own = copy.copy(tokenizer)
    own.chat_template = None
    return own


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it holds is known, the tensors themselves are read one by one.

    Attributes:
        shapes: of every tensor, by Hugging Face parameter name, in Hugging Face layout.
        read: by that name, the part of a tensor that an index, slices or `...`, takes, as a numpy array.
        eos_token_ids: the tokens that end a text or a turn.
        transformers_config: the configuration as transformers has it, to write the model back to its format.
        files: those that the tensors are read from.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, Any], np.ndarray]
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    transformers_config: PreTrainedConfig
    files: tuple[Path, ...]


def named_leaves(tree: Params) -> dict[str, Any]:
    """The tree's leaves by Hugging Face parameter name, sorted by it."""
    return dict(sorted(flatten_dict(tree, sep=".").items()))


def tree_of(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `named_leaves`."""
    return unflatten_dict(dict(leaves), sep=".")


def tensor_shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by Hugging Face parameter name."""
    return {name: leaf.shape for name, leaf in named_leaves(tree).items()}


def load_params(checkpoint: Checkpoint, dtype: jnp.dtype, origin: str, mesh: Mesh | None) -> Params:
    """The decoder's parameters in `dtype`, read tensor by tensor: of each, a process reads what its devices hold.

    Without a mesh they are numpy arrays, in host memory.

    Raises:
        UserError: tensors are missing, left over, or of another shape; all of them are listed.
    """
    check_checkpoint(checkpoint, origin)
    if mesh is None:
        return tree_of({name: checkpoint.read(name, ...).astype(dtype) for name in checkpoint.shapes})
    split = named_leaves(parameter_shardings(checkpoint.config, mesh))
    return tree_of({name: _placed(checkpoint, name, dtype, where) for name, where in split.items()})


def check_checkpoint(checkpoint: Checkpoint, origin: str) -> None:
    """Raise a `UserError` that lists the tensors that the decoder has, or lacks, in another way."""
    expected = {name: leaf.shape for name, leaf in named_leaves(parameter_shapes(checkpoint.config)).items()}
    check_tensors(expected, checkpoint.shapes, origin)


def _placed(checkpoint: Checkpoint, name: str, dtype: jnp.dtype, where: NamedSharding) -> Float[Array, "*shape"]:
    parts: dict[Any, np.ndarray] = {}  # what several devices hold is read once

    def part(index: Any) -> np.ndarray:
        key = tuple((piece.start, piece.stop) for piece in index)
        if key not in parts:
            parts[key] = checkpoint.read(name, index).astype(dtype)
        return parts[key]

    return jax.make_array_from_callback(checkpoint.shapes[name], where, part)


def load_kept(checkpoint: Checkpoint, dtype: jnp.dtype, origin: str, mesh: Mesh) -> Params:
    """What `load_params` gives, from an Orbax checkpoint in the cache, straight onto the mesh, whichever mesh wrote it.

    It is made first if there is none of these files in this dtype. Several processes need a cache that they share.
    """

    def look() -> tuple[str, bool]:
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
        directory = (cache_dir() / "weights" / checksum((files, str(dtype)))).absolute()
        return str(directory), directory.exists()

    name, is_kept = from_first(look)
    directory = Path(name)
    where = parameter_shardings(checkpoint.config, mesh)
    like = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=there),
        parameter_shapes(checkpoint.config),
        where,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        if is_kept:
            try:
                params: Params = checkpointer.restore(directory, like)
                return params
            except jax.errors.JaxRuntimeError:  # the device's memory is full
                raise
            except Exception as error:  # Orbax and its storage raise many types for what is missing or damaged
                raise UserError(
                    f"The kept weights in {directory} cannot be read ({type(error).__name__}); remove that directory, "
                    f"and they are made again."
                ) from error
        params = load_params(checkpoint, dtype, origin, mesh)
        try:
            checkpointer.save(directory, params)
            checkpointer.wait_until_finished()
        except Exception as error:  # the same, for a full disk
            if directory.exists():  # another run has kept them meanwhile
                return params
            raise UserError(
                f"The weights cannot be kept in {directory} ({type(error).__name__}: {str(error)[:200]}); make room, "
                f"or leave out --keep-weights."
            ) from error
    return params


def changed_parts(
    array: Float[Array, "*shape"], change: Callable[[np.ndarray, Any], np.ndarray]
) -> Float[Array, "*shape"]:
    """An array whose parts are what `change(values, index)` gives for those of `array`, on the host that holds them."""
    old = {str(shard.index): shard.data for shard in array.addressable_shards}
    new: dict[str, np.ndarray] = {}  # what several devices hold is made once

    def part(index: Any) -> np.ndarray:
        key = str(index)
        if key not in new:
            new[key] = change(np.asarray(old[key]), index)
        return new[key]

    return jax.make_array_from_callback(array.shape, array.sharding, part)


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """A tree like the decoder's parameters that says how each is split over the mesh."""
    return jax.tree.map(
        lambda leaf, axes: sharding(mesh, axes, leaf.shape), parameter_shapes(config), parameter_axes(config)
    )


def to_dtype(values: Any, dtype: jnp.dtype) -> jnp.ndarray:
    return jnp.asarray(np.asarray(values).astype(dtype))


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], origin: str, limit: int = 20
) -> None:
    """Raise a `UserError` that lists every difference in names and shapes, up to `limit` of them."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"not expected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
        raise UserError(f"The tensors of {origin} do not fit the model: {'; '.join(problems[:limit])}{more}.")


def fingerprint(params: Params) -> str:
    """A checksum of every tensor's name, shape, dtype and values."""
    leaves = named_leaves(params)
    sums = jax.device_get([_checksum(jnp.asarray(leaf)) for leaf in leaves.values()])
    described = [
        (name, leaf.shape, str(leaf.dtype), total.tolist())
        for (name, leaf), total in zip(leaves.items(), sums, strict=True)
    ]
    return checksum(described)


@jax.jit
def _checksum(leaf: Float[Array, "*shape"]) -> UInt32[Array, " 2"]:
    """Two sums of the values' bits, each value weighted by its place; of integers, so that their order is free."""
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").ravel().astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, bits.size)
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    return jnp.stack([(mixed ^ (mixed >> 15)).sum(dtype=jnp.uint32), (bits * (2 * place + 1)).sum(dtype=jnp.uint32)])
