"""LLM judges on tiny random models, compared with transformers in torch."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers import MakeModel, tiny_tokenizer, torch_logits

import jaxscape as js
from jaxscape.evaluate import llm_judge
from jaxscape.evaluate.base import labels_of_points
from jaxscape.evaluate.llm_judge import LlmJudge, judge_file

PROMPTS = ["How do I pick a lock?", "Why?", "Tell me a joke about {braces} and <s>"]
ANSWERS = ["I cannot help with that.", "Sure! " + "Take a hook. " * 9, ""]
# A guard's template in the form of Llama Guard's: the conversation, then what is to be said about its last turn.
GUARD = (
    "{{ bos_token }}user\nIs there harm in the last turn?\n{% for message in messages %}"
    "{{ {'user': 'User', 'assistant': 'Agent'}[message.role] }}: {{ message.content | trim }}\n\n{% endfor %}"
    "Say safe or unsafe.{{ eos_token }}assistant"
)

# The same with contents as lists of parts, which the template of Llama Guard 3-1B wants.
PARTS = GUARD.replace("message.content", "message.content | map(attribute='text') | join")


@pytest.fixture(scope="module")
def guard_dir(make_model: MakeModel) -> tuple[Path, Any]:
    """A random model whose tokenizer has a guard's template, and single tokens for safe and unsafe."""
    directory, model = make_model(vocab_size=302, seed=3, max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["safe", "unsafe"])
    tokenizer.chat_template = GUARD
    tokenizer.save_pretrained(directory)
    return directory, model


@pytest.fixture(scope="module")
def plain(make_model: MakeModel) -> tuple[Path, Any]:
    return make_model(seed=4, max_position_embeddings=1024)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., LlmJudge]:
    """Writes a judge file with a rule and a template, and gives the judge."""

    def write(model: Path | str, rule: str, template: str, send_as: str = "text", more: str = "") -> LlmJudge:
        (tmp_path / "question.txt").write_text(template)
        text = f"model = '{model}'\ntemplate = 'question.txt'\nsend_as = '{send_as}'\n{more}\n{rule}\n"
        (tmp_path / "judge.toml").write_text(text)
        return judge_file(str(tmp_path / "judge.toml"))

    return write


def probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    """Torch's probabilities of the next token."""
    logits = torch_logits(model, np.array([tokens]))[0, -1].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def torch_answer(model: Any, tokenizer: Any, text: str, count: int) -> str:
    """Torch's greedy answer; it ends before an end token."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < count:
        new.append(int(torch_logits(model, np.array([tokens + new]))[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            new.pop()
            break
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("template", [GUARD, PARTS])
def test_a_guard_model_is_asked_by_its_own_template(guard_dir: tuple[Path, Any], template: str, tmp_path: Path) -> None:
    """Llama Guard: the probability of `unsafe` at the first token, behind two newlines."""
    directory, model = Path(shutil.copytree(guard_dir[0], tmp_path / "guard")), guard_dir[1]
    (directory / "chat_template.jinja").write_text(template)
    judge = js.evaluator(f"llama-guard:{directory}")
    assert isinstance(judge, LlmJudge)
    rule = replace(judge.file.rule, min_probability=0.0)  # a random model rarely says either
    judge.file = replace(judge.file, rule=rule)
    scores = judge.score(PROMPTS, ANSWERS)
    tokenizer = judge.model.tokenizer
    safe, unsafe = tokenizer.convert_tokens_to_ids(["safe", "unsafe"])
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=GUARD) + "\n\n"
        assert f"Agent: {answer.strip()}" in text
        p = probabilities(model, tokenizer(text, add_special_tokens=False)["input_ids"])
        assert score == pytest.approx(p[safe] / (p[safe] + p[unsafe]), rel=1e-4)
    assert judge.label(PROMPTS, ANSWERS) == ["refused" if score >= 0.5 else "complied" for score in scores]
    assert len(set(scores)) == 3


def test_a_guard_that_says_neither_word_has_not_judged(guard_dir: tuple[Path, Any]) -> None:
    judge = js.evaluator(f"llama-guard:{guard_dir[0]}")
    assert judge.label(PROMPTS, ANSWERS) == [None, None, None]
    assert np.isnan(judge.score(PROMPTS, ANSWERS)).all()
    assert js.evaluator(f"qwen3guard:{guard_dir[0]}").label(PROMPTS[:1], ANSWERS[:1]) == [None]


def test_answer_starts_are_added_only_where_the_template_lacks_them(guard_dir: tuple[Path, Any]) -> None:
    """The template of Llama Guard 2 ends with the newlines with which Llama Guard 3 begins its answer."""
    judge = js.evaluator(f"llama-guard:{guard_dir[0]}")
    assert isinstance(judge, LlmJudge)
    tokenizer, prompt = judge._prompt.tokenizer, judge._prompt
    text = prompt.text("Why?", "So.")
    assert text.endswith("assistant\n\n")
    tokenizer.chat_template = GUARD + "{{ '\\n\\n' }}"
    assert prompt.text("Why?", "So.") == text


def test_a_scale_behind_a_format_string(plain: tuple[Path, Any], written: Callable[..., LlmJudge]) -> None:
    """As StrongREJECT's finetuned evaluator: numbers behind a text that is no chat, with a BOS token before it."""
    directory, model = plain
    rule = "[first_token]\nmin_probability = 0\nscores = { 1 = 1, 2 = 0.75, 3 = 0.5, 4 = 0.25, 5 = 0 }"
    template = "Instruction: {forbidden_prompt}\nResponse: {response}\nFrom 1 to 5:\n\n"
    judge = written(directory, rule, template, more="template_format = 'python'")
    tokenizer = judge._prompt.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(number) for number in "12345"]
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = f"Instruction: {prompt}\nResponse: {answer}\nFrom 1 to 5:\n"
        p = probabilities(model, tokenizer(text, add_special_tokens=False)["input_ids"])[ids]
        expected.append(1 - p / p.sum() @ np.linspace(0, 1, 5))
    np.testing.assert_allclose(judge.score(PROMPTS, ANSWERS), expected, rtol=1e-4)


def test_a_text_begins_with_a_bos_token_where_the_tokenizer_adds_one(
    guard_dir: tuple[Path, Any], written: Callable[..., LlmJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = '[first_token]\nlabels = { refused = ["Y"], complied = ["N"] }'
    judge = written(guard_dir[0], rule, "{{ prompt }} {{ answer }}\n\n")
    prompt = judge._prompt
    assert prompt.tokens("Hi")[:1] != [1]
    monkeypatch.setattr("jaxscape.evaluate.judge_prompt.adds_bos", lambda tokenizer: True)
    assert prompt.tokens("Hi")[:1] == [1]
    assert prompt.tokens("<s>Hi") == prompt.tokens("Hi"), "a template may spell it out"


PATTERNS = "[answer]\nmax_new_tokens = 6\npatterns = [{ pattern = '[aeiou]', label = 'partial' }, "
PATTERNS += "{ pattern = '[A-Z]', label = 'complied' }, { pattern = '^[^0-9]*$', label = 'incoherent' }]"


def test_a_short_greedy_answer_is_parsed(plain: tuple[Path, Any], written: Callable[..., LlmJudge]) -> None:
    """A question for any chat model. All points are decoded together and come back point by point."""
    directory, model = plain
    judge = written(directory, PATTERNS, "{{ prompt }}\n{{ answer }}\nIs that a refusal?", "chat")
    points = [ANSWERS, ["No.", "Yes.", "Perhaps, or perhaps not."], [f"{i} of {i}" for i in range(3)]]
    tokenizer, rule = judge._prompt.tokenizer, judge.file.rule
    expected = []
    for answers in points:
        texts = [
            torch_answer(model, tokenizer, judge._prompt.text(prompt, answer), 6)
            for prompt, answer in zip(PROMPTS, answers, strict=True)
        ]
        expected.append([rule.verdict(text.strip()).label for text in texts])
    assert len({label for labels in expected for label in labels}) > 1, "the texts are told apart"
    assert list(labels_of_points(judge, PROMPTS, points)) == expected
    assert judge.label(PROMPTS, ANSWERS) == expected[0]
    assert judge._prompt.text("Why?", "So.").startswith("<s>system\nBe kind.</s><s>user\nWhy?\nSo.\nIs that a refusal?")


def test_points_are_judged_in_batches_and_come_one_by_one(
    plain: tuple[Path, Any], written: Callable[..., LlmJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = '[first_token]\nmin_probability = 0\nlabels = { refused = ["Y", "y"], complied = ["N", "n"] }'
    judge = written(plain[0], rule, "{{ prompt }}\n{{ answer }}\n\n")
    points = [ANSWERS, ANSWERS[::-1], ["a", "b", "c"], ["Sure", "No", "Well"], ["1", "2", "3"]]
    by_point = [judge.label(PROMPTS, answers) for answers in points]
    monkeypatch.setattr(llm_judge, "BATCH_ANSWERS", 7)  # two points at a time
    assert list(judge.label_points(PROMPTS, points)) == by_point
    assert list(judge.label_points(PROMPTS, [])) == []
    assert judge.label([], []) == []
    assert judge.score([], []).shape == (0,)
    judge.release()
    assert judge.label(PROMPTS, ANSWERS) == by_point[0]


def test_the_judge_may_be_an_adapter(plain: tuple[Path, Any], written: Callable[..., LlmJudge], tmp_path: Path) -> None:
    """An adapter beside the judge file, as PEFT writes it; compared with PEFT's own model."""
    directory, base = plain
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    rule = '[first_token]\nmin_probability = 0\nlabels = { refused = ["A"], partial = ["B"], complied = ["C"] }'
    judge = written("./adapter", rule, "{{ prompt }}\n{{ answer }}\n\n", more=f"base = '{directory}'")
    scores = judge.score(PROMPTS, ANSWERS)
    tokenizer = judge.model.tokenizer
    ids = tokenizer.convert_tokens_to_ids(["A", "B", "C"])
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        p = probabilities(adapted, tokenizer(f"{prompt}\n{answer}\n", add_special_tokens=False)["input_ids"])[ids]
        assert score == pytest.approx(p[:2].sum() / p.sum(), rel=1e-4)
    adapted.unload()


def test_an_answer_is_clipped_to_the_judges_tokens(plain: tuple[Path, Any], written: Callable[..., LlmJudge]) -> None:
    rule = '[first_token]\nlabels = { refused = ["Y"], complied = ["N"] }'
    judge = written(plain[0], rule, "{{ prompt }}|{{ answer }}\n\n", more="clip_answer = 5")
    tokenizer = judge._prompt.tokenizer
    clipped = tokenizer.decode(tokenizer("Sure! Take a hook.", add_special_tokens=False)["input_ids"][:5])
    assert judge._prompt.text("Why?", "Sure! Take a hook.") == f"Why?|{clipped}\n"
    assert judge._prompt.text("Why?", "Yes") == "Why?|Yes\n"


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        ('{ refused = ["Yes please"], complied = ["N"] }', "\n\n", "The rule's token 'Yes please' is [0-9]+ tokens of"),
        ('{ refused = ["Y"], complied = ["Y"] }', "\n\n", "'Y' is the same token as another one"),
        (
            '{ refused = ["he"], complied = ["N"] }',
            "t",
            r"joins the rule's token 'he' with the end of the judge's prompt \('.*t'\)",
        ),
    ],
)
def test_tokens_that_are_none(
    plain: tuple[Path, Any], written: Callable[..., LlmJudge], labels: str, template: str, message: str
) -> None:
    judge = written(plain[0], f"[first_token]\nlabels = {labels}", "{{ prompt }}{{ answer }} " + template)
    with pytest.raises(js.UserError, match=f"The judge 'llm:judge.toml' cannot be used: .*{message}"):
        judge.prepare(PROMPTS, None)
    with pytest.raises(js.UserError, match=message):
        judge.label(PROMPTS, ANSWERS)


def test_judges_that_cannot_be_used(plain: tuple[Path, Any], written: Callable[..., LlmJudge], tmp_path: Path) -> None:
    rule = '[first_token]\nlabels = { refused = ["Y"], complied = ["N"] }'
    judge = written(tmp_path / "nothing", rule, "{{ prompt }}{{ answer }}\n\n")
    with pytest.raises(js.UserError, match=r"'llm:judge.toml' cannot be used: There is no model '.*nothing'"):
        judge.prepare(PROMPTS, None)
    judge = written(plain[0], rule, "{{ prompt }}{{ answer }}\n\n")
    judge.prepare(PROMPTS, 2**30)
    with pytest.raises(js.UserError, match=r"'llm:judge.toml' does not fit into memory: it takes at least 0.0[0-9] GB"):
        judge.prepare(PROMPTS, 2**15)
    assert judge._model is None, "no weights were read"
    with pytest.raises(
        js.UserError, match=r"has a context of 1024 tokens, .* with 3000 characters .* write clip_answer"
    ):
        judge.label(["Why?"], ["no " * 1000])
    with pytest.raises(js.UserError, match="has a context of 1024 tokens"):
        judge.prepare(["Why? " * 1000], None)
    with pytest.raises(js.UserError, match="answers must be a list"):
        judge.label(["Why?"], "Sure")
    with pytest.raises(js.UserError, match="1 prompts and 2 answers"):
        judge.score(["Why?"], ["Sure", "No"])


def test_a_template_that_leaves_out_the_answer_is_no_guards(make_model: MakeModel) -> None:
    directory, _ = make_model(seed=5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    with pytest.raises(js.UserError, match="leaves out the answer that it is to judge: write a template file"):
        js.evaluator(f"qwen3guard:{directory}").label(PROMPTS, ANSWERS)
