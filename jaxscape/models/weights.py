"""The weight files of a model directory: which ones they are, the tensors in them, and the names of these tensors."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import check_not_pointer, read_json
from jaxscape.runtime.progress import note
from jaxscape.runtime.texts import listed

CONFIG = "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors")

MLX_ADAPTER = "holds an adapter of MLX; fuse it with 'mlx_lm.fuse --de-quantize', and pass the fused model's directory"
# What else a directory may hold instead of a model as safetensors, by a pattern of its files' names, and what to do.
_OTHER_CONTENTS = {
    "adapter_model.safetensors": "holds a LoRA adapter without its adapter_config.json; download that file too",
    "adapter_model.bin": "holds a LoRA adapter as a pickle without its adapter_config.json; download that file too",
    "zero_to_fp32.py": (
        "holds a DeepSpeed checkpoint, whose weights lie in pieces; run 'python zero_to_fp32.py . OUTPUT "
        "--safe_serialization' in it, and pass OUTPUT with the model's config.json and tokenizer files"
    ),
    "*zero_pp_rank_*": "holds the optimizer states of DeepSpeed; pass the model's directory",
    "*.distcp": (
        "holds the pieces of an FSDP checkpoint; run 'accelerate merge-weights DIRECTORY OUTPUT', and pass OUTPUT with "
        "the model's config.json and tokenizer files"
    ),
    "pytorch_model_fsdp_*": (
        "holds an FSDP checkpoint, whose weights lie in pieces; run 'accelerate merge-weights DIRECTORY/"
        "pytorch_model_fsdp_0 OUTPUT', and pass OUTPUT with the model's config.json and tokenizer files"
    ),
    "_CHECKPOINT_METADATA": "holds an Orbax checkpoint; convert it to safetensors with the tool that wrote it",
    "flax_model*.msgpack": (
        "holds Flax's msgpack weights; load them with from_flax=True in transformers 4, and save them with "
        "save_pretrained"
    ),
    "tf_model*.h5": (
        "holds TensorFlow's weights; load them with from_tf=True in transformers 4, and save them with save_pretrained"
    ),
    "consolidated*.safetensors": (
        "holds only Mistral's original format (consolidated.safetensors); download the model's files for transformers "
        "too, or convert them with transformers' convert_mistral_weights_to_hf.py"
    ),
    "consolidated*.pth": (
        "holds Meta's original format (consolidated.00.pth); convert it with transformers' "
        "convert_llama_weights_to_hf.py"
    ),
    "adapters.safetensors": MLX_ADAPTER,
    "*.npz": "holds numpy's .npz weights; convert them to safetensors with the tool that wrote them",
}


@runtime_checkable
class Tensor(Protocol):
    """A tensor that is read on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, index: Any) -> np.ndarray:
        """The part of the tensor that `index` selects."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: its name in the file.
        dtype: its dtype, by safetensors' name, such as `BF16`.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: Any) -> np.ndarray:
        """The part of the tensor that `index` selects."""
        try:
            if self.dtype == "F8_E4M3":
                return self._float8()[index]
            with safe_open(self.file, framework="numpy") as file:
                return np.asarray(file.get_slice(self.name)[index])
        except (SafetensorError, OSError) as error:
            raise damaged(self.file, error) from error

    def _float8(self) -> np.ndarray:
        """All of a tensor in FP8, which the safetensors library reads for torch only."""
        with self.file.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(size))[self.name]["data_offsets"]
            file.seek(8 + size + begin)
            return np.frombuffer(file.read(end - begin), ml_dtypes.float8_e4m3fn).reshape(self.shape)


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model directory's weights.

    As in transformers, `model.safetensors` comes before an index of shards, which a model that was saved again in one
    file leaves behind.

    Raises:
        UserError: there are none, the directory holds the weights twice, or the index is damaged or names files that
            are missing.
    """
    single, index = path / WEIGHTS, path / INDEX
    if single.is_file():  # other files, such as a saved direction, are not the model's
        if index.exists():
            _check_left_over(single, index)
        return [single]
    if index.exists():
        return _indexed_files(path, index)
    files = sorted(path.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(("consolidated", "adapter"))]
    if not files:
        missing = f"{path} has no .safetensors file: finish its download, or convert its weights to safetensors."
        raise UserError(_other_contents(path) or missing)
    _check_shards(path, files)
    return files


def check_is_model(path: Path) -> None:
    """Raise a `UserError` that says what a directory without a `config.json` holds instead of a model, if it is
    known."""
    if not (path / CONFIG).exists() and (contents := _other_contents(path)):
        raise UserError(contents)


def _other_contents(path: Path) -> str | None:
    """The error message for a directory that holds something else than a model as safetensors; None if it is not
    known what."""
    names = sorted((entry.name for entry in path.iterdir()), key=lambda name: (len(name), name))
    if models := [name for name in names if _holds_model(path / name)]:
        return f"{path} holds no model itself, but models in its subdirectories {listed(models)}: pass one of them."
    if snapshots := sorted(path.glob("snapshots/*/config.json")):
        return f"{path} is a folder of the hub's cache: pass the hub id, or {snapshots[0].parent}."
    for pattern, contents in _OTHER_CONTENTS.items():
        if any(path.glob(pattern)):
            return f"{path} {contents}."
    if any(re.fullmatch(r"global_step\d+", name) for name in names):
        return f"{path} {_OTHER_CONTENTS['zero_to_fp32.py']}."
    if gguf := [name for name in sorted(names) if name.lower().endswith(".gguf")]:
        return f"{path} holds the GGUF {'files' if len(gguf) > 1 else 'file'} {listed(gguf)}: pass the file itself."
    if any(Path(name).suffix in PICKLE_SUFFIXES for name in names):
        return pickled_message(path)
    return None


def _holds_model(path: Path) -> bool:
    """Whether a directory holds a model or an adapter, or is a checkpoint of transformers' trainer."""
    is_checkpoint = path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    return bool(is_checkpoint) or any((path / name).is_file() for name in (CONFIG, "adapter_config.json"))


def _check_left_over(single: Path, index: Path) -> None:
    """Say that an index beside `model.safetensors` is not used; a `UserError` if its shards are all there too."""
    try:
        shards = {file for file in _indexed_files(single.parent, index) if file != single}
    except UserError:  # it may also be damaged
        note(f"{single} is loaded; {index.name} beside it is left over: files that it names are missing.")
        return
    if shards:
        raise UserError(
            f"{single.parent} holds the weights twice, in {single.name} and in the files that {index.name} "
            f"names, and one of them is out of date: delete it."
        )


def _indexed_files(path: Path, index: Path) -> list[Path]:
    """The files that the index of a sharded checkpoint names, all of them in the directory `path`."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [path / Path(name).name for name in names]  # never outside the directory
        missing = [file.name for file in files if not file.exists()]
    except (KeyError, AttributeError, TypeError, OSError) as error:  # OSError: no file can have such a name
        raise UserError(f"{index} has no table of tensors ('weight_map'); download it again.") from error
    if missing:
        raise UserError(
            f"{path} lacks the weight files {listed(missing)} that its index names; finish its download, or delete "
            f"{index.name} if it belongs to other files."
        )
    return files


def _check_shards(path: Path, files: Sequence[Path]) -> None:
    """Raise a `UserError` if shards are missing, as far as the names of a sharded checkpoint without an index say."""
    numbers: dict[int, set[int]] = {}
    for file in files:
        if match := _SHARD.search(file.name):
            numbers.setdefault(int(match[2]), set()).add(int(match[1]))
    for count, present in numbers.items():
        if missing := sorted(set(range(1, min(count, 10**5) + 1)) - present):
            raise UserError(
                f"{path} has {len(present)} of {count} weight files; number {missing[0]} is missing: finish its "
                f"download."
            )


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of several safetensors files, by the names that `parameter_name` gives them.

    Raises:
        UserError: a file is damaged, or two tensors have one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _tensors_of(file):
            name = parameter_name(tensor.name)
            if name in tensors:
                raise UserError(_twice(name, tensors[name], tensor))
            tensors[name] = tensor
    return tensors


def _twice(name: str, first: StoredTensor, second: StoredTensor) -> str:
    if first.file == second.file:
        return f"{first.file} holds {name} twice, as {first.name} and {second.name}; keep only the model's own tensors."
    return f"{second.file} and {first.file} both hold {name}; keep only the model's own files."


def stored_dtypes(file: Path) -> list[str]:
    """The dtype of each tensor in a safetensors file, by safetensors' names, such as `BF16`.

    Raises:
        UserError: the file is damaged.
    """
    return [tensor.dtype for tensor in _tensors_of(file)]


def _tensors_of(file: Path) -> list[StoredTensor]:
    try:
        check_not_pointer(file)
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [
                StoredTensor(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
                for name, tensor in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def parameter_name(name: str) -> str:
    """The decoder's name of a tensor, whichever program wrote it.

    - `torch.compile`, FSDP, DDP and PEFT put the names of their wrappers before or into the names of parameters.
    - Multimodal models have the text model in a part `language_model`, written before or behind `model`.
    - A bare transformer, saved without its output head, has no `model` at the beginning.
    """
    name = re.sub(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+", r"\1", name)
    name = re.sub(r"^(?:module\.|base_model\.model\.|model\.(?=model\.|lm_head\.))+", "", name)
    name = re.sub(r"^(?:model\.)?language_model\.(?:model\.)?(?=(?:layers|embed_tokens|norm)\.)", "model.", name)
    name = re.sub(r"^(?:model\.)?language_model\.(?=lm_head\.)", "", name)
    return re.sub(r"^(?=(?:layers|embed_tokens|norm)\.)", "model.", name)


def is_norm(name: str) -> bool:
    """Whether a parameter is one of the norm parameters, which no direction of noise or of the loss perturbs."""
    return "norm" in name


def is_layer_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of the decoder is a matrix of a layer: not embedding, output head, norm or bias."""
    return len(shape) == 2 and not is_norm(name) and name not in (EMBEDDING, HEAD)


def is_redundant(name: str) -> bool:
    """Whether a tensor is computed from the configuration: RoPE's frequencies in old checkpoints."""
    return name.endswith("rotary_emb.inv_freq")


def tied(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a model whose configuration ties the output head to the embedding, and whether they are tied.

    As in transformers, the one that is stored is used for both, and two that differ are not tied.
    """
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    others = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    if head is None:
        return others, True
    if embedding is None:
        return others | {EMBEDDING: head}, True
    if head.shape == embedding.shape and np.array_equal(head.read(...), embedding.read(...)):
        return others, True
    note(
        f"{path} ties the output head to the embedding in its config.json, but stores two that differ; both are used, "
        f"as in transformers."
    )
    return dict(tensors), False


def pickled_message(path: Path) -> str:
    """The error message for weights that are pickled."""
    return (
        f"The weights in {path} are pickled, and loading a pickle can run any code; convert them to safetensors "
        f"first, for example with transformers' save_pretrained."
    )


def damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that the safetensors library cannot read."""
    return UserError(
        f"{file} cannot be read as safetensors ({reason(error)}); it is truncated or damaged, so download it again."
    )
