"""Multiple choice by answer likelihood, in the file formats of MMLU and ARC."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxscape.engine.prefill import log_likelihoods
from jaxscape.evaluate.measure import Subject
from jaxscape.evaluate.statistics import Interval, wilson_interval
from jaxscape.models.checkpoint import Params
from jaxscape.models.model import Model
from jaxscape.prompts.records import read_text
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import file_checksum

ENDINGS = (".csv", ".json", ".jsonl")
DEFAULT_SHOTS = 5
_LETTERS = "ABCDEFGHIJ"
_DIGITS = "123456789"
_TEST = re.compile(r"(?<![a-z])(test|validation|val)(?![a-z])", re.IGNORECASE)


class Question(NamedTuple):
    """A question.

    Attributes:
        answer: the index of the right choice.
        has_letters: whether the choices are shown with letters, and a letter is the answer, as in MMLU; else the text
            of a choice is the answer, as in ARC.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    has_letters: bool

    @property
    def asked(self) -> str:
        """The question as the model gets it, without the answer."""
        if not self.has_letters:
            return f"Question: {self.text}\nAnswer:"
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, self.choices, strict=False))
        return f"{self.text}{choices}\nAnswer:"

    @property
    def answers(self) -> list[str]:
        """What the model may answer: for each choice, its letter or its text."""
        return list(_LETTERS[: len(self.choices)]) if self.has_letters else list(self.choices)

    @property
    def solved(self) -> str:
        """The question with its right answer."""
        return f"{self.asked} {self.answers[self.answer]}"


@dataclass(frozen=True)
class MultipleChoice:
    """The share of questions, in percent, whose right answer is the likeliest of its choices.

    The prompts follow the convention of EleutherAI's lm-evaluation-harness, and so for MMLU that of Hendrycks et al.
    (arXiv 2009.03300): "The following are multiple choice questions (with answers) about SUBJECT.", solved examples,
    the question, its choices with letters, and "Answer:"; the answer is a letter. For ARC (Clark et al., arXiv
    1803.05457): "Question: …\\nAnswer:", and the answer is the text of a choice. No chat format is used. `value` is the
    accuracy by the likelihood of the whole answer (`acc`), and `per-character` by the likelihood divided by the
    number of characters of the choice (`acc_norm`). A tie goes to the first choice.

    Attributes:
        prompts, answers: token ids; a pair for each choice of each question, one question after the other.
        questions: the questions.
        sources: for each file, its name and checksum, and the number of its questions and examples.
    """

    model: Model
    name: str
    prompts: list[list[int]]
    answers: list[list[int]]
    questions: list[Question]
    sources: list[dict[str, Any]]
    label: str = "accuracy (%)"

    @classmethod
    def make(cls, subject: Subject, option: str) -> "MultipleChoice":
        if not option:
            raise UserError("Name a file or directory with questions: multiple-choice:FILE.")
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        questions: list[Question] = []
        sources = []
        for path in question_files(Path(option)):
            own, (opening, shots) = read_questions(path), _opening(path, subject.num_shots)
            for question in own:
                for answer in question.answers:
                    prompt, tokens = encode_pair(subject.model, opening + question.asked, f" {answer}")
                    prompts.append(prompt)
                    answers.append(tokens)
            questions += own
            source = {"file": str(path), "sha256": file_checksum(path), "questions": len(own), "shots": shots}
            sources.append(source)
        return cls(subject.model, f"multiple-choice:{option}", prompts, answers, questions, sources)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"files": self.sources}

    def samples(self, params: Params) -> Float[np.ndarray, "questions 2"]:
        values = log_likelihoods(self.model, self.prompts, self.answers, params)
        totals = iter([value.sum(dtype=np.float64) for value in values])
        rows = []
        for question in self.questions:
            likelihoods = np.array([next(totals) for _ in question.choices])
            by_character = likelihoods / [max(len(answer), 1) for answer in question.answers]
            right = [float(scores.argmax() == question.answer) for scores in (likelihoods, by_character)]
            rows.append(right if np.isfinite(likelihoods).all() else [np.nan, np.nan])
        return np.array(rows)

    def summary(self, samples: Float[np.ndarray, "questions 2"]) -> Mapping[str, Interval]:
        intervals = {}
        for key, column in zip(("value", "per-character"), samples.T, strict=True):
            percent = 100 * column.mean()
            intervals[key] = Interval(float(percent), *map(float, wilson_interval(percent, len(column))))
        return intervals


def question_files(source: Path) -> list[Path]:
    """The files with questions: the file itself; or those of a directory whose names have `test`, `val` or `validation`
    in them, or all of its files if no name has.

    Raises:
        UserError: there is no such file, it is of another kind, or the directory has none.
    """
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in ENDINGS)
        tests = [path for path in files if _TEST.search(path.stem)]
        if not files:
            raise UserError(f"The directory {source} has no questions: no file ends in {', '.join(ENDINGS)}.")
        return tests or files
    if source.suffix.lower() == ".parquet":
        raise UserError(
            f"{source} is a Parquet file: convert it with pandas.read_parquet(FILE).to_json('questions.jsonl', "
            f"orient='records', lines=True)."
        )
    if source.suffix.lower() not in ENDINGS:
        raise UserError(f"There are no questions in {source}: give a directory, or a file in {', '.join(ENDINGS)}.")
    if not source.is_file():
        raise UserError(f"There is no file of questions {source}: give the path of one.")
    return [source]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    A table has no header and the columns question, choices A, B, C, D and the answer's letter, as MMLU's; a header of
    these names is allowed. JSON has objects, or a line for each, with `question`, `choices` (a list of texts) and
    `answer` (an index or a letter), as MMLU on the hub; or with ARC's `question`, `choices` and `answerKey`, as
    published (`{"stem": …, "choices": [{"text", "label"}, …]}`) or as on the hub (`{"text": […], "label": […]}`).

    Raises:
        UserError: the file has no questions, or a question cannot be read; the message names its place.
    """
    text = read_text(path)
    try:
        if path.suffix.lower() == ".csv":
            entries: list[Any] = list(csv.reader(io.StringIO(text, newline=""), strict=True))
            if entries and [cell.strip().lower() for cell in entries[0]][:2] == ["question", "a"]:
                entries = entries[1:]
        elif path.suffix.lower() == ".json":
            entries = json.loads(text)
            entries = entries if isinstance(entries, list) else [entries]
        else:
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"The questions in {path} cannot be read ({reason(error)}).") from error
    if not entries:
        raise UserError(f"The file {path} has no questions in it.")
    return [_question(entry, f"{path}, question {number}") for number, entry in enumerate(entries, 1)]


def _question(entry: Any, place: str) -> Question:
    try:
        if isinstance(entry, list):  # a row of MMLU's tables
            text, *choices, key = entry
            return _checked(text, choices, list(_LETTERS[: len(choices)]), key, True, place)
        question, options = entry["question"], entry.get("choices")
        if "answerKey" in entry:  # ARC
            if isinstance(question, dict):
                question, options = question["stem"], question["choices"]
            if isinstance(options, dict):
                options = [
                    {"text": text, "label": label}
                    for text, label in zip(options["text"], options["label"], strict=True)
                ]
            texts, labels = [option["text"] for option in options], [str(option["label"]) for option in options]
            return _checked(question, texts, labels, str(entry["answerKey"]), False, place)
        labels = list(_LETTERS[: len(options)])
        key = labels[entry["answer"]] if entry["answer"] in range(len(options)) else str(entry["answer"])
        return _checked(question, options, labels, key, True, place)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place} is not a question of MMLU's or ARC's format ({reason(error)}): it needs question, choices and "
            f"answer, or question, choices and answerKey."
        ) from error


def _checked(text: Any, choices: Sequence[Any], labels: list[str], key: str, has_letters: bool, place: str) -> Question:
    if not isinstance(text, str) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{place} has a question or a choice that is no text, or is blank.")
    if not 2 <= len(choices) <= len(_LETTERS):
        raise UserError(f"{place} has {len(choices)} choices: there must be 2 to {len(_LETTERS)}.")
    if key.strip() not in labels:
        raise UserError(f"{place} has the answer {key!r}, which is none of its choices {', '.join(labels)}.")
    return Question(text.strip(), tuple(choice.strip() for choice in choices), labels.index(key.strip()), has_letters)


def _opening(path: Path, num_shots: int | None) -> tuple[str, int]:
    """What stands before each question of a file: MMLU's sentence and the solved examples; and their number."""
    examples_file = examples_of(path)
    if num_shots is None:
        num_shots = 0 if examples_file is None else DEFAULT_SHOTS
    if num_shots < 0:
        raise UserError(f"The number of solved examples must be 0 or more, not {num_shots}.")
    examples: list[Question] = []
    if num_shots:
        if examples_file is None:
            raise UserError(
                f"There are no solved examples for {path}: put a file of the same name with dev (or train) in place of "
                f"test beside it or into a directory dev beside its own, or give --shots 0."
            )
        examples = read_questions(examples_file)[:num_shots]
        if len(examples) < num_shots:
            raise UserError(f"{examples_file} has {len(examples)} solved examples, but {num_shots} were asked for.")
    subject = re.sub(r"[-_ ]+", " ", _TEST.sub("", path.stem)).strip()
    has_letters = read_questions(path)[0].has_letters
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if has_letters else ""
    return header + "".join(f"{example.solved}\n\n" for example in examples), num_shots


def examples_of(path: Path) -> Path | None:
    """The file of solved examples that belongs to a file of questions, or None.

    It has the same name with `dev` or `train` in place of `test`, and lies in the same directory or in one that is
    called `dev` or `train` beside it.
    """
    if not _TEST.search(path.stem):
        return None
    for word in ("dev", "train"):
        name = _TEST.sub(lambda match, word=word: _in_case_of(match[0], word), path.name)  # type: ignore[misc]
        for directory in (path.parent, path.parent.parent / word):
            if (directory / name).is_file():
                return directory / name
    return None


def _in_case_of(example: str, word: str) -> str:
    return word.capitalize() if example[0].isupper() else word


def encode_pair(model: Model, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The token ids of a prompt with the tokenizer's own special tokens, and those of the answer that follows it.

    As in lm-evaluation-harness, the two are tokenized together, and the answer's tokens are those after as many as the
    prompt alone has.
    """
    whole: list[int] = model.tokenizer(prompt + answer)["input_ids"]
    length = len(model.tokenizer(prompt)["input_ids"])
    return whole[:length], whole[length:]
