"""GGUF files give the same tensors, logits and tokens here as in transformers (with torch)."""

import contextlib
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from helpers import BPE, BPE_MERGES, LONGROPE, SPM, torch_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import jaxscape as js
from jaxscape.models.checkpoint import fingerprint, named_leaves
from jaxscape.models.gguf import LLAMA3_FACTORS, LLAMA3_ROPE
from jaxscape.models.gguf_tokenizer import SPLITS, read_tokenizer
from jaxscape.models.rope import make_rope

Q = gguf.GGMLQuantizationType
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 256, 4, 2, 64, 512, 2


def dequantised_types() -> list[Q]:
    """The types that the gguf library turns into numbers."""
    found = []
    for kind in Q:
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind)
    return found


def quantised(kind: Q, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random quantised blocks. For types that gguf cannot quantise, random bytes; blocks of zeros take the place of
    those that are not finite numbers of a usual size."""
    with contextlib.suppress(NotImplementedError):
        return gguf.quantize(rng.normal(0, 0.1, shape).astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(blocks, kind)
        blocks[~(np.abs(values).max(axis=1) < 1)] = 0
    assert blocks.any()
    return blocks.reshape(shape[0], -1)


def write_gguf(path: Path, kind: Q = Q.F32, tokenizer: str = "gpt2", pre: str = "smollm", **extra: Any) -> Path:
    rng = np.random.default_rng(0)
    tokens = [*(BPE if tokenizer == "gpt2" else SPM), *extra.get("extra_tokens", ())]
    writer = gguf.GGUFWriter(path, extra.get("architecture", "llama"))
    writer.add_context_length(extra.get("context", 128))
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    if "attention.head_count_kv" not in extra.get("fields", {}):
        writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    adders = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    adders |= {bool: writer.add_bool}
    for key, value in extra.get("fields", {}).items():
        adders[type(value)](f"llama.{key}", value)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(tokens)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[0], types[1], types[2] = gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL
    if tokenizer == "gpt2":
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(BPE_MERGES)
    else:
        types[3:259] = [gguf.TokenType.BYTE] * 256
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
    if "extra_types" in extra:
        types[-len(extra["extra_types"]) :] = extra["extra_types"]
        writer.add_chat_template(extra["template"])
    writer.add_token_types(types[: extra.get("num_types")])
    for name, number in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    if "end_of_message" in extra:
        writer.add_eom_token_id(extra["end_of_message"])

    def add(name: str, rows: int, columns: int, kind: Q = kind) -> None:
        writer.add_tensor(name, quantised(kind, (rows, columns), rng), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN, Q.Q8_0)
    add("output.weight", len(tokens), HIDDEN)
    writer.add_tensor("output_norm.weight", rng.normal(1, 0.1, HIDDEN).astype(np.float32))
    for i in range(LAYERS):
        add(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"blk.{i}.ffn_gate.weight", MLP, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", MLP, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, MLP)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", rng.normal(1, 0.1, HIDDEN).astype(np.float32))
    for name, values in extra.get("tensors", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", dequantised_types(), ids=lambda q: q.name)
def test_tensors_and_logits_are_those_that_transformers_reads(tmp_path: Path, kind: Q) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kind)
    model = js.load_model(path, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert named_leaves(model.params).keys() == state.keys()
    for name, leaf in named_leaves(model.params).items():
        np.testing.assert_allclose(leaf, state[name].numpy(), rtol=1e-6, atol=1e-7, err_msg=name)
    (stored,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight")
    down = model.params["model"]["layers"]["1"]["mlp"]["down_proj"]["weight"]
    np.testing.assert_array_equal(down, gguf.dequantize(stored.data, kind))
    tokens = np.arange(3, 60)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(model(tokens) - expected).max() < 1e-4 * np.abs(expected).max()


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", {"head_dim": 256, "sliding_window": 7}),
    "gemma3": ("gemma3_text", {"head_dim": 256, "sliding_window": 7, "sliding_window_pattern": 2}),
    "phi3": ("phi3", {"sliding_window": 7, "pad_token_id": 0}),
}


def convert(model: Any, path: Path, kind: str) -> Path:
    """Write a transformers model to a GGUF file as llama.cpp's converter does."""
    c, writer = model.config, gguf.GGUFWriter(path, kind)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = model.model.layers[0].self_attn.head_dim
    if kind != "phi3":
        writer.add_key_length(head_dim)
    if rope["rope_type"] == "longrope":
        context = c.original_max_position_embeddings
        factor = math.log(c.max_position_embeddings / context) / math.log(context)
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
        writer.add_rope_scaling_orig_ctx_len(context)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + factor))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    if kind == "gemma2":  # the cap of attention scores is llama.cpp's default
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if kind == "gemma3":
        writer.add_sliding_window_pattern(2)
    writer.add_vocab_size(len(BPE))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(BPE)
    writer.add_token_merges(BPE_MERGES)
    for name, number in (("unk", 0), ("pad", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        added = 1 if kind.startswith("gemma") and "norm" in name else 0
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, tensor.numpy() + np.float32(added))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_are_read_as_transformers_reads_them(make_model: Any, tmp_path: Path, kind: str) -> None:
    family, options = FAMILIES[kind]
    _, original = make_model(family, vocab_size=len(BPE), **options)
    model = js.load_model(convert(original, tmp_path / "tiny.gguf", kind), "float32")
    tokens = np.arange(3, 60)[None]
    expected = torch_logits(original, tokens)
    assert np.abs(model(tokens) - expected).max() < 1e-4 * np.abs(expected).max()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    state = theirs.state_dict()
    for name, leaf in named_leaves(model.params).items():
        np.testing.assert_allclose(leaf, state[name].numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
    model.save_pretrained(tmp_path / "model")
    assert js.load_model(tmp_path / "model", "float32").config == model.config


def test_long_rope_is_read_from_its_factors(make_model: Any, tmp_path: Path) -> None:
    _, original = make_model(
        "phi3", vocab_size=len(BPE), rope_parameters=LONGROPE, original_max_position_embeddings=16, pad_token_id=0
    )
    path = convert(original, tmp_path / "tiny.gguf", "phi3")
    model = js.load_model(path, "float32")
    for length in (12, 60):
        tokens = np.arange(3, 3 + length)[None]
        expected = torch_logits(original, tokens)
        assert np.abs(model(tokens) - expected).max() < 1e-4 * np.abs(expected).max()


def test_phi3s_special_tokens_take_the_space_after_them(tmp_path: Path) -> None:
    found = []
    for kind in ("llama", "phi3"):
        fields = {"general.architecture": kind, "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1}
        fields |= {"tokenizer.ggml.tokens": SPM, "tokenizer.ggml.scores": [-float(i) for i in range(len(SPM))]}
        fields |= {"tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(SPM) - 259)]}
        tokenizer = read_tokenizer(fields)
        found.append(
            tokenizer.convert_ids_to_tokens(tokenizer("</s>\nthe<s> in", add_special_tokens=False)["input_ids"])
        )
    assert "<0x0A>" in found[0]
    assert "<0x0A>" not in found[1]
    assert found[1][found[1].index("<s>") :] == found[0][found[0].index("<s>") :]


BPE_TEXTS = ["the thin", " the  in", "in the.\n\nthe", "1234", "it's a né 你", "<|im_start|>the<|im_end|>", "\tthe"]
SPM_TEXTS = [
    "the thin",
    "the  in",
    "in the.\n\nthe",
    "1234",
    "it's a né 你",
    "the</s>",
]  # none begins with a space: see below


@pytest.mark.parametrize(
    ("tokenizer", "pre", "texts"),
    [
        ("gpt2", "llama-bpe", BPE_TEXTS),
        ("gpt2", "gpt-2", BPE_TEXTS),
        ("gpt2", "qwen2", BPE_TEXTS),
        ("gpt2", "dbrx", BPE_TEXTS),
        ("gpt2", "gpt-4o", BPE_TEXTS),
        ("gpt2", "tekken", BPE_TEXTS),
        ("llama", "", SPM_TEXTS),
    ],
)
def test_tokenizers_are_those_that_transformers_builds(
    tmp_path: Path, tokenizer: str, pre: str, texts: list[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tokenizer=tokenizer, pre=pre)
    ours = js.load_model(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in texts:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids, clean_up_tokenization_spaces=False) == text
    assert ours.eos_token == theirs.eos_token


@pytest.mark.parametrize("pre", sorted(SPLITS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()))
@given(
    text=st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z", "Cc"])) | st.text("aZ é'sSd1²\n/_\r你\u0301")
)
def test_texts_are_split_as_transformers_splits_them(pre: str, text: str) -> None:
    ours, theirs = (Split(Regex(splits[pre]), "isolated") for splits in (SPLITS, GGUF_PRE_TOKENIZER_SPLITS))
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_mistrals_tekken_splits_as_its_regex_says() -> None:
    """Phi-4-mini's keeps "don't" and three digits together, and Phi-4's does not split where small letters begin
    big ones."""
    pieces = {
        pre: [text for text, _ in Split(Regex(SPLITS[pre]), "isolated").pre_tokenize_str("don't useIt 2024//\n")]
        for pre in ("tekken", "gpt-4o", "dbrx")
    }
    assert pieces["tekken"] == ["don", "'t", " use", "It", " ", "2", "0", "2", "4", "//\n"]
    assert pieces["gpt-4o"] == ["don't", " use", "It", " ", "202", "4", "//\n"]
    assert pieces["dbrx"] == ["don", "'t", " useIt", " ", "202", "4", "//\n"]


@pytest.mark.parametrize(("pre", "is_taken_whole"), [("tekken", True), ("llama-bpe", True), ("dbrx", False)])
def test_tokens_that_no_merge_leads_to(tmp_path: Path, pre: str, is_taken_whole: bool) -> None:
    """Mistral's and Llama 3's tokenizers take a whole piece of the text as a token, if there is such a token."""
    path = write_gguf(tmp_path / "tiny.gguf", pre=pre, extra_tokens=["heat"])
    assert ("heat" in js.load_model(path).tokenizer.tokenize("heat")) == is_taken_whole


def split(path: Path, max_tensors: int = 7) -> list[Path]:
    """The parts that the gguf library writes of the model in a file."""
    reader, whole = gguf.GGUFReader(path), path.with_name("parts.gguf")
    writer = gguf.GGUFWriter(whole, "llama", split_max_tensors=max_tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *element = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=element[0] if element else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("parts-*-of-*.gguf"))


def test_a_split_model_is_read_from_any_of_its_parts(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", Q.Q8_0)
    whole, parts = js.load_model(path), split(path)
    assert [part.name for part in parts] == [f"parts-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        model = js.load_model(part)
        assert fingerprint(model.params) == fingerprint(whole.params)
        assert model.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    for part in parts:
        part.rename(part.with_suffix(".GGUF"))
    assert js.load_model(parts[1].with_suffix(".GGUF")).config == whole.config


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    first, second, third = split(write_gguf(tmp_path / "tiny.gguf"))
    content = second.read_bytes()

    def fails(path: Path, message: str) -> None:
        with pytest.raises(js.UserError, match=message):
            js.load_model(path)

    fails(third.rename(tmp_path / "renamed.gguf"), r"renamed.gguf is part 3 of 3 of a split model, but its name")
    fails(first, r"part 1 of 3 of a split model; put the other parts beside it \(missing: parts-00003-of-00003.gguf\)")
    (tmp_path / "renamed.gguf").rename(third)
    second.write_bytes(first.read_bytes())
    fails(third, "parts-00002-of-00003.gguf is not part 2 of 3, as its name says")
    second.write_bytes(content[: len(content) // 2])
    fails(first, "parts-00002-of-00003.gguf cannot be read as GGUF .* truncated or damaged")
    (tmp_path / "other").mkdir()
    few = split(write_gguf(tmp_path / "other" / "tiny.gguf"), max_tensors=8)
    second.write_bytes(few[1].read_bytes())
    fails(first, "The 3 parts of .* have 20 tensors instead of 21")


@pytest.mark.parametrize("name", ["MODEL.GGUF", "model.Gguf", "sha256-0b4f1e"])
def test_a_file_is_known_by_its_content_or_by_its_ending_in_any_case(tmp_path: Path, whole: bytes, name: str) -> None:
    """Ollama keeps its files under their checksums."""
    (tmp_path / name).write_bytes(whole)
    assert js.load_model(tmp_path / name).config.num_layers == LAYERS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.type": "adapter"}, "holds a LoRA adapter: give the model's file"),
        ({"general.type": "imatrix"}, "holds an importance matrix"),
        ({"general.type": "mmproj"}, "holds the image or audio encoder of a multimodal model"),
        ({"general.architecture": "clip"}, "holds the image or audio encoder"),
        ({"general.architecture": "controlvector"}, "holds a control vector"),
        ({}, "holds no weights, only metadata"),
    ],
)
def test_files_that_hold_no_model_say_what_they_hold(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        writer.add_string(key, value)
    if "no weights" not in message:
        writer.add_tensor("a", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(js.UserError, match=message):
        js.load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
            "but a pointer of Git LFS",
        ),
        (b"tjgg\3\0\0\0" + bytes(64), "is in the GGML format"),
        (b"GGUF\1\0\0\0" + bytes(64), "is in version 1 of the GGUF format"),
        (b"GGUF\0\0\0\3" + bytes(64), "is a big-endian GGUF file"),
    ],
)
def test_files_in_another_format_say_in_which(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(js.UserError, match=message):
        js.load_model(tmp_path / "x.gguf")


def test_a_tensor_type_that_the_library_does_not_know_is_named_by_its_number(tmp_path: Path, whole: bytes) -> None:
    """Forks of llama.cpp have types of their own."""
    name = b"blk.1.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 16
    (tmp_path / "x.gguf").write_bytes(whole[:at] + (137).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(js.UserError, match="a tensor of type number 137, which this version of the gguf library"):
        js.load_model(tmp_path / "x.gguf")


def test_a_directory_of_gguf_files_names_them(tmp_path: Path, whole: bytes) -> None:
    for name in ("b.gguf", "a.Q4_0.GGUF"):
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(js.UserError, match=r"holds the GGUF files a\.Q4_0\.GGUF, b\.gguf: pass the file itself"):
        js.load_model(tmp_path)


def test_other_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(64))
    with pytest.raises(js.UserError, match="is one file of a model: give its directory"):
        js.load_model(tmp_path / "model.safetensors")


def test_sentencepiece_puts_a_space_before_every_text(tmp_path: Path) -> None:
    """SentencePiece and Llama 2's tokenizers do so, too. transformers adds none to a text that begins with one."""
    tokenizer = js.load_model(write_gguf(tmp_path / "tiny.gguf", tokenizer="llama")).tokenizer
    assert tokenizer.tokenize(" the") == ["▁", "▁the"]


def test_smollm_splits_numbers_into_digits(tmp_path: Path) -> None:
    tokenizer = js.load_model(write_gguf(tmp_path / "tiny.gguf", pre="smollm")).tokenizer
    assert tokenizer.tokenize("the 123") == ["the", "Ġ", "1", "2", "3"]


@pytest.mark.parametrize(("sizes", "is_read"), [([KV_HEADS] * LAYERS, True), ([KV_HEADS, HEADS], False)])
def test_sizes_that_are_given_for_each_layer(tmp_path: Path, sizes: list[int], is_read: bool) -> None:
    plain = write_gguf(tmp_path / "plain.gguf")
    path = write_gguf(tmp_path / "model.gguf", fields={"attention.head_count_kv": sizes})
    if is_read:
        assert fingerprint(js.load_model(path, "float32").params) == fingerprint(js.load_model(plain, "float32").params)
    else:
        with pytest.raises(js.UserError, match=r"layers differ in attention.head_count_kv \(\[2, 4\]\), which is not"):
            js.load_model(path)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_that_is_not_causal_is_refused(tmp_path: Path, is_causal: bool) -> None:
    path = write_gguf(tmp_path / "model.gguf", fields={"attention.causal": is_causal})
    if is_causal:
        assert js.load_model(path, weights=False).config.num_layers == LAYERS
    else:
        with pytest.raises(js.UserError, match="attention is not causal"):
            js.load_model(path)


def test_the_token_that_ends_a_message_ends_an_answer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", end_of_message=5)
    assert js.load_model(path, weights=False).eos_token_ids == (2, 5)


def test_end_of_turn_tokens_are_found_in_the_vocabulary(tmp_path: Path) -> None:
    assert js.load_model(write_gguf(tmp_path / "tiny.gguf")).eos_token_ids == (2,)


@pytest.mark.parametrize("kind", list(gguf.TokenType))
def test_an_end_of_turn_token_of_another_type_is_whole_and_ends_the_turn(tmp_path: Path, kind: gguf.TokenType) -> None:
    """Files of Gemma 3 call `<start_of_turn>` normal, and files of Phi-3 call `<|end|>` user-defined."""
    template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    extra = {"extra_tokens": ["<|user|>", "<|end|>", "<|other|>"], "extra_types": [kind] * 3, "template": template}
    model = js.load_model(write_gguf(tmp_path / "tiny.gguf", **extra))
    user, end = model.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    is_whole = kind in (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    assert ({user, end} <= set(model.tokenizer("<|user|>the<|end|>")["input_ids"])) == is_whole
    assert (end in model.eos_token_ids) == is_whole
    (other,) = model.tokenizer.convert_tokens_to_ids(["<|other|>"])
    is_other_whole = is_whole and kind != gguf.TokenType.NORMAL
    assert (other in model.tokenizer("<|other|>")["input_ids"]) == is_other_whole


def test_llama3_scaling_is_read_from_its_divisors(tmp_path: Path) -> None:
    plain = js.load_model(write_gguf(tmp_path / "plain.gguf")).config.layers[0].rope.frequencies
    divisors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    scaled = js.load_model(write_gguf(tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": divisors})).config
    np.testing.assert_allclose(scaled.layers[0].rope.frequencies, np.array(plain) / divisors)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
            | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
            | {"beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_rope_scalings_are_read_as_llama_cpp_does(tmp_path: Path, fields: Any, options: Any) -> None:
    model = js.load_model(write_gguf(tmp_path / "tiny.gguf", fields=fields), "float32")
    expected = make_rope(HEAD_DIM, {"rope_theta": 1e4} | options, 128)
    np.testing.assert_allclose(model.config.layers[0].rope.frequencies, expected.frequencies)
    assert model.config.layers[0].rope.scale == pytest.approx(expected.scale)


@pytest.mark.parametrize("key", ["expert_count", "rope.scaling.yarn_log_multiplier", "attention.clamp_kqv"])
def test_keys_that_nobody_reads_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(js.UserError, match=rf"options that are not supported: llama\.{key}"):
        js.load_model(write_gguf(tmp_path / "tiny.gguf", fields={key: 8}))


@pytest.mark.parametrize("factor", LLAMA3_FACTORS)
def test_llama3_scaling_that_transformers_knows_can_be_written_back(tmp_path: Path, factor: float) -> None:
    plain = js.load_model(write_gguf(tmp_path / "plain.gguf")).config.layers[0].rope.frequencies
    options = LLAMA3_ROPE | {"factor": factor, "rope_theta": 1e4}
    scaled = make_rope(HEAD_DIM, options, 2**17).frequencies
    divisors = (np.array(plain) / scaled).astype(np.float32)
    model = js.load_model(write_gguf(tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": divisors}), "float32")
    model.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert again.config.rope_parameters["factor"] == factor
    tokens = np.arange(3, 60)[None]
    expected = torch_logits(again, tokens)
    assert np.abs(model(tokens) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'"),
        ({"tensors": {"blk.0.x": np.ones(3, np.int8)}}, "tensors of type I8, which the gguf library cannot read"),
        ({"tensors": {"blk.0.x": np.ones(3)}}, "tensors of type F64, which the gguf library cannot read"),
        ({"pre": "strange"}, "pre-tokenizer is 'strange'"),
        ({"tokenizer": "bert"}, "tokenizer is of type 'bert'"),
        ({"num_types": 5}, "has missing or invalid model metadata"),
        ({"tensors": {"blk.9.attn_q.weight": np.ones(3, np.float32)}}, "not expected blk.9.attn_q.weight"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.load_model(write_gguf(tmp_path / "tiny.gguf", **options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.9999))
def test_a_truncated_file_is_a_user_error(tmp_path: Path, whole: bytes, cut: float) -> None:
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(js.UserError, match="truncated or damaged"):
        js.load_model(tmp_path / "cut.gguf")
