"""The interface of an opened checkpoint, and functions that turn its tensors into the decoder's parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float, Shaped, UInt32
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import parameter_axes, parameter_shapes
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import cache_dir, checksum
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.sharding import sharding
from jaxscape.runtime.texts import listed

Params = dict[str, Any]
"""A nested dictionary of arrays, whose paths joined with dots are Hugging Face parameter names."""


@dataclass(frozen=True)
class Sources:
    """Where the parts of a model come from, in words for the user.

    Attributes:
        tokenizer: the directory or file that the tokenizer was read from.
        chat_template: the file that the chat template is from, or the name of the default.
        end_tokens: the files that name end tokens.
        quantisation: the format that the weights were dequantised from; None if they were not quantised.
    """

    tokenizer: str
    chat_template: str
    end_tokens: tuple[str, ...]
    quantisation: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, whose tensors are read on demand.

    Attributes:
        shapes: shape of every tensor, by Hugging Face parameter name, in the Hugging Face layout.
        read: a function of a tensor's name and an index (slices, or `...` for all of it), which returns that part of
            the tensor as a numpy array.
        eos_token_ids: tokens that end a text or a turn.
        transformers_config: the configuration as an object of transformers' class, which is saved with the model.
        files: the files that the tensors are read from.
        sources: where the tokenizer and the chat template come from.
        other_parts: for the text model of a multimodal one, the beginnings of the names of tensors that it leaves out.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, Any], np.ndarray]
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    transformers_config: PreTrainedConfig
    files: tuple[Path, ...]
    sources: Sources
    other_parts: tuple[str, ...] = ()


def named_leaves(tree: Params) -> dict[str, Any]:
    """The tree's leaves by Hugging Face parameter name, sorted by name."""
    return dict(sorted(flatten_dict(tree, sep=".").items()))


def tree_of(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `named_leaves`."""
    return unflatten_dict(dict(leaves), sep=".")


def tensor_shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by Hugging Face parameter name."""
    return {name: leaf.shape for name, leaf in named_leaves(tree).items()}


def load_params(checkpoint: Checkpoint, dtype: jnp.dtype, origin: str, mesh: Mesh | None) -> Params:
    """Read the decoder's parameters in `dtype`, tensor by tensor. With a mesh, each process reads only the shards that
    its devices hold.

    Arguments:
        origin: what the checkpoint was loaded from, for error messages.
        mesh: the devices to shard the parameters over; None leaves numpy arrays in host memory.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message lists up to 20 of them.
    """
    check_checkpoint(checkpoint, origin)
    if mesh is None:
        return tree_of({name: checkpoint.read(name, ...).astype(dtype) for name in checkpoint.shapes})
    shardings = named_leaves(parameter_shardings(checkpoint.config, mesh))
    return tree_of({name: _read_sharded(checkpoint, name, dtype, sharding) for name, sharding in shardings.items()})


def check_checkpoint(checkpoint: Checkpoint, origin: str) -> None:
    """Raise a `UserError` if the checkpoint's tensors differ in names or shapes from the decoder's parameters."""
    check_tensors(tensor_shapes(parameter_shapes(checkpoint.config)), checkpoint.shapes, origin)


def _read_sharded(checkpoint: Checkpoint, name: str, dtype: jnp.dtype, sharding: Sharding) -> Float[Array, "*shape"]:
    return _array_of_shards(checkpoint.shapes[name], sharding, lambda index: checkpoint.read(name, index).astype(dtype))


def map_shards(
    array: Float[Array, "*shape"], function: Callable[[np.ndarray, Any], np.ndarray]
) -> Float[Array, "*shape"]:
    """Apply a function to each shard of an array, on the host that holds the shard. The sharding stays the same.

    Arguments:
        function: gets the values of a shard and the shard's index into the array, and returns the new values.
    """
    shards = {str(shard.index): shard.data for shard in array.addressable_shards}
    return _array_of_shards(array.shape, array.sharding, lambda index: function(np.asarray(shards[str(index)]), index))


def _array_of_shards(
    shape: tuple[int, ...], sharding: Sharding, make_shard: Callable[[Any], np.ndarray]
) -> Float[Array, "*shape"]:
    """The array whose shards are `make_shard(index)`. A shard that several devices hold is made once."""
    shards: dict[str, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        key = str(index)
        if key not in shards:
            shards[key] = make_shard(index)
        return shards[key]

    return jax.make_array_from_callback(shape, sharding, shard)


def load_cached_params(checkpoint: Checkpoint, dtype: jnp.dtype, origin: str, mesh: Mesh) -> Params:
    """The parameters that `load_params` returns, from an Orbax checkpoint in the cache.

    The cache has one Orbax checkpoint for each set of files and dtype; if there is none, it is written. It can be
    restored onto any mesh, whichever mesh wrote it. Several processes must share the cache directory.

    Raises:
        UserError: the cached weights cannot be read or written; or `load_params` raises it.
    """

    def find_directory() -> tuple[str, bool]:
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
        directory = (cache_dir() / "weights" / checksum((files, str(dtype)))).absolute()
        return str(directory), directory.exists()

    name, is_cached = from_first(find_directory)
    directory = Path(name)
    with ocp.StandardCheckpointer() as checkpointer:
        if is_cached:
            return _restore(checkpointer, directory, abstract_params(checkpoint.config, dtype, mesh))
        params = load_params(checkpoint, dtype, origin, mesh)
        try:
            checkpointer.save(directory, params)
            checkpointer.wait_until_finished()
        except Exception as error:  # Orbax and its storage raise many types, also for a full disk
            if directory.exists():  # another run has written it in the meantime
                return params
            raise UserError(
                f"The weights cannot be cached in {directory} ({reason(error)}); make room there, or leave out "
                f"--keep-weights."
            ) from error
    return params


def abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None) -> Params:
    """The parameters without their values: the shape, dtype and sharding of each.

    Arguments:
        mesh: None gives numpy arrays, as `load_params` does, whose numbers are all the same zero in memory.
    """
    if mesh is None:
        zero = np.zeros((), dtype)
        return jax.tree.map(lambda leaf: np.broadcast_to(zero, leaf.shape), parameter_shapes(config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        parameter_shapes(config),
        parameter_shardings(config, mesh),
    )


def _restore(checkpointer: ocp.StandardCheckpointer, directory: Path, abstract: Params) -> Params:
    try:
        params: Params = checkpointer.restore(directory, abstract)
    except jax.errors.JaxRuntimeError:  # the device's memory is full
        raise
    except Exception as error:  # Orbax and its storage raise many types for missing or damaged files
        raise UserError(
            f"The cached weights in {directory} cannot be read ({reason(error)}); delete this directory, and the next "
            f"run writes it again."
        ) from error
    return params


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of each parameter over the mesh, in a tree like the decoder's parameters."""
    return jax.tree.map(
        lambda leaf, axes: sharding(mesh, axes, leaf.shape), parameter_shapes(config), parameter_axes(config)
    )


def to_dtype(values: Any, dtype: jnp.dtype) -> jnp.ndarray:
    """A JAX array of `dtype`, cast on the host."""
    return jnp.asarray(np.asarray(values).astype(dtype))


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], origin: str, limit: int = 20
) -> None:
    """Raise a `UserError` that lists up to `limit` differences if tensors have other names or shapes than expected."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
    problems += [f"not expected {name}" for name in sorted(actual.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(actual[name])} instead of {tuple(expected[name])}"
        for name in sorted(expected.keys() & actual.keys())
        if tuple(actual[name]) != tuple(expected[name])
    ]
    if problems:
        raise UserError(f"The tensors of {origin} do not fit the model: {listed(problems, limit, '; ')}.")


def fingerprint(params: Params) -> str:
    """A checksum of every tensor's name, shape, dtype and values. It does not depend on the sharding.

    Arguments:
        params: the parameters, or a direction. Of a tensor that consists of several arrays, each has a name of its own.
    """
    leaves = {
        f"{name}{jax.tree_util.keystr(path)}": array
        for name, leaf in named_leaves(params).items()
        for path, array in jax.tree_util.tree_leaves_with_path(leaf)
    }
    sums = jax.device_get([_checksum(_without_keys(leaf)) for leaf in leaves.values()])
    descriptions = [
        (name, leaf.shape, str(leaf.dtype), tensor_sums.tolist())
        for (name, leaf), tensor_sums in zip(leaves.items(), sums, strict=True)
    ]
    return checksum(descriptions)


def _without_keys(leaf: Any) -> Array:
    """An array as it is, or the numbers of a random key."""
    array = jnp.asarray(leaf)
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


@jax.jit
def _checksum(leaf: Shaped[Array, "*shape"]) -> UInt32[Array, " 2"]:
    """Two sums of the values' bits, modulo 2³², each value mixed with its position.

    Integer sums are exact in any order, so the result is the same on any number of devices.
    """
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").ravel().astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, bits.size)
    mixed = (bits ^ (position * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    return jnp.stack([(mixed ^ (mixed >> 15)).sum(dtype=jnp.uint32), (bits * (2 * position + 1)).sum(dtype=jnp.uint32)])
