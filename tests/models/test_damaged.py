"""Damaged model files end in a one-sentence error, fast and with little memory, or load as the undamaged model."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import BPE, BPE_MERGES, SPM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import jaxscape as js
from jaxscape.models.checkpoint import named_leaves

T, Q = gguf.GGUFValueType, gguf.GGMLQuantizationType
FORMATS = {
    **{T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i"},
    **{T.FLOAT32: "f", T.BOOL: "?", T.UINT64: "Q", T.INT64: "q", T.FLOAT64: "d"},
}
HUGE = (2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 8, 2**64 - 1)
DEEP = b"[" * 100_000 + b"]" * 100_000

Pieces = dict[str, bytes]
Metadata = dict[str, tuple[T, Any]]
Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Damage:
    """A damaged file of a model.

    Attributes:
        says: a regular expression that the error must match; None if the model may load.
    """

    name: str
    file: str
    content: bytes
    says: str | None = "truncated or damaged, so download it again"


def number(value: int, width: int = 8) -> bytes:
    return (value % 2 ** (8 * width)).to_bytes(width, "little")


def encoded(kind: T, value: Any) -> Pieces:
    """A metadata value as in a GGUF file. The value of an array is the type of its elements and the elements."""
    if kind == T.STRING:
        return {"length": number(len(value.encode())), "text": value.encode()}
    if kind == T.ARRAY:
        of, values = value
        elements = b"".join(b"".join(encoded(of, element).values()) for element in values)
        return {"element type": number(of, 4), "length": number(len(values)), "elements": elements}
    return {"value": struct.pack(f"<{FORMATS[kind]}", value)}


def metadata(tokenizer: str = "gpt2") -> Metadata:
    tokens = BPE if tokenizer == "gpt2" else SPM
    lists: Metadata = (
        {"tokenizer.ggml.pre": (T.STRING, "smollm"), "tokenizer.ggml.merges": (T.ARRAY, (T.STRING, BPE_MERGES))}
        if tokenizer == "gpt2"
        else {"tokenizer.ggml.scores": (T.ARRAY, (T.FLOAT32, [-float(i) for i in range(len(tokens))]))}
    )
    return {
        "general.architecture": (T.STRING, "llama"),
        "general.alignment": (T.UINT32, 32),
        "llama.context_length": (T.UINT32, 128),
        "llama.embedding_length": (T.UINT32, 32),
        "llama.block_count": (T.UINT32, 1),
        "llama.feed_forward_length": (T.UINT32, 64),
        "llama.attention.head_count": (T.UINT32, 2),
        "llama.attention.head_count_kv": (T.UINT32, 1),
        "llama.attention.layer_norm_rms_epsilon": (T.FLOAT32, 1e-5),
        "tokenizer.ggml.model": (T.STRING, tokenizer),
        "tokenizer.ggml.tokens": (T.ARRAY, (T.STRING, tokens)),
        "tokenizer.ggml.token_type": (T.ARRAY, (T.INT32, [2, 3, 3, *[1] * (len(tokens) - 3)])),
        **lists,
        **{f"tokenizer.ggml.{name}_token_id": (T.UINT32, i) for i, name in enumerate(("unknown", "bos", "eos"))},
    }


def tensors(vocab: int) -> dict[str, tuple[Q, tuple[int, ...]]]:
    block = {"attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32)}
    block |= {"ffn_gate": (32, 64), "ffn_up": (32, 64), "ffn_down": (64, 32)}
    return {
        "token_embd.weight": (Q.Q8_0, (32, vocab)),
        "output.weight": (Q.Q8_0, (32, vocab)),
        **{f"blk.0.{name}.weight": (Q.F32, shape) for name, shape in block.items()},
        **{f"{name}.weight": (Q.F32, (32,)) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")},
    }


def gguf_pieces(fields: Metadata) -> Pieces:
    """The bytes of a GGUF file, divided into its fields, in the order of the file."""
    listed = tensors(len(BPE) if fields.get("tokenizer.ggml.model") != (T.STRING, "llama") else len(SPM))
    pieces = {"magic": b"GGUF", "version": number(3, 4), "tensors": number(len(listed)), "fields": number(len(fields))}
    for name, (kind, value) in fields.items():
        pieces |= {f"{name} key length": number(len(name)), f"{name} key": name.encode()}
        pieces |= {f"{name} type": number(kind, 4)}
        pieces |= {f"{name} {part}": content for part, content in encoded(kind, value).items()}
    data, rng = b"", np.random.default_rng(0)
    for name, (quantisation, shape) in listed.items():
        pieces |= {f"{name} name length": number(len(name)), f"{name} name": name.encode()}
        pieces |= {f"{name} rank": number(len(shape), 4), f"{name} shape": b"".join(map(number, shape))}
        pieces |= {f"{name} quantisation": number(quantisation, 4), f"{name} offset": number(len(data))}
        data += gguf.quantize(rng.normal(1, 0.1, shape[::-1]).astype(np.float32), quantisation).tobytes()
        data += bytes(-len(data) % 32)
    return pieces | {"padding": bytes(-sum(map(len, pieces.values())) % 32), "data": data}


def joined(pieces: Mapping[str, bytes]) -> bytes:
    return b"".join(pieces.values())


GGUF_PIECES = gguf_pieces(metadata())
GGUF = joined(GGUF_PIECES)
GGUF_HEADER = len(GGUF) - len(GGUF_PIECES["padding"]) - len(GGUF_PIECES["data"])


def truncated_gguf() -> Iterator[Damage]:
    begin = 0
    for name, content in GGUF_PIECES.items():
        yield Damage(f"ends before {name}", "model.gguf", GGUF[:begin])
        if len(content) > 8:
            yield Damage(f"ends within {name}", "model.gguf", GGUF[: begin + len(content) // 2])
        begin += len(content)
    yield Damage("ends a byte early", "model.gguf", GGUF[: len(GGUF) - len(GGUF_PIECES["data"]) % 32 - 1])


def overwritten_gguf() -> Iterator[Damage]:
    """Each number and text of the header, set to invalid values."""

    def put(piece: str, *values: int, says: str | None = Damage.says) -> Iterator[Damage]:
        width = len(GGUF_PIECES[piece])
        for value in values:
            content = number(value, width)
            if content != GGUF_PIECES[piece]:
                yield Damage(f"{piece} {value}", "model.gguf", joined(GGUF_PIECES | {piece: content}), says)

    yield from put("magic", 0, 0x4C4D4747)
    yield from put("version", 0, 1, 99, 2**32 - 1, 2 << 24, 3 << 24, says="version is|in version 1|big-endian")
    yield from put("tensors", 0, 1, 2**20, *HUGE, says="truncated or damaged|do not fit|blocks|no weights")
    yield from put("fields", 0, 1, 2**20, *HUGE, says="truncated or damaged|has the architecture None|type number")
    for piece, content in GGUF_PIECES.items():
        was = int.from_bytes(content[:8], "little")
        if piece.endswith("length"):
            yield from put(piece, was + 1, len(GGUF), *HUGE)
        if piece.endswith("type") and not piece.startswith("tokenizer.ggml.token_type"):
            yield from put(piece, T.ARRAY, 13, 2**32 - 1)
        if piece.endswith("rank"):
            yield from put(piece, 0, says="truncated or damaged|type number")
            yield from put(piece, 5, 2**16, *HUGE[:2], says="dimensions")
        if piece.endswith("quantisation"):
            yield from put(piece, 4, 99, 2**32 - 1, says="type number")
        if piece.endswith("offset"):
            yield from put(piece, was + 1, was + 32, was - 32, len(GGUF), *HUGE)
        if piece.endswith(("key", "name", "text")):
            yield Damage(f"{piece} UTF-8", "model.gguf", joined(GGUF_PIECES | {piece: b"\xff" * len(content)}))
    # The last two shapes have one element modulo 2⁶⁴.
    absurd = [(0, 2**60), (2**60, 0), (1, 2**62), (2**32, 2**32), (2**62, 2**62), (7, 0x6DB6DB6DB6DB6DB7)]
    for shape, name in product([*absurd, (2**64 - 1, 2**64 - 1)], ["blk.0.attn_q", "token_embd"]):
        piece = f"{name}.weight shape"
        yield Damage(f"{piece} {shape}", "model.gguf", joined(GGUF_PIECES | {piece: b"".join(map(number, shape))}))
    yield Damage("a tensor twice", "model.gguf", GGUF.replace(b"attn_k.weight", b"attn_q.weight"))
    of_none = {"output_norm.weight rank": number(2, 4), "output_norm.weight shape": number(0) + number(2**40)}
    yield Damage("an empty tensor", "model.gguf", joined(GGUF_PIECES | of_none), "is empty")
    yield Damage("a key twice", "model.gguf", GGUF.replace(b"llama.context_length", b"general.architecture"))


def odd_metadata() -> Iterator[Damage]:
    """Well-formed files with metadata that no model has."""

    def change(says: str | None = "model.gguf", of: str = "gpt2", **changes: tuple[T, Any] | None) -> Damage:
        names = {name.rsplit(".", 1)[-1]: name for name in metadata(of)}
        named = {names.get(name, name.replace("__", ".")): value for name, value in changes.items()}
        fields = {name: value for name, value in (metadata(of) | named).items() if value is not None}
        return Damage(f"{changes!s:.200} {of}", "model.gguf", joined(gguf_pieces(fields)), says)

    def listed(kind: T, values: list[Any]) -> tuple[T, Any]:
        return T.ARRAY, (kind, values)

    sizes = ("embedding_length", "block_count", "feed_forward_length", "head_count", "head_count_kv")
    wrong = [(T.STRING, "4"), (T.INT32, -1), (T.INT64, -(2**63)), (T.UINT32, 0), (T.FLOAT32, 2.0), (T.BOOL, True)]
    wrong += [listed(T.UINT32, [2, 2]), listed(T.UINT32, []), *((T.UINT64, size) for size in HUGE)]
    for name, value in product((*sizes, "llama__attention__key_length"), wrong):
        if (name, value) != ("llama__attention__key_length", (T.UINT32, 0)):  # 0 counts as no value
            yield change(**{name: value})
    for name in (*sizes[:4], "context_length", "layer_norm_rms_epsilon", "model", "tokens", "merges", "pre"):
        yield change(**{name: None})
    for value in ((T.UINT32, 0), (T.UINT32, 31), (T.UINT32, 2**31), (T.STRING, "32"), (T.UINT64, 32)):
        yield change("truncated or damaged", alignment=value)
    for value in ((T.FLOAT32, float("nan")), (T.FLOAT32, -1.0), (T.STRING, "x")):
        yield change(layer_norm_rms_epsilon=value)
    for name in ("architecture", "model", "pre", "llama__rope__scaling__type"):
        yield from (change(**{name: value}) for value in ((T.UINT32, 1), (T.STRING, "x" * 10_000)))
    texts, numbers, count = (T.STRING, ["x"] * 400), (T.FLOAT32, [1.0] * 400), len(BPE)
    for value in ((T.UINT32, 1), (T.STRING, "x"), (T.ARRAY, texts), (T.ARRAY, numbers), (T.ARRAY, (T.STRING, BPE[1:]))):
        yield change(tokens=value)
    for value in ((T.UINT32, 1), listed(T.INT32, [1]), listed(T.INT32, [1] * (count + 1)), listed(T.INT32, [])):
        yield change(token_type=value)
    every = {"tokens": listed(T.STRING, [f"t{i}" for i in range(20_000)]), "merges": listed(T.STRING, [])}
    yield change("do not fit the model", token_type=listed(T.INT32, [3] * 20_000), **every)  # 20000 added tokens
    for value in ((T.UINT32, 1), *(listed(T.STRING, [merge]) for merge in ("", "th", "t  h", "zz yy", "\0 t"))):
        yield change(merges=value)
    for value in ((T.UINT32, 1), listed(T.FLOAT32, [0.0]), listed(T.STRING, ["x"] * len(SPM)), listed(T.INT32, [])):
        yield change(of="llama", scores=value)
    yield change("a token of 3000000 characters", of="llama", tokens=listed(T.STRING, [*SPM[:-1], "x" * 3_000_000]))
    for name in ("unknown", "bos", "eos", "tokenizer__ggml__eot", "tokenizer__ggml__padding"):
        for token in ((T.INT32, -1), (T.UINT32, count), (T.UINT32, 2**32 - 1), (T.STRING, "1"), (T.FLOAT32, 1.0)):
            yield change("which is not one of its", **{f"{name}_token_id": token})
    sliding = {name.replace("llama.", "gemma2."): value for name, value in metadata().items()}
    sliding |= {"general.architecture": (T.STRING, "gemma2"), "gemma2.attention.key_length": (T.UINT32, 16)}
    for window in (0, *HUGE):
        fields = sliding | {"gemma2.attention.sliding_window": (T.UINT64, window)}
        yield Damage(f"window of {window}", "model.gguf", joined(gguf_pieces(fields)), "metadata|no model can have")
    yield change("chat_template is 1, not a string", tokenizer__chat_template=(T.UINT32, 1))
    yield change("values of type 9", general__tags=listed(T.ARRAY, [listed(T.UINT8, [1])[1]] * 2))
    yield change("list of 3000000 values", general__tags=listed(T.UINT8, [0] * 3_000_000))
    nested = {"general.tags key length": number(1), "general.tags key": b"x", "general.tags type": number(T.ARRAY, 4)}
    for name, elements in (
        ("a deep list", (number(T.ARRAY, 4) + number(1)) * 100_000),
        ("a list of empty lists", number(T.ARRAY, 4) + number(100_000) + (number(T.UINT8, 4) + number(0)) * 100_000),
    ):
        head, tail = dict(list(GGUF_PIECES.items())[:4]), dict(list(GGUF_PIECES.items())[4:])
        head["fields"] = number(len(metadata()) + 1)
        yield Damage(name, "model.gguf", joined(head | nested | {"elements": elements} | tail), "values of type 9")


def safetensors(header: bytes | Mapping[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return number(len(text) if length is None else length) + text + data


def damaged_safetensors(whole: bytes) -> Iterator[Damage]:
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    first, second = [name for name in header if name != "__metadata__"][:2]
    shape, (begin, end) = header[first]["shape"], header[first]["data_offsets"]

    def damage(name: str, content: bytes, says: str | None = Damage.says) -> Damage:
        return Damage(name, "model.safetensors", content, says)

    def change(says: str | None = Damage.says, **changes: Any) -> Damage:
        return damage(f"{changes!s:.200}", safetensors(header | {first: header[first] | changes}, data), says)

    for length in (0, 1, size - 1, size + 1, size + 8, len(whole), 10**8, 10**8 + 1, -1, *HUGE):
        yield damage(f"header of {length} bytes", safetensors(header, data, length))
    ends = {8 + size + end for tensor in header.values() if "dtype" in tensor for end in tensor["data_offsets"]}
    for cut in (*range(9), 8 + size // 2, 8 + size - 1, *sorted(ends), len(whole) - 1):
        if cut < len(whole):
            yield damage(f"ends after {cut} bytes", whole[:cut])
    yield damage("goes on", whole + b"x")
    for name, text in {**DAMAGED_JSON, "deep metadata": b'{"__metadata__":' + DEEP + b"}"}.items():
        yield damage(f"header {name}", safetensors(text, data))
    for dtype in ("F33", "", 5, None, "f32", "F16", "F64", "F8_E4M3", "x" * 10_000):
        yield change(dtype=dtype)
    for dtype in ("I32", "U32"):
        yield change("quantised weights must be converted", dtype=dtype)
    for other in ([2**62, 2**62], [2**32, 2**32], [2**64], [0], [0, 2**62], [], [-1], [1.5], ["3"], None, [1] * 1000):
        yield change(shape=other)
    for other in (shape[::-1], [shape[0] * shape[1]], [*shape, 1]):
        yield change("do not fit the model", shape=other)
    ranges = [[end, begin], [-1, end], [begin, begin], [begin, end + 4], [begin + 4, end + 4], [begin, 10**9]]
    ranges += [[2**64 - 4, 4], [0, 2**63], [2**63, 2**64 - 1], [0], [0, 1, 2], [], header[second]["data_offsets"]]
    for other in (*ranges, None, "x", ["0", "4"], [0.5, 1.5]):
        yield change(data_offsets=other)
    for other in (None, [], 3, {}):
        yield damage(f"a tensor is {other}", safetensors(header | {first: other}, data))
    for other in (3, [], {"a": 3}):
        yield damage(f"metadata is {other}", safetensors(header | {"__metadata__": other}, data))
    twice = json.dumps(header).replace(f'"{second}"', f'"{first}"').encode()
    yield damage("a tensor twice", safetensors(twice, data))
    yield damage("no tensors", safetensors({}, b""), "only 0 tensors for the 1 layers")
    yield damage(
        "a tensor renamed",
        safetensors({name.replace("lm_head", "lm_tail"): tensor for name, tensor in header.items()}, data),
        "missing lm_head.weight; not expected lm_tail.weight",
    )
    for place, mask in product(range(0, 8 + size, 17), (0x01, 0x80)):
        flipped = bytearray(whole)
        flipped[place] ^= mask
        yield damage(f"byte {place} flipped by {mask}", bytes(flipped), None)


DAMAGED_JSON = {
    "empty": b"",
    "cut": b'{"a": {"b": [1, ',
    "of zeros": bytes(100),
    "UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "deep list": DEEP,
    "unclosed": DEEP[:100_000],
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep value": b'{"a":' + DEEP + b"}",
    "huge number": b'{"a":' + b"9" * 100_000 + b"}",
}


def damaged_json(directory: Path) -> Iterator[Damage]:
    broken = "is not valid JSON .*; fix it|is not a JSON object; fix it"
    expected = dict.fromkeys(("config.json", "tokenizer_config.json", "generation_config.json"), broken)
    expected |= {"model.safetensors.index.json": broken, "tokenizer.json": "tokenizer in .* cannot be loaded"}
    for file, says in expected.items():
        yield from (Damage(f"{file} {name}", file, content, says) for name, content in DAMAGED_JSON.items())
        whole = (directory / file).read_bytes() if (directory / file).exists() else b'{"weight_map": {}}'
        for cut in range(1, len(whole.rstrip()), max(1, len(whole) // 10)):
            yield Damage(f"{file} ends after {cut} bytes", file, whole[:cut], says)
    config = json.loads((directory / "config.json").read_text())
    llama = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    fields = [("llama", name) for name in (*llama, "num_hidden_layers", "head_dim", "max_position_embeddings")]
    for family in ("qwen2", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"):
        fields += [(family, name) for name in ("num_hidden_layers", "head_dim", "sliding_window", "layer_types")]
    for (family, name), value in product(fields, (-1, 0, "3", [], [1], 1.5, float("nan"), 2**31, 2**62, 10**30)):
        content = json.dumps(config | {"model_type": family, name: value}).encode()
        yield Damage(f"config.json {family} {name} {value}", "config.json", content, None)
    for value in (None, 3, [], {}, "gpt2"):
        content = json.dumps(config | {"model_type": value}).encode()
        yield Damage(f"config.json model_type {value}", "config.json", content, r"config\.json: .*architecture")
    tables = ([], "x", 3, None, {"a": None}, {"a": 3}, {"a": []}, {"a": "x" * 300}, {"a": "m.safetensors", "b": 3})
    for table in tables:
        content = json.dumps({"weight_map": table}).encode()
        yield Damage(f"index {table!s:.50}", "model.safetensors.index.json", content, "no table of tensors")
    others = {"a": "", "b": "..", "c": "/etc/passwd", "d": "a\0b", "e": "\ud800", "f": "config.json"}
    for name, other in {**others, "g": "no.safetensors"}.items():
        content = json.dumps({"weight_map": {name: other}}).encode()
        yield Damage(f"index {other!r}", "model.safetensors.index.json", content, "lacks the weight files|damaged")
    many = json.dumps({"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(20_000)}}).encode()
    yield Damage("index of many", "model.safetensors.index.json", many, "and 19995 more that its index names")


# Runs in a process of its own, without the tests' type checks. SIGALRM kills it if a load takes too long.
LOAD_ALL = """
import json, re, resource, signal, sys
import jaxscape as js
from jaxscape.models.checkpoint import named_leaves

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

def load(path):
    signal.alarm(30)
    try:
        leaves = named_leaves(js.load_model(path, "float32").params)
        found = {name: leaf.shape for name, leaf in leaves.items()}
    except js.UserError as error:
        found = str(error)
    print(json.dumps([path, found, memory("VmHWM")]), flush=True)

paths = json.load(sys.stdin)
for path in paths[:2]:
    load(path)
limit = 2**20 * (memory("VmSize") + 1024)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths[2:]:
    load(path)
"""


@dataclass(frozen=True)
class Outcome:
    """The result of loading a damaged file.

    Attributes:
        found: the error message, or the shapes of the loaded parameters.
        expected: the shapes of the undamaged model.
        memory: peak memory of the process so far in MB, less the peak after loading the undamaged models.
    """

    damage: Damage
    path: Path
    found: str | Shapes
    expected: Shapes
    memory: int


@pytest.fixture(scope="module")
def small(make_model: Any) -> Path:
    directory: Path = make_model(hidden_size=16, intermediate_size=32, num_hidden_layers=1)[0]
    return directory


@pytest.fixture(scope="module")
def outcomes(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    damages = [*truncated_gguf(), *overwritten_gguf(), *odd_metadata()]
    damages += [*damaged_safetensors((small / "model.safetensors").read_bytes()), *damaged_json(small)]
    root = tmp_path_factory.mktemp("damaged")
    (root / "whole.gguf").write_bytes(GGUF)
    paths = [root / "whole.gguf", small]
    for i, damage in enumerate(damages):
        path = root / str(i)
        if damage.file == "model.gguf":
            path.mkdir()
            paths.append(path / damage.file)
        else:
            paths.append(Path(shutil.copytree(small, path)))
        if damage.file == "model.safetensors.index.json":  # it is not read beside model.safetensors
            (path / "model.safetensors").rename(path / "whole.safetensors")
        (path / damage.file).write_bytes(damage.content)
    result = subprocess.run(
        [sys.executable, "-c", LOAD_ALL], input=json.dumps(list(map(str, paths))), capture_output=True, text=True
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{damages[len(lines) - 2].name}: {result.stderr[-2000:]}"
    normal = {path.suffix: line for path, line in zip(paths[:2], lines, strict=False)}
    assert all(isinstance(shapes, dict) for _, shapes, *_ in normal.values()), normal
    return [
        Outcome(damage, path, found, normal[path.suffix][1], peak - lines[1][2])
        for damage, path, (_, found, peak) in zip(damages, paths[2:], lines[2:], strict=True)
    ]


def test_each_damaged_file_is_refused_in_one_clear_sentence(outcomes: list[Outcome]) -> None:
    def problem(outcome: Outcome) -> str | None:
        says, found = outcome.damage.says, outcome.found
        if not isinstance(found, str):
            if says is not None:
                return "loads"
            return None if found == outcome.expected else "loads as another model"
        if says is not None and not re.search(says, found):
            return "says something else"
        if str(outcome.path) not in found:
            return "names no file"
        return "is no sentence" if "\n" in found or len(found) > 2000 or "MemoryError" in found else None

    found = {outcome.damage.name: (text, outcome.found) for outcome in outcomes if (text := problem(outcome))}
    assert not found, "\n".join(f"{name}: {text}: {error!s:.500}" for name, (text, error) in found.items())
    assert len(outcomes) >= 200


def test_damaged_files_take_little_memory(outcomes: list[Outcome]) -> None:
    assert max(outcome.memory for outcome in outcomes) < 200


Overwritten = list[tuple[int, int]]
overwritten = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=12)


def overwrite(content: bytes, size: int, changes: Overwritten) -> bytes:
    """The content with some of its first `size` bytes changed."""
    changed = bytearray(content)
    for place, value in changes:
        changed[place % size] = value
    return bytes(changed)


def shapes_or_none(source: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        return {name: leaf.shape for name, leaf in named_leaves(js.load_model(source, "float32").params).items()}
    except js.UserError:
        return None


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=overwritten)
def test_a_gguf_header_with_overwritten_bytes(tmp_path: Path, changes: Overwritten) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUF)
    whole = shapes_or_none(file)
    assert whole is not None
    file.write_bytes(overwrite(GGUF, GGUF_HEADER, changes))
    assert shapes_or_none(file) in (None, whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=overwritten)
def test_files_of_a_directory_with_overwritten_bytes(
    small: Path, tmp_path: Path, name: str, changes: Overwritten
) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy", dirs_exist_ok=True))
    content = (small / name).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little") if name == "model.safetensors" else len(content)
    (copy / name).write_bytes(overwrite(content, size, changes))
    assert shapes_or_none(copy) in (None, shapes_or_none(small))


def test_big_endian_gguf_files_are_refused(tmp_path: Path) -> None:
    """The gguf library reads them, but does not swap the bytes of their weights."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(js.UserError, match="big-endian"):
        js.load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_of_mixed_dtypes_are_each_cast(small: Path, tmp_path: Path, dtype: str) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    mixed = {
        name: tensor.to(kinds[i % len(kinds)])
        for i, (name, tensor) in enumerate(load_file(small / "model.safetensors").items())
    }
    assert {tensor.dtype for tensor in mixed.values()} == {*kinds}
    save_file(mixed, copy / "model.safetensors")
    for name, leaf in named_leaves(js.load_model(copy, dtype).params).items():
        assert str(leaf.dtype) == dtype
        expected = mixed[name].to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected, err_msg=name)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    ],
    ids=str,
)
def test_quantised_tensors_must_be_converted_first(small: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    whole = load_file(small / "model.safetensors")
    whole["model.layers.0.mlp.up_proj.weight"] = whole["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(whole, copy / "model.safetensors")
    message = r"model.safetensors holds model.layers.0.mlp.up_proj.weight as .*: quantised weights must be converted"
    with pytest.raises(js.UserError, match=message):
        js.load_model(copy)
