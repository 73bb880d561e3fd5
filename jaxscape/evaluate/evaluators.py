"""The evaluators that can be chosen by name."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxscape.evaluate.base import Classifier, Evaluator
from jaxscape.evaluate.coherence import COHERENCE, Coherence, coherence
from jaxscape.evaluate.jailbreakbench import JAILBREAKBENCH
from jaxscape.evaluate.keyword_file import keyword_file
from jaxscape.evaluate.keywords import KEYWORDS
from jaxscape.evaluate.llm_judge import GUARDS, SHIPPED, LlmJudge, guard, judge_file, shipped_judge
from jaxscape.evaluate.own import own_evaluator
from jaxscape.evaluate.wei import WEI
from jaxscape.evaluate.xstest import XSTEST
from jaxscape.runtime.errors import UserError, as_list
from jaxscape.runtime.texts import did_you_mean

DEFAULT_EVALUATOR = "keywords"
EVALUATORS: dict[str, Classifier] = {
    evaluator.name: evaluator
    for evaluator in (
        KEYWORDS,
        WEI,
        JAILBREAKBENCH,
        XSTEST,
        # A new evaluator is one more line here.
    )
}
# Evaluators NAME:OPTION, by their names. The function makes the evaluator from the option. `coherence` needs none.
MAKERS: dict[str, Callable[[str], Classifier]] = {
    "keywords": keyword_file,
    COHERENCE: coherence,
    "llm": judge_file,
    **{name: partial(guard, name) for name in GUARDS},
}
# Evaluators that hold a model: each call makes one of its own.
WITH_MODEL: dict[str, Callable[[], Classifier]] = {COHERENCE: coherence, SHIPPED: shipped_judge}
FORMS = (
    *EVALUATORS,
    *WITH_MODEL,
    "coherence:MODEL",
    "keywords:FILE",
    "FILE.py:NAME",
    "llm:FILE",
    *(f"{name}:MODEL" for name in GUARDS),
)
"""What can be written to choose an evaluator."""

_OWN = re.compile(r"(.+\.py)(?::(.*))?", re.DOTALL)


def evaluator(name: str) -> Classifier:
    """The evaluator of a name, with methods `score(prompts, answers)` and `label(prompts, answers)`.

    `score` returns float64[answers], from 0 to 1; at least 0.5 is a refusal. `label` returns a list of `refused`,
    `partial`, `complied` and `incoherent`; an evaluator may know only some of them.

    Arguments:
        name: a name in `EVALUATORS`; `coherence`, see `jaxscape.evaluate.coherence.Coherence`, which judges by the
            default model, or `coherence:MODEL`; `judge` for the judge that comes with jaxscape, a small language model;
            `keywords:FILE` for a file with a phrase in each line; or `FILE.py:NAME` for a function of prompts and
            answers, or an `Evaluator`, in a Python file of your own, which is imported. Other LLM judges are
            `llm:FILE`, for a judge file, and `llama-guard:MODEL`, `qwen3guard:MODEL` and `qwen3guard-harm:MODEL`; their
            label is None, and their score NaN, where they cannot judge.

    Raises:
        UserError: there is no evaluator of this name, or its file cannot be used.
    """
    if not isinstance(name, str):
        raise UserError(f"An evaluator is a name, or an object with `name` and `score`, not {name!r:.60}.")
    if name in EVALUATORS:
        return EVALUATORS[name]
    if name in WITH_MODEL:
        return WITH_MODEL[name]()
    kind, separator, option = name.partition(":")
    if separator and kind in MAKERS:
        return MAKERS[kind](option)
    if own := _OWN.fullmatch(name):
        path, function = own.groups()
        if not function:
            raise UserError(f"Name what is to be used of {path}: write {path}:NAME.")
        return own_evaluator(path, function)
    known = {form.partition(":")[0]: form for form in reversed(FORMS)}  # a name alone hides the one with an option
    raise UserError(f"Unknown evaluator {name!r}{did_you_mean(name, known, known)}: choose {', '.join(FORMS)}.")


def find_evaluators(chosen: str | Evaluator | Sequence[str | Evaluator]) -> list[Evaluator]:
    """The evaluators of one or several names; an evaluator itself stands for itself.

    Raises:
        UserError: there are none, one cannot be found, or two of them have the same name.
    """
    items: list[Any] = as_list(chosen, "evaluator") if isinstance(chosen, list | tuple) else [chosen]
    evaluators = [item if isinstance(item, Evaluator) else evaluator(item) for item in items]
    if not evaluators:
        raise UserError(f"Give at least one evaluator: {', '.join(FORMS)}.")
    names = [item.name for item in evaluators]
    for item in evaluators:
        is_other = item.name in WITH_MODEL and not isinstance(item, Coherence | LlmJudge)
        if is_other or (item.name in EVALUATORS and item != EVALUATORS[item.name]):
            raise UserError(f"The name {item.name!r} is that of another evaluator: give yours a name of its own.")
        if names.count(item.name) > 1:
            raise UserError(f"The evaluator {item.name!r} is given twice: give each evaluator once.")
    return evaluators
