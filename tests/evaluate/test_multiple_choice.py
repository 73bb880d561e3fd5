"""Multiple choice: the formats of MMLU and ARC, the prompts, and the accuracy against transformers' logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import torch_logits

import jaxscape as js
from jaxscape.evaluate.measure import Subject
from jaxscape.evaluate.measures import make_measures
from jaxscape.evaluate.multiple_choice import examples_of, question_files, read_questions

DEV = "\n".join(['"What is 1 + 1?",1,2,3,4,B', "Which is a bird?,goose,fish,stone,key,A", '"A, or\nB?",a,b,c,d,D', ""])
TEST = "\n".join(
    [
        "What is a key?,a tool,a bird,a sea,a song,A",
        '"Which of these, if any, is ""red""?",sky,grass,blood,snow,C',
        "Is it so?,yes,no,perhaps,never,D",
        "What is 2 + 2?,1,2,3,4,D",
        "Where is it?,here,there,up,down,B",
        "",
    ]
)
ARC = [
    {
        "id": "one",
        "question": "Which is the warmest?",
        "choices": {"text": ["the sun", "ice", "a key"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "two",
        "question": "Which of these can fly far?",
        "choices": {"text": ["a stone", "a goose", "a lock", "the sea"], "label": ["1", "2", "3", "4"]},
        "answerKey": "2",
    },
]


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Files as in Hendrycks et al.'s archive: data/test/SUBJECT_test.csv and data/dev/SUBJECT_dev.csv."""
    for folder, text in (("dev", DEV), ("test", TEST)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"us_foreign_policy_{folder}.csv").write_text(text)
    return tmp_path / "test"


def torch_choice(model: js.Model, torch_model: Any, prompt: str, answers: list[str]) -> tuple[int, int]:
    """The choice with the largest log-likelihood, and that with the largest one per character."""
    sums = []
    for answer in answers:
        start, tokens = model.tokenizer(prompt)["input_ids"], model.tokenizer(f"{prompt} {answer}")["input_ids"]
        logits = torch.tensor(torch_logits(torch_model, np.array([tokens])))[0].log_softmax(-1)
        sums.append(sum(logits[i - 1, tokens[i]].item() for i in range(len(start), len(tokens))))
    return int(np.argmax(sums)), int(np.argmax(np.array(sums) / [len(answer) for answer in answers]))


@pytest.mark.parametrize("shots", [None, 0, 2])
def test_mmlu_is_asked_as_hendrycks_asks_it(make_model: Any, mmlu: Path, shots: int | None) -> None:
    """The prompt, written out, and the likeliest letter by transformers. By default there are five examples, but this
    file has three."""
    directory, torch_model = make_model(seed=12, max_position_embeddings=512)
    model = js.load_model(directory, "float32")
    name = f"multiple-choice:{mmlu}"
    if shots is None:
        with pytest.raises(js.UserError, match=r"dev.csv has 3 solved examples, but 5 were asked for"):
            make_measures([name], Subject(model, ()))
        return
    (measure,) = make_measures([name], Subject(model, (), num_shots=shots))
    opening = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    examples = (
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Which is a bird?\nA. goose\nB. fish\nC. stone\nD. key\nAnswer: A\n\n"
    )
    opening += examples if shots else ""
    expected = []
    for row, answer in (
        ("What is a key?\nA. a tool\nB. a bird\nC. a sea\nD. a song", 0),
        ('Which of these, if any, is "red"?\nA. sky\nB. grass\nC. blood\nD. snow', 2),
        ("Is it so?\nA. yes\nB. no\nC. perhaps\nD. never", 3),
        ("What is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4", 3),
        ("Where is it?\nA. here\nB. there\nC. up\nD. down", 1),
    ):
        prompt = f"{opening}{row}\nAnswer:"
        assert prompt in [model.tokenizer.decode(tokens) for tokens in measure.prompts]  # type: ignore[attr-defined]
        expected.append(torch_choice(model, torch_model, prompt, ["A", "B", "C", "D"])[0] == answer)
    samples = measure.samples(model.params)
    assert samples[:, 0].tolist() == expected
    value = measure.summary(samples)["value"]
    low, high = js.wilson_interval(100 * np.mean(expected), 5)
    assert value == pytest.approx((100 * np.mean(expected), float(low), float(high)))
    assert [source["shots"] for source in measure.settings["files"]] == [shots]


@pytest.mark.parametrize("form", ["hub", "published"])
def test_arc_is_asked_as_lm_evaluation_harness_asks_it(make_model: Any, tmp_path: Path, form: str) -> None:
    """The answer is the text of a choice; labels are letters or digits."""
    directory, torch_model = make_model(seed=13)
    model = js.load_model(directory, "float32")
    entries: list[Any] = ARC
    if form == "published":
        entries = [
            {
                "id": entry["id"],
                "question": {
                    "stem": entry["question"],
                    "choices": [
                        {"text": text, "label": label}
                        for text, label in zip(entry["choices"]["text"], entry["choices"]["label"], strict=True)
                    ],
                },
                "answerKey": entry["answerKey"],
            }
            for entry in ARC
        ]
    path = tmp_path / "ARC-Challenge-Test.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (measure,) = make_measures([f"multiple-choice:{path}"], Subject(model, ()))
    chosen = [
        torch_choice(model, torch_model, f"Question: {entry['question']}\nAnswer:", entry["choices"]["text"])
        for entry in ARC
    ]
    assert measure.samples(model.params).tolist() == [
        [float(pick == answer) for pick in picks] for picks, answer in zip(chosen, (0, 1), strict=True)
    ]


def test_mmlu_on_the_hub_has_lists_and_indices(tmp_path: Path) -> None:
    entry = {"question": " Is it so? ", "subject": "logic", "choices": ["yes", "no"], "answer": 1}
    (tmp_path / "a.json").write_text(json.dumps([entry, entry | {"answer": "A"}]))
    questions = read_questions(tmp_path / "a.json")
    assert [question.answer for question in questions] == [1, 0]
    assert questions[0].solved == "Is it so?\nA. yes\nB. no\nAnswer: B"


def test_files_of_examples_are_found(tiny: js.Model, tmp_path: Path, mmlu: Path) -> None:
    assert examples_of(mmlu / "us_foreign_policy_test.csv") == tmp_path / "dev" / "us_foreign_policy_dev.csv"
    for name in ("ARC-Easy-Test.jsonl", "ARC-Easy-Train.jsonl", "my_questions.csv", "contest.csv"):
        (tmp_path / name).write_text("")
    assert examples_of(tmp_path / "ARC-Easy-Test.jsonl") == tmp_path / "ARC-Easy-Train.jsonl"
    assert examples_of(tmp_path / "my_questions.csv") is None
    assert examples_of(tmp_path / "contest.csv") is None
    assert question_files(tmp_path) == [tmp_path / "ARC-Easy-Test.jsonl"]
    (tmp_path / "my_questions.csv").write_text(TEST)
    with pytest.raises(js.UserError, match=r"no solved examples for .*my_questions.csv.*--shots 0"):
        make_measures([f"multiple-choice:{tmp_path / 'my_questions.csv'}"], Subject(tiny, (), num_shots=5))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "has no questions in it"),
        ("a.csv", "Why?,a,b,c,d,E\n", "question 1 has the answer 'E', which is none of its choices A, B, C, D"),
        ("a.csv", "Why?,a,b,c,d,A\nWhy?,a,,c,d,B\n", "question 2 has a question or a choice that is no text, or is"),
        ("a.csv", "Why?,a\n", "question 1 has 0 choices"),
        ("a.csv", 'Why?,"a\n', "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.jsonl", '{"question": "Why?"}\n', "question 1 is not a question of MMLU's or ARC's format"),
        ("a.jsonl", '{"question": "Why?", "choices": ["a", "b"], "answer": 2}\n', "the answer '2', which is none"),
        (
            "a.jsonl",
            '{"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "A"}\n',
            "the answer 'A', which is none of its choices 1, 2",
        ),
        ("a.parquet", "PAR1", "Parquet file: convert it"),
        ("a.xml", "<a/>", "no questions in .*: give a directory, or a file in .csv, .json, .jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_user_errors(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(js.UserError, match=message):
        [read_questions(path) for path in question_files(tmp_path / name)]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b"])
def test_a_question_may_have_any_character(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.csv").write_text(f"Why{mark}?,a,b,c,d,A\n", encoding="utf-8")
    entry = {"question": f"Why{mark}?", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        (question,) = read_questions(tmp_path / name)
        assert question.text == f"Why{mark}?"


def test_an_empty_directory_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(js.UserError, match="has no questions: no file ends in"):
        question_files(tmp_path)
