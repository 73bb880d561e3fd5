"""The three shares of a scan: the evaluator `coherence` in a run, which keeps its thresholds.

In a run, an answer refuses if the evaluator that decides the ASR says so, and one that was abandoned makes no sense.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxscape.engine.scheduler import Abandon, StopWhen
from jaxscape.evaluate.base import Evaluator, Label
from jaxscape.evaluate.beginnings import Beginnings
from jaxscape.evaluate.coherence import (
    BEGINNING,
    COHERENCE,
    LATER_EVERY,
    BeginningThresholds,
    Coherence,
    Thresholds,
    calibrate,
)
from jaxscape.landscapes.questions import Questions
from jaxscape.landscapes.store import COHERENCE_FILE, Run
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.model import Model
from jaxscape.prompts.thinking import answer_of
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.processes import from_first

ANSWERS_AT_ONCE = 256  # enough for full batches, and few enough that progress is seen


@dataclass(frozen=True, eq=False)
class _CoherenceOfRun(Coherence):
    """The evaluator for points of a run whose refusals are known.

    Attributes:
        run: the run.
    """

    run: Run | None = None

    def label_points(self, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> Iterator[list[Label]]:
        """The labels of the answers to the last prompts at the next points that have answers to judge, point by
        point."""
        assert self.run is not None
        size = -(-ANSWERS_AT_ONCE // len(prompts))
        numbers = self.run.labels.missing(self, self.run.num_done)
        for start in range(0, len(points), size):
            part = points[start : start + size]
            places = np.ix_(numbers[start : start + len(part)], range(-len(prompts), 0))
            labels = self._label_rest(
                [*prompts] * len(part),
                list(itertools.chain.from_iterable(part)),
                self.run.refused[places].ravel(),
                # Another model may find sense in what this run's model found none in.
                self.run.abandoned[places].ravel() & (self.name == COHERENCE),
            )
            yield from (labels[i : i + len(prompts)] for i in range(0, len(labels), len(prompts)))

    def _label_rest(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        refused: Bool[np.ndarray, " answers"],
        abandoned: Bool[np.ndarray, " answers"],
    ) -> list[Label]:
        """The labels of answers, of which those that were abandoned make no sense."""
        labels: list[Label] = ["incoherent"] * len(answers)
        rest = np.flatnonzero(~abandoned).tolist()
        if rest:
            said = self.label([prompts[i] for i in rest], [answers[i] for i in rest], refused[rest].tolist())
            for i, label in zip(rest, said, strict=True):
                labels[i] = label
        return labels


def in_run(
    judge: Coherence,
    run: Run | None,
    directory: Path | None,
    sent: Mapping[str, str],
    load: Callable[[], Model],
    weights: str,
    decides: Evaluator | None,
    beginnings: bool = False,
) -> Coherence:
    """The evaluator for the answers of a run. Its thresholds are those that the run has kept; if it has none, the model
    that judges is calibrated, and the run keeps them.

    Arguments:
        run: the scan, whose refusals are known; None where the evaluator is told which answers refuse.
        directory: the run's directory; None if it has none, and perhaps in every process but the first.
        sent: for each prompt of the run, the text that its model was given.
        load: loads the run's model, which `coherence` judges by. It is called only if it is needed.
        weights: checksum of the parameters of the run's model.
        decides: the evaluator that decides the ASR; None if only its verdicts are known. If it is `judge` itself, the
            paper's keywords tell refusals.
        beginnings: whether `coherence` is to judge beginnings of answers too.

    Raises:
        UserError: the thresholds that are kept are damaged, or those of another model.
    """
    path = None if directory is None else directory / COHERENCE_FILE
    is_own = judge.name == COHERENCE
    kept = from_first(partial(_read, path)).get(judge.name)
    thresholds = None if kept is None else _thresholds(kept)
    if is_own and thresholds is not None and thresholds.weights != weights:
        raise UserError(f"{path} has the thresholds of another model than the run's: delete it to calibrate again.")
    beginnings = beginnings and is_own
    if thresholds is None or (beginnings and thresholds.beginning is None):
        model = load() if is_own else judge.model
        thresholds = _thresholds(from_first(calibrate(model, beginnings).recorded))
        from_first(partial(_add, path, judge.name, thresholds))
        load = partial(_same, model)
    elif not is_own:
        load = partial(load_checked, judge.load, thresholds.weights)
    # Another model was given the prompts in a chat format of its own.
    texts = (lambda prompts: [sent[prompt] for prompt in prompts]) if is_own else None
    if decides is judge:
        return Coherence(judge.name, load, thresholds, sent=texts)
    if run is None:
        return Coherence(judge.name, load, thresholds, decides, texts)
    return _CoherenceOfRun(judge.name, load, thresholds, decides, texts, run)


def abandon_noise(
    model: Model, thresholds: Thresholds, questions: Questions, refuses: StopWhen | None, limit: int
) -> Abandon:
    """What ends the answers of a scan whose beginnings make no sense. A text that thinks goes on.

    Arguments:
        model: the unperturbed model, which judges.
        thresholds: see `Beginnings`.
        refuses: says that a text refuses; such an answer is no noise. None if that is not known before an answer ends.
        limit: the largest number of tokens of an answer. To end an answer shortly before it would save nothing.
    """
    judge = cache(partial(Beginnings, model, questions.tokens, thresholds))  # nothing is computed before it is asked

    def goes_on(beginning: str) -> bool:
        is_thinking = bool(questions.opening) or answer_of(beginning) != beginning
        return is_thinking or (refuses is not None and refuses(beginning))

    def is_lost(size: int, numbers: Sequence[int], beginnings: Sequence[str]) -> list[bool]:
        lost = np.zeros(len(beginnings), bool)
        if asked := [i for i, text in enumerate(beginnings) if not goes_on(text)]:
            texts = [beginnings[i] for i in asked]
            if size == BEGINNING:
                lost[asked] = judge().make_no_sense([numbers[i] for i in asked], texts)
            else:
                lost[asked] = judge().repeat_themselves(texts)
        return lost.tolist()

    later = range(BEGINNING + LATER_EVERY, limit - LATER_EVERY + 1, LATER_EVERY)
    return Abandon([BEGINNING, *later], is_lost)


def thresholds_of_model(judges: Sequence[Evaluator]) -> Thresholds:
    """The thresholds of the run's own model, by which `coherence`, one of these evaluators, judges."""
    (own,) = [judge.thresholds for judge in judges if isinstance(judge, Coherence) and judge.name == COHERENCE]
    return own


def load_checked(load: Callable[[], Model], weights: str) -> Model:
    """The model that `load` loads.

    Arguments:
        weights: checksum that its parameters must have.

    Raises:
        UserError: it cannot be loaded, or its parameters have another checksum.
    """
    model = load()
    if fingerprint(model.params) != weights:
        raise UserError(
            f"The model {model.name} has other weights now than when the run was made, so it cannot judge the run's "
            f"answers: put the former weights back, or scan again."
        )
    return model


def _same(model: Model) -> Model:
    return model


def _thresholds(entry: Mapping[str, Any]) -> Thresholds:
    """Thresholds from an object of JSON, in which a number may be a whole one."""
    numbers = {key: float(value) for key, value in entry.items() if key not in ("weights", "beginning")}
    begun = entry.get("beginning")
    beginning = begun and BeginningThresholds(**{key: float(value) for key, value in begun.items()})
    return Thresholds(weights=str(entry["weights"]), **numbers, beginning=beginning)


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    """The thresholds that a run has kept, by the name of the evaluator."""
    if path is None or not path.exists():
        return {}
    try:
        content: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for entry in content.values():
            _thresholds(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}): delete it, and thresholds are calibrated again."
        ) from error
    return content


def _add(path: Path | None, name: str, thresholds: Thresholds) -> None:
    """Add thresholds to those that a run has kept; nothing if it has no directory."""
    if path is not None:
        write_whole(path, json.dumps(_read(path) | {name: thresholds.recorded()}, indent=1) + "\n")
