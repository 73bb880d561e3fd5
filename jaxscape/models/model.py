"""`Model`, and how it is loaded from a name, a directory, the hub or a GGUF file, and saved."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from jaxscape.models import builtin, huggingface, lora
from jaxscape.models.checkpoint import (
    Checkpoint,
    Params,
    Sources,
    abstract_params,
    check_checkpoint,
    fingerprint,
    load_cached_params,
    load_params,
    parameter_shardings,
)
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import forward
from jaxscape.models.families import from_transformers
from jaxscape.models.gguf import is_gguf, open_gguf
from jaxscape.models.tokenizer import adapter_language
from jaxscape.models.weights import CONFIG, PICKLE_SUFFIXES, pickled_message
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import check_jax_options, free_memory, platform_jit, skip_absent_tpu
from jaxscape.runtime.processes import from_first, gathered
from jaxscape.runtime.remote import fetched
from jaxscape.runtime.sharding import MeshShape, default_mesh_shape, make_mesh, on_mesh
from jaxscape.runtime.texts import did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
        name: the source that it was loaded from.
        config: the decoder's configuration.
        params: a nested dictionary of arrays; its paths, joined with dots, are Hugging Face parameter names. The leaves
            are numpy arrays if the parameters are kept in host memory.
        tokenizer: the transformers tokenizer; it always has a chat template.
        eos_token_ids: the tokens that end a text or a turn.
        transformers_config: the configuration in the form of transformers.
        mesh: the devices that compute, see `jaxscape.runtime.sharding`.
        sources: where the tokenizer and the chat template come from; None if the model was not loaded.
        files: the files that the weights were read from, the base model's before an adapter's.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    transformers_config: PreTrainedConfig
    mesh: Mesh = field(default_factory=lambda: make_mesh(MeshShape(), 1))
    sources: Sources | None = None
    files: tuple[Path, ...] = ()

    @property
    def shardings(self) -> Params:
        """The sharding of each parameter over the mesh, in a tree like `params`."""
        return parameter_shardings(self.config, self.mesh)

    @property
    def dtype(self) -> str:
        """The dtype of parameters and activations."""
        return str(jax.tree.leaves(self.params)[0].dtype)

    def described(self) -> dict[str, Any]:
        """What `config.json` of a run says of the model: `model`, its name; `weights`, a checksum of the parameters;
        `dtype`; and `commits`, see `jaxscape.models.huggingface.hub_commits`, if it is from the hub."""
        commits = huggingface.hub_commits(self.files)
        return {
            "model": self.name,
            "weights": fingerprint(self.params),
            "dtype": self.dtype,
            **({"commits": commits} if commits else {}),
        }

    def __call__(self, tokens: Int[Array | np.ndarray, "batch time"]) -> Float[Array, "batch time vocab"]:
        """Next-token logits of texts without padding: int32[B, T] tokens to float32[B, T, V].

        Raises:
            UserError: the tokens are no such array, or one of them is not in the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise UserError(
                f"A model takes the token ids of texts, integers in an array of two dimensions, not "
                f"{tokens.dtype}{list(tokens.shape)}: tokenize the texts first."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(
                f"The token ids reach from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
                f"{self.config.vocab_size} tokens: use the tokenizer that belongs to the model."
            )
        config = self.config.for_length(tokens.shape[1])
        return _logits(self.params, np.asarray(tokens, np.int32), config, self.mesh)

    def save_pretrained(self, directory: str | Path) -> None:
        """Call `save_model`; this is the name of the method in transformers."""
        save_model(self, directory)


@platform_jit(static_argnums=(2, 3))
def _logits(
    params: Params, tokens: Int[Array | np.ndarray, "batch time"], config: ModelConfig, mesh: Mesh
) -> Float[Array, "batch time vocab"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with on_mesh(mesh):
        return forward(config, params, jnp.asarray(tokens), positions)[0]


def load_model(
    source: str | Path,
    dtype: str | None = None,
    on_host: bool | None = None,
    mesh_shape: MeshShape | None = None,
    keep: bool = False,
    split: MeshShape | None = None,
    base: str | Path | None = None,
    weights: bool = True,
) -> Model:
    """Load a model with its tokenizer.

    Arguments:
        source: a built-in name (`smollm2-135m-safe`, `smollm2-135m`), a Hugging Face directory, a `.gguf` file, or a
            hub id, `REPOSITORY` or `REPOSITORY@REVISION` (a branch, a tag or a commit). A directory or hub repository
            may also hold a LoRA adapter in PEFT's format: the base model that it names is loaded, and the adapter is
            added to its weights.
        dtype: `float32`, `bfloat16` or `float16`, for parameters and activations; by default `float32` on a CPU and
            `bfloat16` on an accelerator.
        on_host: keep the parameters in host memory, as numpy arrays; a scan then streams the weights of each point to
            the devices. By default only if the devices cannot hold the parameters twice.
        mesh_shape: the number of devices that batch rows (`points`) and weights (`model`) are sharded over. By default
            the weights are sharded over the fewest devices that can hold three copies; a CPU counts as one device.
        keep: keep the parameters in the cache directory, as an Orbax checkpoint that makes the next load faster.
            Ignored for parameters in host memory.
        split: the former name of `mesh_shape`.
        base: the base model of an adapter, in any form that `source` may have, instead of the one that it names. Of
            adapters that were trained on one another, it is the base of the first.
        weights: False leaves the weights out, see `jaxscape.models.checkpoint.abstract_params`; that is enough to
            tokenize and to plan.

    Raises:
        UserError: there is no such model, it is not supported, or the mesh does not fit the devices.
    """
    check_jax_options()
    skip_absent_tpu()
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not supported; choose {', '.join(DTYPES)}.")
    checkpoint = _open(str(source), jnp.dtype(dtype), None if base is None else str(base))
    free = free_memory()
    size = jnp.dtype(dtype).itemsize * sum(map(math.prod, checkpoint.shapes.values()))
    mesh_shape = mesh_shape or split or _default_mesh_shape(size, free)
    mesh = make_mesh(mesh_shape, checkpoint.config.num_kv_heads)
    on_host = _stays_on_host(on_host, size, free, mesh_shape)
    if not weights:
        check_checkpoint(checkpoint, str(source))
        params = abstract_params(checkpoint.config, jnp.dtype(dtype), None if on_host else mesh)
    elif keep and not on_host:
        params = load_cached_params(checkpoint, jnp.dtype(dtype), str(source), mesh)
    else:
        params = load_params(checkpoint, jnp.dtype(dtype), str(source), None if on_host else mesh)
    return Model(
        name=str(source),
        config=checkpoint.config,
        params=params,
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        transformers_config=checkpoint.transformers_config,
        mesh=mesh,
        sources=checkpoint.sources,
        files=checkpoint.files,
    )


def _default_mesh_shape(size: int, free: int | None) -> MeshShape:
    """The mesh for weights of `size` bytes on devices with `free` bytes each; None if that is not known."""
    # A CPU counts as one device, because all devices that JAX may make of it share the same cores.
    count = 1 if jax.default_backend() == "cpu" and jax.process_count() == 1 else jax.device_count()
    return MeshShape(*from_first(lambda: default_mesh_shape(size, free, count)))


def _stays_on_host(on_host: bool | None, size: int, free: int | None, mesh_shape: MeshShape) -> bool:
    """Whether the parameters stay in host memory: as asked for, or by default if the devices cannot hold them twice."""
    if jax.process_count() > 1:
        if on_host:
            raise UserError(
                "Weights cannot be streamed from host memory with several processes, which do not share it."
            )
        return False
    if on_host is not None:
        return on_host
    return jax.default_backend() != "cpu" and free is not None and 2 * size > free * mesh_shape.model


def save_model(model: Model, directory: str | Path) -> None:
    """Write a model as a directory that transformers and `load_model` can load: safetensors in the parameters' dtype.

    Raises:
        UserError: the directory cannot be written or holds other weights, or `check_saveable` fails.
    """
    check_saveable(model)
    params = gathered(model.params)

    def write() -> None:
        huggingface.save_directory(
            Path(directory), params, model.transformers_config, model.tokenizer, model.eos_token_ids
        )

    from_first(write)


def check_saveable(model: Model) -> None:
    """Raise a `UserError` if the model cannot be saved for transformers.

    This is so for a GGUF file whose RoPE scaling is a table, which a transformers configuration cannot express.
    """
    written, computed = from_transformers(model.transformers_config).layers, model.config.layers
    pairs = [(a.rope, b.rope) for a, b in zip(written, computed, strict=True) if a.rope and b.rope]
    if not all(np.allclose(a.frequencies, b.frequencies, rtol=1e-6, atol=0) for a, b in pairs):
        raise UserError(
            f"{model.name} scales its RoPE by a table, which a Hugging Face directory cannot hold; start from the "
            f"model's own directory instead of its GGUF file."
        )


def _open(source: str, dtype: jnp.dtype, base: str | None, adapters: tuple[Path, ...] = ()) -> Checkpoint:
    """Open the checkpoint at `source`, see `load_model`.

    Arguments:
        dtype: the dtype in which adapters are added to their base.
        base: the base model, if `source` is an adapter; None for the one that it names.
        adapters: the directories of the adapters that this checkpoint is the base of. If it is one of them itself, the
            adapter is its own base, which is an error.
    """
    path = fetched(source)
    if not source.strip():  # as a path, an empty name is the current directory
        raise UserError("The name of the model is empty: give a name, a model directory, a .gguf file or a hub id.")
    if source in builtin.ADAPTERS:
        return _open_directory(builtin.ADAPTERS[source], dtype, base, adapters)
    if source not in builtin.MODELS:
        if path.is_dir():
            return _open_directory(path, dtype, base, adapters)
        if path.suffix.lower() != ".gguf" and not path.exists() and huggingface.HUB_ID.fullmatch(source):
            directory = huggingface.download(source)
            if not lora.is_adapter(directory) and not (directory / CONFIG).exists():
                raise UserError(
                    f"The hub's {source} has no {CONFIG}: if it holds GGUF files, download one of them "
                    f"('hf download {source.partition('@')[0]} FILE') and give that file."
                )
            return _open_directory(directory, dtype, base, adapters)
    if path.exists() or source in builtin.MODELS:
        _check_no_base(source, base)
    if source in builtin.MODELS:
        return open_gguf(builtin.packaged_file(builtin.MODELS[source]))
    if is_gguf(path):
        return open_gguf(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(pickled_message(path))
    if path.is_file():
        raise UserError(f"{source} is one file of a model: give its directory, {path.parent}, or a .gguf file.")
    hint = did_you_mean(source, builtin.NAMES)
    raise UserError(
        f"There is no model {source!r}{hint}: give a name ({', '.join(builtin.NAMES)}), a model directory, "
        f"a .gguf file or a hub id such as 'meta-llama/Llama-2-7b-chat-hf'."
    )


def _check_no_base(source: str, base: str | None) -> None:
    """Raise a `UserError` if a base is named for a model that is no adapter."""
    if base is not None:
        raise UserError(f"{source} is not a LoRA adapter, and only an adapter has a base: leave out --base (base=).")


def _open_directory(path: Path, dtype: jnp.dtype, base: str | None, adapters: tuple[Path, ...]) -> Checkpoint:
    """Open a model's directory, or an adapter's directory together with its base model."""
    if not lora.is_adapter(path):
        _check_no_base(str(path), base)
        return huggingface.open_directory(path)
    path = path.resolve()
    if path in adapters:
        raise UserError(f"The adapter {path} is its own base: write the base model's name into {lora.CONFIG}.")
    adapter = lora.load_adapter(path, base)
    others_base = None if adapter.base == base else base
    merged = lora.merge(_open_base(adapter.base, dtype, others_base, (*adapters, path)), adapter, dtype, str(path))
    language = adapter_language(path, merged)
    return replace(merged, tokenizer=language.tokenizer, eos_token_ids=language.eos_token_ids, sources=language.sources)


def _open_base(source: str, dtype: jnp.dtype, base: str | None, adapters: tuple[Path, ...]) -> Checkpoint:
    """Open the base model of the last of the adapters; an error says that it is the base that cannot be opened."""
    try:
        return _open(source, dtype, base, adapters)
    except UserError as error:
        raise UserError(
            f"The adapter {adapters[-1]} cannot be loaded without its base model {source}, which cannot be opened "
            f"({str(error).removesuffix('.')}); if the base lies elsewhere, name it with --base (base= in load_model)."
        ) from error
