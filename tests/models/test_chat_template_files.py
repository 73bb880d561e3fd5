"""The files in which a model directory may have its chat template, and which of them counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from helpers import BPE, BPE_MERGES

import jaxscape as js
from jaxscape.models.gguf_tokenizer import read_tokenizer
from jaxscape.prompts.chat_format import chat_text

NAMES = ("jinja", "config", "processor", "json")


@pytest.fixture
def bare(tiny_dir: Path, tmp_path: Path) -> Path:
    """A model directory whose tokenizer has no chat template."""
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "bare"))
    (directory / "chat_template.jinja").unlink()
    return directory


def template(name: str) -> str:
    return f"{name}: {{{{ messages[-1].content }}}}"


def add_template(directory: Path, name: str) -> None:
    """Write a template that names the file that it is in."""
    if name == "jinja":
        (directory / "chat_template.jinja").write_text(template(name))
    elif name == "config":
        change_tokenizer_config(directory, template(name))
    else:
        file = {"processor": "processor_config.json", "json": "chat_template.json"}[name]
        (directory / file).write_text(json.dumps({"chat_template": template(name)}))


def change_tokenizer_config(directory: Path, value: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))


@pytest.mark.parametrize("first", range(len(NAMES)))
def test_the_template_of_the_tokenizer_counts_before_that_of_the_processor(bare: Path, first: int) -> None:
    for name in NAMES[first:]:
        add_template(bare, name)
    model = js.load_model(bare, weights=False)
    assert chat_text(model.tokenizer, "Hi") == f"{NAMES[first]}: Hi"
    theirs = transformers.AutoTokenizer.from_pretrained(bare).chat_template
    assert theirs == (template(NAMES[first]) if NAMES[first] in ("jinja", "config") else None)


def test_a_template_in_chat_template_json_is_saved_with_the_model(bare: Path, tmp_path: Path) -> None:
    add_template(bare, "json")
    js.save_model(js.load_model(bare), tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == template("json")


def test_of_several_templates_the_default_counts(bare: Path) -> None:
    listed = [{"name": name, "template": template(name)} for name in ("rag", "default", "tool_use")]
    change_tokenizer_config(bare, listed)
    assert chat_text(js.load_model(bare, weights=False).tokenizer, "Hi") == "default: Hi"
    change_tokenizer_config(bare, None)
    (bare / "additional_chat_templates").mkdir()
    (bare / "additional_chat_templates" / "rag.jinja").write_text(template("rag"))
    with pytest.raises(js.UserError, match="no default chat template, but only rag: write the one for chats into a"):
        js.load_model(bare)
    add_template(bare, "jinja")
    assert chat_text(js.load_model(bare, weights=False).tokenizer, "Hi") == "jinja: Hi"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "chat_template.json is not valid JSON"), ('{"chat_template": ["a"]}', r"chat_template.json is \['a'\]")],
)
def test_a_damaged_chat_template_json_is_an_error(bare: Path, content: str, message: str) -> None:
    (bare / "chat_template.json").write_text(content)
    with pytest.raises(js.UserError, match=message):
        js.load_model(bare)


def test_a_gguf_file_needs_a_default_template_among_those_with_names() -> None:
    keys = gguf.Keys.Tokenizer
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        keys.MODEL: "gpt2",
        keys.PRE: "smollm",
        keys.LIST: BPE,
        keys.MERGES: BPE_MERGES,
        keys.CHAT_TEMPLATES: ["rag"],
        keys.CHAT_TEMPLATE_N.format(name="rag"): template("rag"),
    }
    with pytest.raises(js.UserError, match=r"no default chat template, but only \['rag'\]"):
        read_tokenizer(fields)
    assert chat_text(read_tokenizer(fields | {keys.CHAT_TEMPLATE: template("default")}), "Hi") == "default: Hi"
