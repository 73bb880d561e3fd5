"""Judge files: TOML files that say which model judges, what it is given, and how its answer is read."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from jaxscape.evaluate.base import LABELS, Label
from jaxscape.evaluate.judge_prompt import PromptFormat, Template
from jaxscape.evaluate.judge_rule import AnswerPatterns, LabelTokens, Rule, ScoredTokens
from jaxscape.prompts.records import read_text
from jaxscape.prompts.thinking import Thinking
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import checksum
from jaxscape.runtime.texts import did_you_mean

DEFAULT_MIN_PROBABILITY = 0.5
DEFAULT_MAX_NEW_TOKENS = 32

_TEMPLATE_FORMATS, _SEND_AS = ("jinja", "python"), ("text", "chat")

T = TypeVar("T")


@dataclass(frozen=True)
class JudgeFile:
    """What a judge file says.

    Attributes:
        model: the judge's model, as `jaxscape.load_model` takes it; None if the file leaves it out.
        base: the base model, if the judge's model is an adapter; None for the one that it names.
        checksum: checksum of the file's settings and of its template.
    """

    model: str | None
    base: str | None
    format: PromptFormat
    rule: Rule
    checksum: str


def read_judge_file(path: Path) -> JudgeFile:
    """Read a judge file and its template.

    Raises:
        UserError: a file cannot be read, a key or a value is unknown, or the template cannot be used.
    """
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"The judge file {path} is no TOML ({reason(error)}): correct it.") from error
    table = _Table(values, f"The judge file {path}")
    model, base = table.take("model", str), table.take("base", str)
    prompt_format = _prompt_format(table, path.parent)
    rule = _rule(table)
    table.finish()
    if model is not None and model.startswith("."):
        model = str(path.parent / model)
    template = None if prompt_format.template is None else prompt_format.template.text
    return JudgeFile(model, base, prompt_format, rule, checksum((_sorted(values), template)))


class _Table:
    """A table of a judge file, whose keys are taken one by one.

    Attributes:
        name: the file and the table, with which errors begin.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.name = name
        self._left, self._known = dict(values), set[str]()

    def take(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, or None if there is none."""
        self._known.add(key)
        value = self._left.pop(key, None)
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            names = {str: "a text", int: "a whole number", float: "a number", dict: "a table", list: "a list"}
            raise UserError(f"{self.name} has {key} = {value!r:.60}, and it must be {names[kind]}.")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        """The value of a key, which is one of the choices, or None if there is none."""
        value = self.take(key, str)
        if value is not None and value not in choices:
            raise UserError(f"{self.name} has {key} = {value!r}: choose {', '.join(choices)}.")
        return value

    def positive(self, key: str) -> int | None:
        """The value of a key, a whole number from 1 on, or None if there is none."""
        value = self.take(key, int)
        if value is not None and value < 1:
            raise UserError(f"{self.name} has {key} = {value}, and it must be at least 1.")
        return value

    def table(self, key: str) -> "_Table | None":
        """The table under a key, or None if there is none."""
        values = self.take(key, dict)
        return None if values is None else _Table(values, f"{self.name}, [{key}],")

    def finish(self) -> None:
        """Raise a `UserError` if there are keys that were not taken."""
        for key in self._left:
            hint = did_you_mean(key, self._known)
            raise UserError(
                f"{self.name} has the unknown key {key!r}{hint}: keys are {', '.join(sorted(self._known))}."
            )


def _prompt_format(table: _Table, directory: Path) -> PromptFormat:
    file, kind = table.take("template", str), table.choice("template_format", _TEMPLATE_FORMATS)
    send_as, thinking = table.choice("send_as", _SEND_AS), table.choice("thinking", get_args(Thinking))
    answer_start, clip_answer = table.take("answer_start", str), table.positive("clip_answer")
    if file is None and (kind, send_as) != (None, None):
        raise UserError(f"{table.name} has no template: name its file, or leave out template_format and send_as.")
    if file is not None and send_as is None:
        raise UserError(
            f"{table.name} does not say what its template is: write send_as = 'text' if it is all that the judge gets, "
            f"or send_as = 'chat' if it is what a user says to a chat model."
        )
    if thinking is not None and send_as != "chat":
        raise UserError(f"{table.name} has thinking = {thinking!r}, which needs send_as = 'chat'.")
    template = None
    if file is not None:
        template = Template(read_text(directory / file), kind == "python", file)
    return PromptFormat(template, send_as == "chat", thinking or "default", answer_start or "", clip_answer)


def _rule(table: _Table) -> Rule:
    first, answer = table.table("first_token"), table.table("answer")
    if (first is None) == (answer is None):
        raise UserError(
            f"{table.name} must have one rule: a table [first_token], for the probability of the first token, or a "
            f"table [answer], for a short answer."
        )
    return _token_rule(first) if first is not None else _answer_rule(answer)  # type: ignore[arg-type]


def _token_rule(table: _Table) -> LabelTokens | ScoredTokens:
    least = table.take("min_probability", float)
    least = DEFAULT_MIN_PROBABILITY if least is None else least
    if not 0 <= least <= 1:
        raise UserError(f"{table.name} has min_probability = {least}, and it must be from 0 to 1.")
    labels, scores, bias = table.take("labels", dict), table.take("scores", dict), table.take("bias", dict)
    table.finish()
    if (labels is None) == (scores is None):
        raise UserError(f"{table.name} needs either labels, with the tokens of each, or scores, one for each token.")
    if labels is not None:
        tokens = {_label(table, label): _tokens(table, label, given) for label, given in labels.items()}
        if len(tokens) < 2:
            raise UserError(f"{table.name} has {len(tokens)} labels, and it needs at least two to choose from.")
        offsets = {
            _label(table, label): _number(table, f"bias of {label}", value) for label, value in (bias or {}).items()
        }
        if unknown := offsets.keys() - tokens.keys():
            raise UserError(f"{table.name} has a bias for {min(unknown)}, which has no tokens.")
        return LabelTokens(tokens, offsets, least)
    if bias is not None:
        raise UserError(f"{table.name} has a bias, which needs labels.")
    values = {token: _number(table, f"score of {token!r}", value) for token, value in (scores or {}).items()}
    if len(values) < 2 or "" in values or not all(0 <= value <= 1 for value in values.values()):
        raise UserError(f"{table.name} needs scores from 0 (complies) to 1 (refuses) for two tokens or more.")
    return ScoredTokens(values, least)


def _answer_rule(table: _Table) -> AnswerPatterns:
    max_new_tokens, entries = table.positive("max_new_tokens"), table.take("patterns", list)
    table.finish()
    if not entries:
        raise UserError(f"{table.name} needs patterns: a list of {{pattern = '...', label = '...'}}.")
    patterns = []
    for number, values in enumerate(entries, 1):
        if not isinstance(values, dict):
            raise UserError(
                f"{table.name} has pattern {number} = {values!r:.60}: write {{pattern = ..., label = ...}}."
            )
        entry = _Table(values, f"{table.name[:-1]}, pattern {number},")
        pattern, label = entry.take("pattern", str), entry.take("label", str)
        entry.finish()
        if not pattern or label is None:
            raise UserError(f"{entry.name} needs a pattern and a label.")
        try:
            patterns.append((re.compile(pattern, re.MULTILINE), _label(entry, label)))
        except re.error as error:
            raise UserError(f"{entry.name} is no regular expression ({reason(error)}): {pattern!r}.") from error
    return AnswerPatterns(max_new_tokens or DEFAULT_MAX_NEW_TOKENS, tuple(patterns))


def _label(table: _Table, name: str) -> Label:
    if name not in LABELS:
        raise UserError(f"{table.name} has the unknown label {name!r}: labels are {', '.join(LABELS)}.")
    return name


def _tokens(table: _Table, label: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(token, str) and token for token in given):
        raise UserError(f"{table.name} has {label} = {given!r:.60}, and it must be a list of texts, each one token.")
    return tuple(given)


def _number(table: _Table, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise UserError(f"{table.name} has {value!r:.60} as the {what}, and it must be a number.")
    return float(value)


def _sorted(values: Any) -> Any:
    """Tables as lists of pairs, sorted by key, so that the order of keys does not change the checksum."""
    if isinstance(values, dict):
        return [(key, _sorted(value)) for key, value in sorted(values.items())]
    return [_sorted(value) for value in values] if isinstance(values, list) else values
