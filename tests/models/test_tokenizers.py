"""Tokenizers that are only a SentencePiece model, compared with sentencepiece itself and with transformers."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from helpers import MakeModel, tiny_tokenizer

import jaxscape as js
from jaxscape.engine.batching import tokenize
from jaxscape.prompts.chat_format import chat_text

TEXTS = ["Hello world", "Write a poem about 12 geese.", "two  spaces", "a\n\nb\tc", "Zürich, 北京 🙂"]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}


def write_tokenizer(directory: Path, settings: dict[str, Any] | None, **options: Any) -> Any:
    """Put a SentencePiece model of 400 tokens in place of a directory's tokenizer, and return sentencepiece's own."""
    for file in (*directory.glob("*token*"), *directory.glob("chat_template*")):
        file.unlink()
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(js.load_prompts("harmful") + js.load_prompts("benign")),
        model_writer=content,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        **({"model_type": "bpe", "byte_fallback": True, "vocab_size": 400} | LLAMA | options),
    )
    (directory / "tokenizer.model").write_bytes(content.getvalue())
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


@pytest.fixture
def copy(make_model: MakeModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_model(vocab_size=410)[0], tmp_path / "copy"))


SETTINGS: list[dict[str, Any] | None] = [
    None,
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_llama_with_only_tokenizer_model(
    copy: Path, settings: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write_tokenizer(copy, settings)
    model = js.load_model(copy, "float32")
    for text in TEXTS:
        assert model.tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), text
    assert model.eos_token_ids == (2,)
    is_named = settings is not None and settings["tokenizer_class"].startswith("Llama")
    assert ("is read by transformers' LlamaTokenizer" in capsys.readouterr().err) != is_named


@pytest.mark.parametrize("settings", SETTINGS[1:4], ids=str)
def test_the_ids_of_a_chat_are_those_of_transformers(copy: Path, settings: dict[str, Any]) -> None:
    """Special tokens inside a text, the `legacy` flag and added tokens included."""
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}</s> {{ m['content'] }}{% endfor %}"
    added = {"content": "<|user|>", "special": True, "normalized": False}
    added |= {"lstrip": False, "rstrip": False, "single_word": False}
    write_tokenizer(copy, settings | {"chat_template": template, "added_tokens_decoder": {"400": added}})
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi there"}], return_dict=False)
    assert {1, 2, 400} <= set(ids)
    model = js.load_model(copy, "float32")
    assert tokenize(model, ["Hi there"], "default", 1) == [ids]


@pytest.mark.parametrize("legacy", [False, True])
def test_vicunas_format_has_the_token_ids_that_fastchat_gives_it(copy: Path, legacy: bool) -> None:
    """Vicuna's repositories have only `tokenizer.model`, and no template; FastChat lets the tokenizer put the BOS."""
    reference = write_tokenizer(copy, {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True})
    model = js.load_model(copy, "float32")
    text = chat_text(model.tokenizer, "Hi there").removeprefix("<s>").removeprefix(" ")
    assert text.startswith("A chat between a curious user")
    assert text.endswith("USER: Hi there ASSISTANT:")
    assert tokenize(model, ["Hi there"], "default", 1) == [model.tokenizer(text)["input_ids"]]
    assert tokenize(model, ["Hi there"], "default", 1) == [[1, *reference.encode(text)]]


def test_tokens_of_added_tokens_json(copy: Path) -> None:
    """As finetunes by transformers before 4.34 name them."""
    write_tokenizer(copy, {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"})
    (copy / "added_tokens.json").write_text('{"<|im_start|>": 400, "<|im_end|>": 401}')
    model = js.load_model(copy, "float32")
    assert model.tokenizer.encode("<|im_start|>Hi<|im_end|>", add_special_tokens=False)[::2][0] == 400
    assert model.eos_token_ids == (2, 401)


def test_a_tokenizer_without_all_characters(copy: Path) -> None:
    reference = write_tokenizer(copy, {"tokenizer_class": "LlamaTokenizer"}, byte_fallback=False, vocab_size=90)
    assert 0 in reference.encode("(4567)")
    tokenizer = js.load_model(copy, "float32").tokenizer
    assert tokenizer.encode("Hello world", add_special_tokens=False) == reference.encode("Hello world")


def test_a_gemma_with_only_tokenizer_model(make_model: MakeModel, tmp_path: Path) -> None:
    made, _ = make_model("gemma2", vocab_size=410, head_dim=8, pad_token_id=0)
    directory = Path(shutil.copytree(made, tmp_path / "copy"))
    reference = write_tokenizer(directory, {"tokenizer_class": "GemmaTokenizer"}, add_dummy_prefix=False)
    model = js.load_model(directory, "float32")
    for text in [*TEXTS, "  begins with blanks"]:
        assert model.tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), text


def test_a_saved_model_keeps_the_ids(copy: Path, tmp_path: Path) -> None:
    write_tokenizer(copy, None)
    model = js.load_model(copy, "float32")
    js.save_model(model, tmp_path / "saved")
    again = js.load_model(tmp_path / "saved", "float32").tokenizer
    for text in TEXTS:
        assert again.encode(text, add_special_tokens=False) == model.tokenizer.encode(text, add_special_tokens=False)


def test_texts_that_transformers_reads_otherwise_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sentencepiece folds blanks and characters with these options, and transformers' tokenizer of Llama does not."""
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    reference = write_tokenizer(copy, {"tokenizer_class": "LlamaTokenizer"}, **options)
    model = js.load_model(copy, "float32")
    for text in TEXTS[:2]:
        assert model.tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
    assert "with other token ids than sentencepiece gives for a text such as 'two  spaces" in capsys.readouterr().err


def test_a_tokenizer_that_transformers_reads_as_another_is_refused(copy: Path) -> None:
    write_tokenizer(copy, {"tokenizer_class": "LlamaTokenizer"}, model_type="word", byte_fallback=False)
    with pytest.raises(js.UserError, match="as another tokenizer than sentencepiece does"):
        js.load_model(copy, "float32")


def test_tiktokens_tokenizer_model(copy: Path) -> None:
    """Meta's original file of Llama 3 has the same name."""
    write_tokenizer(copy, None)
    (copy / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(js.UserError, match=r"tokenizer.model is not a SentencePiece model.*download .*tokenizer.json"):
        js.load_model(copy, "float32")


def test_tokenizer_json_comes_first(copy: Path) -> None:
    write_tokenizer(copy, None)
    tiny_tokenizer().save_pretrained(copy)
    expected = transformers.AutoTokenizer.from_pretrained(copy).encode("Hello world")
    assert js.load_model(copy, "float32").tokenizer.encode("Hello world") == expected
