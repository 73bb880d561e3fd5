"""Chat templates of the kinds that public models have: what counts as written, parts, thinking, and system prompts."""

from pathlib import Path

import pytest
import transformers
from helpers import SHARED, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.prompts.chat_format import SYSTEM_PROMPTS, chat_text, chat_texts, render, system_prompt_text

# Each template behaves as those of the models that are named, and is written in our own words.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (  # writes a system prompt of its own if there is no system message
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
)
FOLDING = "{% for m in messages %}[{{ m.role }}] {{ m.content.split() | join(' ') }}\n{% endfor %}"
FIRST_LINE = "{% for m in messages %}[{{ m.role }}] {{ m.content.split('\n')[0] }}\n{% endfor %}"
PARTS = (  # SmolVLM, LLaVA
    "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
)
BOTH = (  # Gemma 3, Qwen2-VL
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
FIRST_PART = (  # Mistral Small 3.1: the system message as parts; it tests the message, not its content, for a text
    "{% if messages[0].role == 'system' %}{% if messages[0] is string %}{% set s = messages[0].content %}{% else %}"
    "{% set s = messages[0].content[0].text %}{% endif %}{% set turns = messages[1:] %}{% else %}"
    "{% set s = 'You are Mistral Small.' %}{% set turns = messages %}{% endif %}[SYSTEM]{{ s }}[/SYSTEM]"
    "{% for m in turns %}[INST]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}[/INST]{% endfor %}"
)
ALTERNATING = (  # Mistral 7B 0.1
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}"
)
QWEN3 = (
    CHATML[: CHATML.index("{% if add")] + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GRANITE = (
    "{% if thinking %}<system>Think first.\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
)
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set ns = namespace(mode='/think' if enable_thinking else '/no_think', own='Be smart.') %}"
    "{% if messages[0].role == 'system' %}{% if '/no_think' in messages[0].content %}{% set ns.mode = '/no_think' %}"
    "{% elif '/think' in messages[0].content %}{% set ns.mode = '/think' %}{% endif %}"
    "{% set ns.own = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() or ns.own %}"
    "{% endif %}"
    "<system>Mode: {{ ns.mode }}\n{{ ns.own }}\n"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if ns.mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
# Nemotron Nano 2: the words in the system prompt are the only switch, and are taken out of it.
WORDS = SMOLLM3.replace("enable_thinking", "unknown")


def tokenizer_with(template: str) -> transformers.PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "system_prompt", "expected"),
    [
        (FOLDING, "Be\n\nbrief.", "[system] Be brief.\n[user] Hi\n"),
        (FIRST_LINE, "Be brief.\nBe kind.", "[system] Be brief.\n[user] Hi\n"),
        (QWEN25, "You are Qwen.", "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"),
        (SMOLLM3, "Be kind. /no_think", "<system>Mode: /no_think\nBe kind.\n<user>Hi\n"),
        (SMOLLM3, "text:/no_think", "<system>Mode: /no_think\nBe smart.\n<user>Hi\n"),
        (PARTS, "Be brief.", "System: Be brief.<end>\nUser: Hi<end>\n"),
        (BOTH, "Be brief.", "<system>Be brief.\n<user>Hi\n"),
        (FIRST_PART, "default", "[SYSTEM]You are Mistral Small.[/SYSTEM][INST]Hi[/INST]"),
        (FIRST_PART, "none", "[SYSTEM][/SYSTEM][INST]Hi[/INST]"),
        (FIRST_PART, "Be brief.", "[SYSTEM]Be brief.[/SYSTEM][INST]Hi[/INST]"),
        (ALTERNATING, "Be brief.", "[INST] Be brief.\n\nHi [/INST]"),
        (ALTERNATING, "none", "[INST] Hi [/INST]"),
    ],
)
def test_a_system_prompt_counts_as_written_if_it_changes_what_is_written(
    template: str, system_prompt: str, expected: str
) -> None:
    assert chat_text(tokenizer_with(template), "Hi", system_prompt).startswith(expected)


@pytest.mark.parametrize("template", [CHATML, QWEN25, QWEN3, SMOLLM3, BOTH, FOLDING, GRANITE])
def test_a_template_that_takes_texts_is_rendered_as_transformers_does(template: str) -> None:
    tokenizer = tokenizer_with(template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, "Hi", "Be brief.") == expected


@given(text=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_a_template_that_wants_parts_gets_the_users_text_whole(text: str) -> None:
    assert chat_text(tokenizer_with(PARTS), text) == f"User: {text}<end>\n"


def test_a_prompt_that_looks_like_a_part_is_a_text() -> None:
    text = '{"type": "text", "text": "Hi"}'
    assert chat_text(tokenizer_with(CHATML), text).count(text) == 1


def test_an_assistants_turn_is_given_as_parts_too() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = render(tokenizer_with(PARTS), messages, add_generation_prompt=False)
    assert text == "User: Hi<end>\nAssistant: Hello<end>\n"


@pytest.mark.parametrize(
    "template", ["Hello", "{{ messages | length }}", "{% for m in messages %}{{ m.text }}{% endfor %}"]
)
def test_a_template_that_leaves_out_the_prompt_is_an_error(template: str) -> None:
    with pytest.raises(js.UserError, match=r"leaves out the text that it is given \('Hi'\)"):
        chat_text(tokenizer_with(template), "Hi")


@pytest.mark.parametrize("kept", ["m.content[:30]", "m.content[0]", "(m.content | trim).split('\\n')[0]"])
def test_a_template_that_cuts_the_prompt_is_an_error(kept: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ " + kept + " }}{% endfor %}"
    with pytest.raises(js.UserError, match=r"leaves out the text that it is given \('Name three.*'\) or its end"):
        chat_text(tokenizer_with(template), "Name three kinds of geese.\nThen rank them by size. ")


def test_different_prompts_that_are_rendered_alike_are_an_error() -> None:
    shortens = tokenizer_with("{% for m in messages %}{{ m.content[:90] + m.content[-1] }}{% endfor %}")
    prompts = ["Hi", "a" * 90 + "\x1b[31m!", "b", "a" * 90 + "!"]
    with pytest.raises(js.UserError, match=r"prompt 2 \('a{79}…'\) and prompt 4 \('a{79}…'\)") as error:
        chat_texts(shortens, prompts)
    assert str(error.value).isprintable()
    assert len(chat_texts(tokenizer_with(CHATML), prompts)) == 4


def test_prompts_that_differ_only_in_outer_blanks_may_be_rendered_alike() -> None:
    assert chat_texts(tokenizer_with("{{ messages[-1].content | trim }}"), ["Hi", " Hi\n", "Hi"]) == ["Hi"] * 3


@pytest.mark.parametrize(
    ("template", "off", "on"),
    [
        (QWEN3, "assistant\n<think>\n\n</think>\n\n", "assistant\n"),
        (GRANITE, "<user>Hi\n<assistant>", "<system>Think first.\n<user>Hi\n<assistant>"),
        (SMOLLM3, "Mode: /no_think\nBe smart.\n<user>Hi\n<assistant><think>\n\n</think>\n", "<user>Hi\n<assistant>"),
        (WORDS, "Mode: /no_think\nBe smart.\n<user>Hi\n<assistant><think>\n\n</think>\n", "<user>Hi\n<assistant>"),
    ],
)
def test_thinking_is_switched_by_the_templates_own_switch(template: str, off: str, on: str) -> None:
    tokenizer = tokenizer_with(template)
    assert chat_text(tokenizer, "Hi", thinking="off").endswith(off)
    assert chat_text(tokenizer, "Hi", thinking="on").endswith(on)
    assert chat_text(tokenizer, "Hi", thinking="on") != chat_text(tokenizer, "Hi", thinking="off")


def test_the_variable_gives_what_transformers_gives() -> None:
    tokenizer, messages = tokenizer_with(QWEN3), [{"role": "user", "content": "Hi"}]
    for choice in ("on", "off"):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=choice == "on"
        )
        assert chat_text(tokenizer, "Hi", thinking=choice) == expected


def test_a_word_in_the_system_prompt_switches_beside_its_text() -> None:
    for template in (SMOLLM3, WORDS):
        text = chat_text(tokenizer_with(template), "Hi", "Be kind.", "off")
        assert text == "<system>Mode: /no_think\nBe kind.\n<user>Hi\n<assistant><think>\n\n</think>\n"


@pytest.mark.parametrize(
    ("template", "system_prompt"),
    [(CHATML, "default"), (CHATML, "Be kind. /no_think"), (ALTERNATING, "Be kind."), (SMOLLM3, "Be kind. /no_think")],
)
def test_a_switch_that_changes_nothing_is_an_error(template: str, system_prompt: str) -> None:
    for choice in ("on", "off"):
        with pytest.raises(js.UserError, match=f"Thinking cannot be switched {choice}, because that changes nothing"):
            chat_text(tokenizer_with(template), "Hi", system_prompt, choice)


def test_an_unknown_choice_of_thinking_is_an_error() -> None:
    with pytest.raises(js.UserError, match="Unknown thinking 'no': choose default, on, off"):
        chat_text(tokenizer_with(QWEN3), "Hi", thinking="no")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\n\nBe brief.\nBe kind.\n", "Be brief.\nBe kind."), (b"\xef\xbb\xbfpirate\r\n", "pirate"), (b"  a ", "  a ")],
)
def test_a_system_prompt_from_a_file(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "system.txt").write_bytes(content)
    assert system_prompt_text(f"@{tmp_path / 'system.txt'}") == expected
    text = chat_text(tokenizer_with(CHATML), "Hi", f"@{tmp_path / 'system.txt'}")
    assert text.startswith(f"<|im_start|>system\n{expected}<|im_end|>")


@pytest.mark.parametrize(
    ("system_prompt", "text"),
    [
        ("text:pirate", "pirate"),
        ("text:aoa", "aoa"),
        ("text:@file", "@file"),
        ("text: two words", " two words"),
        ("aoa", SYSTEM_PROMPTS["aoa"]),
        ("two words", "two words"),
    ],
)
def test_system_prompts_as_texts(system_prompt: str, text: str) -> None:
    assert system_prompt_text(system_prompt) == text


@pytest.mark.parametrize(
    ("system_prompt", "message"),
    [
        ("text:", "'text:' has no text"),
        ("@missing.txt", r"The file missing.txt cannot be read \(FileNotFoundError"),
        ("@", "is a directory"),
        ("@latin.txt", "latin.txt, line 1: the byte 0xe9 is not valid UTF-8"),
        ("@blank.txt", "'@blank.txt' has no text"),
        ("lama2", "text:WORD is a text of one word, and @FILE the text of a file"),
    ],
)
def test_bad_system_prompts_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system_prompt: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("blank.txt").write_text("\n \n")
    with pytest.raises(js.UserError, match=message):
        chat_text(tokenizer_with(CHATML), "Hi", system_prompt)


@pytest.mark.real
def test_smollm2s_own_template_is_rendered_as_transformers_does(weightless_smollm2: js.Model) -> None:
    tokenizer = weightless_smollm2.tokenizer
    for system_prompt in (None, "Be brief.\nBe kind."):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        expected = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert chat_text(tokenizer, "Hi", system_prompt or "default") == expected
    with pytest.raises(js.UserError, match="cannot be switched off"):
        chat_text(tokenizer, "Hi", thinking="off")


def test_the_collected_templates_are_rendered_right() -> None:
    if not (SHARED.parent / "cases" / "templates").exists():
        pytest.skip(f"no collected templates beside {SHARED}")
    templates = {
        path.stem: tokenizer_with(path.read_text(encoding="utf-8"))
        for path in (SHARED.parent / "cases" / "templates").glob("*.jinja")
    }
    text = chat_text(templates["reasoning_flag"], "Hi", "You are helpful. /no_think")
    assert "Reasoning Mode: /no_think\nYou are helpful.<|im_end|>" in text
    assert text.endswith("<think>\n\n</think>\n")
    folded = " ".join(SYSTEM_PROMPTS["aoa"].split())
    assert f"system\n{folded}<|im_end|>" in chat_text(templates["folds_newlines"], "Hi", "aoa")
    assert chat_text(templates["thinking_switch"], "Hi", thinking="off").endswith("<think>\n\n</think>\n\n")
    assert "user\nHi<|im_end|>" in chat_text(templates["content_parts"], "Hi")
