"""An evaluator from a Python file of the user's."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.evaluate.base import Label, checked_labels, checked_scores, labels_from, uses_model
from jaxscape.runtime.errors import UserError, as_texts, reason
from jaxscape.runtime.files import file_checksum
from jaxscape.runtime.texts import did_you_mean

TRIAL = (["Why?", "Who?"], ["I cannot say.", ""])
"""Prompts and answers on which an evaluator is tried, so that mistakes show before a scan. A model's answer may be
empty."""


@dataclass(frozen=True)
class OwnEvaluator:
    """An evaluator whose scores, or labels, are what the user's code gives.

    Attributes:
        name: FILE.py:NAME, without the file's directory.
        judge: a function of prompts and answers that returns a score for each answer, or an `Evaluator`.
        checksum: checksum of the file.
    """

    name: str
    judge: Any
    checksum: str

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " answers"]:
        """The score of each answer.

        Raises:
            UserError: an argument is no list of texts, or the user's code fails or gives no scores from 0 to 1.
        """
        scores, count = self._called(getattr(self.judge, "score", self.judge), prompts, answers)
        return checked_scores(self.name, scores, count, may_be_missing=hasattr(self.judge, "label"))

    def label(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Label | None]:
        """The label of each answer, by the evaluator's own `label`, or else by its scores; see `score`."""
        label = getattr(self.judge, "label", None)
        if label is None:
            return [*labels_from(self.score(prompts, answers))]
        return checked_labels(self.name, *self._called(label, prompts, answers))

    @property
    def uses_model(self) -> bool:
        """Whether the evaluator says that it holds a model."""
        return uses_model(self.judge)

    @property
    def stop_when(self) -> Callable[[str], bool] | None:
        """The evaluator's own `stop_when`, or None if it has none."""
        is_decided = getattr(self.judge, "stop_when", None)
        return None if is_decided is None else partial(_call, f"stop_when of the evaluator {self.name!r}", is_decided)

    def __getattr__(self, name: str) -> Any:
        """One of the methods that an evaluator may have beside those of the protocol, if the user's code has it."""
        if name not in ("prepare", "release", "label_points"):
            raise AttributeError(name)
        call = _call_steps if name == "label_points" else _call
        return partial(call, f"{name} of the evaluator {self.name!r}", getattr(self.judge, name))

    def _called(
        self, function: Callable[[list[str], list[str]], Any], prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Any, int]:
        """What the user's function returns, and the number of answers."""
        prompts, answers = as_texts(prompts, "prompts"), as_texts(answers, "answers")
        with _user_errors(f"The evaluator {self.name!r}"):
            return function(prompts, answers), len(answers)


def own_evaluator(path: str, name: str) -> OwnEvaluator:
    """The evaluator FILE.py:NAME. The file is imported, so it must be one that the user trusts, and the evaluator is
    tried on two answers.

    Arguments:
        path: the Python file.
        name: a function of prompts and answers that returns a number from 0 to 1 for each answer; an `Evaluator`; or
            the class of one, which is called without arguments.

    Raises:
        UserError: there is no such file, it cannot be imported, the name does not stand for one of these, or what it
            gives for the two answers cannot be used.
    """
    module = _imported(Path(path))
    try:
        judge = getattr(module, name)
    except AttributeError as error:
        raise UserError(
            f"There is no {name!r} in {path}{did_you_mean(name, vars(module))}: name a function or an evaluator in it."
        ) from error
    if inspect.isclass(judge):
        with _user_errors(f"The class {name!r} of {path}"):
            judge = judge()
    if not callable(getattr(judge, "score", judge)):
        raise UserError(f"{name!r} in {path} is a {type(judge).__name__}: name a function or an evaluator.")
    evaluator = OwnEvaluator(f"{Path(path).name}:{name}", judge, file_checksum(Path(path)))
    evaluator.label(*TRIAL)
    if evaluator.stop_when is not None:
        evaluator.stop_when(TRIAL[1][0])
    return evaluator


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the Python file that holds your evaluator.")
    spec = importlib.util.spec_from_file_location(f"own_evaluator_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for the module of a class there
    with _user_errors(f"The file {path}"):
        spec.loader.exec_module(module)
    return module


def _call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the user's code returns."""
    with _user_errors(what):
        return function(*arguments)


def _call_steps(what: str, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """What a generator of the user's code yields, one value after the other."""
    with _user_errors(what):
        yield from function(*arguments)


@contextmanager
def _user_errors(what: str) -> Iterator[None]:
    """A context in which an exception of the user's code becomes a `UserError` that says where it was raised."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<")][-1:]
        place = "".join(f" in {frame.filename}, line {frame.lineno}" for frame in last)
        raise UserError(f"{what} failed{place} ({reason(error)}).") from error
