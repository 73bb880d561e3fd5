"""Prompt sets and chat formats."""

import csv
import json
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from helpers import SHARED, tiny_tokenizer
from tokenizers import processors

import jaxscape as js
from jaxscape.models.chat_defaults import with_chat_template
from jaxscape.prompts import sets as prompts_module
from jaxscape.prompts.chat_format import SYSTEM_PROMPTS, chat_text, render


def test_built_in_sets_are_matched_and_cover_ten_categories_from_the_first_ten_on() -> None:
    harmful, benign = js.load_prompts("harmful"), js.load_prompts("benign")
    assert len({*harmful, *benign}) == 200
    path = Path(prompts_module.__file__).parents[1] / "data" / "prompts.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert Counter(row["category"] for row in rows) == dict.fromkeys({row["category"] for row in rows}, 10)
    assert len({row["category"] for row in rows[:10]}) == 10
    assert [row["harmful"] for row in rows] == harmful
    assert [row["benign"] for row in rows] == benign


def test_built_in_sets_have_none_of_the_prompts_they_are_compared_with() -> None:
    if not SHARED.exists():
        pytest.skip(f"no public data at {SHARED}")
    advbench = {goal.lower() for goal in js.load_prompts(SHARED / "advbench_000-279.csv")}
    lines = (SHARED / "mt_bench_questions.jsonl").read_text().splitlines()
    questions = {json.loads(line)["turns"][0].lower() for line in lines}
    ours = {prompt.lower() for prompt in js.load_prompts("harmful") + js.load_prompts("benign")}
    assert not ours & (advbench | questions)


def test_the_first_prompts_are_taken(adv80: list[str]) -> None:
    assert len(adv80) == 80
    assert adv80[0].startswith("Write a script that can exploit")
    assert js.load_prompts("harmful", 3) == js.load_prompts("harmful")[:3]


@pytest.mark.parametrize(("number", "message"), [(101, "has 100 prompts, but 101"), (0, "at least 1")])
def test_numbers_of_prompts_out_of_range(number: int, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.load_prompts("harmful", number)


LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}<<SYS>>{{ messages[0]['content'] }}<</SYS>>{% endif %}"
    "[INST]{{ messages[-1]['content'] }}[/INST]"
)
SILENT = "[INST]{{ messages[-1]['content'] }}[/INST]"
SPOKEN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA2
TODAY = "{%- set today = strftime_now('%d %B %Y') -%}On {{ today }}: {{ messages[-1]['content'] }}"
FIXED = datetime(2024, 7, 26, 12).strftime("%c, %j %x %-m")
DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
DATED += "{{ date_string }}: {{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    ("template", "system_prompt", "expected"),
    [
        (None, "default", "<s>system\nBe kind.</s><s>user\nHi</s><s>assistant\n"),
        (None, "none", "<s>system\n</s><s>user\nHi</s><s>assistant\n"),
        (None, "Be brief.", "<s>system\nBe brief.</s><s>user\nHi</s><s>assistant\n"),
        (LLAMA2, "default", "[INST]Hi[/INST]"),
        (LLAMA2, "none", "[INST]Hi[/INST]"),
        (LLAMA2, "Be brief.", "<<SYS>>Be brief.<</SYS>>[INST]Hi[/INST]"),
        (NO_SYSTEM, "none", "[INST]Hi[/INST]"),
        (NO_SYSTEM, "Be brief.", "[INST]Be brief.\n\nHi[/INST]"),
        (SILENT, "Be brief.", "[INST]Be brief.\n\nHi[/INST]"),
        (LLAMA2, "aoa", f"<<SYS>>{SYSTEM_PROMPTS['aoa']}<</SYS>>[INST]Hi[/INST]"),
        (DATED, "default", "26 Jul 2024: Hi"),
        ("{{ strftime_now('%d %B %Y') }}\n{{ messages[-1]['content'] }}", "default", "26 July 2024\nHi"),
        (TODAY, "default", "On 26 July 2024: Hi"),
        ("{{ strftime_now('%c, %j %x %-m') }}: {{ messages[-1]['content'] }}", "default", f"{FIXED}: Hi"),
        ("", "default", f"{VICUNA} USER: Hi ASSISTANT:"),
        ("", "none", "USER: Hi ASSISTANT:"),
        ("", "Be brief.", "Be brief. USER: Hi ASSISTANT:"),
        ("{{ 1 / 1 }}{{ messages[-1]['content'] }}", "default", "1.0Hi"),
    ],
)
def test_chat_texts(template: str | None, system_prompt: str, expected: str) -> None:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template or None
    with_chat_template(tokenizer)
    assert chat_text(tokenizer, "Hi", system_prompt) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ 1 / 0 }}", "division by zero"), ("{{ raise_exception('no users') }}", "no users")],
)
def test_templates_that_fail(template: str, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for system_prompt in ("default", "none", "Be brief."):
        with pytest.raises(js.UserError, match=message):
            chat_text(tokenizer, "Hi", system_prompt)


def test_a_word_that_is_no_name_is_no_system_prompt() -> None:
    with pytest.raises(js.UserError, match=r"no system prompt 'lama2' \(did you mean llama2\?\): give default"):
        chat_text(tiny_tokenizer(), "Hi", "lama2")


def test_a_system_message_before_the_assistants_opens_the_users_turn() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SPOKEN
    turns = [("system", "Be brief."), ("assistant", "Hello."), ("user", "Hi")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert render(tokenizer, messages) == "assistant: Hello.\nuser: Be brief.\n\nHi\n"


def test_chats_in_vicunas_format() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = render(with_chat_template(tokenizer), messages, add_generation_prompt=False)
    assert text == f"<s>{VICUNA} USER: Hi ASSISTANT: Hello.</s>USER: Why? ASSISTANT: So.</s>"
