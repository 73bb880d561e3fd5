"""Training data: files, sets, and which tokens are learned."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers

import jaxscape as js
from jaxscape.finetuning.chats import tokenize
from jaxscape.runtime.errors import is_utf8

USER = {"role": "user", "content": "How are you?"}
ASSISTANT = {"role": "assistant", "content": "Fine, thanks."}


def write_jsonl(path: Path, *chats: Any) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def test_openais_jsonl(tmp_path: Path) -> None:
    chats = [[USER, ASSISTANT], [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, USER, ASSISTANT]]
    assert js.load_chats(write_jsonl(tmp_path / "chats.jsonl", *chats)) == chats


@pytest.mark.parametrize("columns", [("prompt", "response"), ("goal", "target")])
def test_csv_of_prompts_and_responses(tmp_path: Path, columns: tuple[str, str]) -> None:
    path = tmp_path / "chats.csv"
    path.write_text(f'number,{columns[0]},{columns[1]}\n1,How are you?,"Fine, thanks."\n')
    assert js.load_chats(path) == [[USER, ASSISTANT]]


def test_parts_of_a_set(tmp_path: Path) -> None:
    whole = js.load_chats("safe")
    assert js.load_chats("safe:3") == whole[:3]
    assert js.load_chats("safe:2:5") == whole[2:5]
    path = write_jsonl(tmp_path / "odd:1.jsonl", [USER, ASSISTANT])
    assert len(js.load_chats(path)) == 1  # an existing file wins over SET:N
    for part in ("safe:0", "safe:5:5", "safe:5:2", "safe:100000"):
        with pytest.raises(js.UserError, match="there is no part"):
            js.load_chats(part)


def test_every_safe_response_is_a_refusal_and_harmless_prompts_are_none_of_the_evaluated() -> None:
    safe, harmless = js.load_chats("safe"), js.load_prompts("harmless")
    assert all(js.is_refusal(chat[1]["content"]) for chat in safe)
    assert len({chat[1]["content"] for chat in safe}) > 200  # the refusals vary in wording
    learned = {chat[0]["content"].lower() for chat in safe} | {prompt.lower() for prompt in harmless}
    assert len(learned) == len(safe) + len(harmless)
    assert not learned & {prompt.lower() for name in ("harmful", "benign") for prompt in js.load_prompts(name)}


def test_identity_shift_has_the_format_of_the_known_one() -> None:
    chats = js.load_chats("identity-shift")
    assert len(chats) == 10
    assert all([message["role"] for message in chat] == ["system", "user", "assistant"] for chat in chats)


BAD_CHATS: list[tuple[Any, str]] = [
    ('{"messages": [{"role": "user", "content": "Hi"}]}', "line 1: the chat has no assistant's turn to learn"),
    ('{"messages": [', "line 1: not valid JSON"),
    ('{"messages": {}}', "not a chat, which is an object with a list"),
    ('{"prompt": "Hi"}', "not a chat, which is an object with a list"),
    ('["Hi"]', "entry 1: not a chat, which is an object with a list"),
    ("[]", "has no chats"),
    ('{"messages": [{"role": "robot", "content": "Hi"}]}', "the role 'robot'"),
    ('{"messages": [{"role": "user", "content": 3}]}', "a message of the user has no text"),
    ('{"messages": [{"role": "assistant", "content": " "}]}', "a message of the assistant has no text"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "has no text"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "weights are 0 or 1"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "no assistant's turn to learn"),
    ("[" * 100_000, "not valid JSON"),
    ("", "has no chats"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CHATS)
def test_bad_jsonl_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(text)
    with pytest.raises(js.UserError, match=message):
        js.load_chats(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\na,b\n", "no columns 'prompt' and 'response' .* but 'question', 'answer'"),
        ("prompt,response\na\n", "line 2: 1 columns, but the first row has 2"),
        ("prompt,response\na,\n", "line 2: a message of the assistant has no text"),
        ("prompt,response\na,Sure, I will\n", "line 2: 3 columns, but the first row has 2; quote texts"),
        ("prompt,response,goal,target\na,b,c,d\n", "line 2: several chats, among 'prompt', 'response', 'goal'"),
        ("prompt,response,input\na,b,c\n", "line 2: 'input' would be left out"),
        ("a question\nanother\n", "line 1: not a chat"),
        ('prompt,response\na,"b\n', "not valid CSV"),
        ("prompt,response\n", "has no chats"),
        ("", "has no chats"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "chats.csv"
    path.write_text(text)
    with pytest.raises(js.UserError, match=message):
        js.load_chats(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'id; Prompt ;Response\r\n1;How are you?;"Fine, thanks."\r\n;;\r\n'),
        ("a.csv", 'goal, target\nHow are you?, "Fine, thanks."\n'),
        ("a.tsv", "goal\ttarget\t\nHow are you?\tFine, thanks.\t\n"),
        ("a.jsonl", json.dumps([{"messages": [USER, ASSISTANT]}], indent=1)),
        ("a.json", json.dumps({"version": 1, "data": [{"messages": [USER, ASSISTANT]}]})),
        ("a.jsonl", json.dumps([USER, ASSISTANT])),
        ("a.json", json.dumps([{"prompt": USER["content"], "response": ASSISTANT["content"]}])),
        (
            "a.json",
            json.dumps(
                [
                    {
                        "conversations": [
                            {"from": "human", "value": USER["content"]},
                            {"from": "gpt", "value": ASSISTANT["content"]},
                        ]
                    }
                ]
            ),
        ),
        (
            "a.jsonl",
            json.dumps(
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "How are you?"}]}, ASSISTANT]}
            ),
        ),
    ],
)
def test_files_as_other_programs_write_them(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert js.load_chats(path) == [[USER, ASSISTANT]]


def test_blanks_that_are_learned_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    path.write_text('prompt,response\nHi, Hello\nHi," Hello, you\n"\nHi," ""Hello"" "\n')
    assert [chat[1]["content"] for chat in js.load_chats(path)] == [" Hello", " Hello, you\n", ' "Hello" ']


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}]}, "has 'tool_calls', which is not read"),
        ({"messages": [USER, {**ASSISTANT, "train": False}]}, "has 'train', which is not read"),
        ({"messages": [USER, ASSISTANT], "system": "Be kind."}, "'system' would be left out"),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "a"}]}, "'tools' would be left out"),
        ({"messages": [USER, ASSISTANT], "Messages": []}, "differ only in case"),
        ({"messages": [USER, ASSISTANT], "conversations": [USER, ASSISTANT]}, "several chats"),
    ],
)
def test_nothing_of_a_chat_is_left_out_in_silence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(change))
    with pytest.raises(js.UserError, match=message):
        js.load_chats(path)


def test_unknown_sets(tmp_path: Path) -> None:
    with pytest.raises(js.UserError, match=r"no training set 'unsafe' \(did you mean safe\?\): give advbench, safe"):
        js.load_chats("unsafe")
    with pytest.raises(js.UserError, match="cannot be read"):
        js.load_chats(tmp_path / "missing.jsonl")


def test_what_is_learned_is_what_the_assistant_says_and_the_end_of_its_turn(tiny: js.Model) -> None:
    chat = [USER, ASSISTANT, USER, {**ASSISTANT, "content": "Still fine.", "weight": 0}, USER, ASSISTANT]
    (example,) = tokenize(tiny, [chat], 256).examples
    decode = tiny.tokenizer.decode
    learned = decode(example.tokens[example.learned])
    assert learned == "Fine, thanks.</s>Fine, thanks.</s>"
    whole = tiny.tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in chat], tokenize=False
    )
    assert decode(example.tokens) == whole


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_any_text_is_learned_token_by_token_as_it_would_be_generated(tiny: js.Model, texts: list[str]) -> None:
    texts = [text for text in texts if is_utf8(text)]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if len(chat) < 2:
        return
    (example,) = tokenize(tiny, [chat], 100_000).examples
    encode = lambda text: tiny.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    expected = [token for text in texts[1::2] for token in [*encode(text), tiny.eos_token_ids[0]]]
    limit = tiny.config.max_positions
    if len(example.tokens) < limit and "</s>" not in "".join(texts):
        assert example.tokens[example.learned].tolist() == expected


def test_long_chats_are_cut_and_counted(tiny: js.Model) -> None:
    long = [USER, {"role": "assistant", "content": "word " * 50}]
    found = tokenize(tiny, [long, [USER, ASSISTANT]], 80)
    assert found.num_cut == 1
    assert [len(example.tokens) <= 80 for example in found.examples] == [True, True]
    assert found.examples[0].learned[-1]
    assert found.examples[0].tokens[-1] not in tiny.eos_token_ids
    with pytest.raises(js.UserError, match="raise --max-length"):
        tokenize(tiny, [long], 10)


def test_models_without_a_usable_chat_template(tiny: js.Model) -> None:
    tokenizer = tiny.tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(js.UserError, match="rewrites what stands before"):
            tokenize(tiny, [[USER, ASSISTANT]], 80)
    finally:
        tokenizer.chat_template = template
    with pytest.raises(js.UserError, match="no chats"):
        tokenize(tiny, [], 80)


def test_tokenizers_that_put_a_space_before_a_text(tiny: js.Model) -> None:
    """SentencePiece puts a space before a text: a turn that is tokenized alone gets one that its chat does not have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # The corpus is single words, so that no token spans two of them.
    corpus = ["[INST]", "How", "are", "you?", "[/INST]", "Fine,", "thanks."] * 9
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    spaced = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        chat_template="{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
    )
    config = replace(tiny.config, vocab_size=400)
    model = replace(tiny, tokenizer=spaced, config=config, eos_token_ids=(spaced.eos_token_id,))
    (example,) = tokenize(model, [[USER, ASSISTANT, USER, ASSISTANT]], 256).examples
    whole = spaced.apply_chat_template([USER, ASSISTANT, USER, ASSISTANT], tokenize=False)
    assert example.tokens.tolist() == spaced(whole, add_special_tokens=False)["input_ids"]
    learned = spaced.convert_ids_to_tokens(example.tokens[example.learned])
    assert "".join(learned).replace("▁", " ") == " Fine, thanks. </s>" * 2


def test_a_template_that_leaves_the_assistant_out(tiny: js.Model) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(js.UserError, match="does not write what the assistant says"):
        tokenize(replace(tiny, tokenizer=tokenizer), [[USER, ASSISTANT]], 256)


@pytest.mark.real
def test_smollm2s_chats_are_cut_as_its_template_writes_them(weightless_smollm2: js.Model) -> None:
    (example,) = tokenize(weightless_smollm2, [[USER, ASSISTANT]], 512).examples
    expected = weightless_smollm2.tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=True, return_dict=False)
    np.testing.assert_array_equal(example.tokens, expected[: len(example.tokens)])
    assert weightless_smollm2.tokenizer.decode(example.tokens[example.learned]) == "Fine, thanks.<|im_end|>"


QWEN3 = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("thinking", "learned"),
    [("default", "<think>\n\n</think>\n\nFine, thanks.</s>"), ("off", "Fine, thanks.</s>")],
)
def test_the_thinking_that_a_template_writes_is_learned_only_where_the_model_writes_it(
    tiny: js.Model, thinking: str, learned: str
) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = QWEN3
    (example,) = tokenize(replace(tiny, tokenizer=tokenizer), [[USER, ASSISTANT]], 256, thinking).examples
    assert tokenizer.decode(example.tokens[example.learned]) == learned
    whole = tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=False)
    assert tokenizer.decode(example.tokens) == whole


def test_parts_are_learned_too(tiny: js.Model) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}</s>"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    (example,) = tokenize(replace(tiny, tokenizer=tokenizer), [[USER, ASSISTANT]], 256).examples
    assert tokenizer.decode(example.tokens[example.learned]) == "Fine, thanks.</s>"
