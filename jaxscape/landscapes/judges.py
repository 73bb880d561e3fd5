"""The evaluators of a scan, and when each of them judges."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxscape.engine.planner import Plan, bytes_of_weights
from jaxscape.engine.scheduler import StopWhen
from jaxscape.evaluate.base import Evaluator, stop_when, stop_when_all, uses_model
from jaxscape.evaluate.coherence import COHERENCE, Coherence, coherence
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR, find_evaluators
from jaxscape.landscapes.questions import Questions
from jaxscape.landscapes.score import prepare_judge
from jaxscape.landscapes.shares import in_run
from jaxscape.landscapes.store import Run
from jaxscape.models.model import Model


@dataclass(frozen=True)
class Judges:
    """The evaluators of a scan.

    Attributes:
        all: those that the scan was given. The first one decides the ASR.
        at_once: those that judge each point as soon as it is decoded.
        coherences: those by coherence that judge when all points of a round are decoded.
        others: those that judge after the last point.
    """

    all: Sequence[Evaluator]
    at_once: Sequence[Evaluator]
    coherences: Sequence[Coherence]
    others: Sequence[Evaluator]

    @classmethod
    def chosen(cls, evaluator: str | Evaluator | Sequence[str | Evaluator], shares: bool) -> "Judges":
        """The evaluators that the arguments of `jaxscape.scan` describe."""
        judges = find_evaluators(evaluator)
        late = [judge for judge in judges[1:] if uses_model(judge)]
        if shares and COHERENCE not in [judge.name for judge in judges]:
            late.append(coherence())
        return cls(
            judges,
            at_once=[judge for judge in judges if judge not in late],
            coherences=[judge for judge in late if isinstance(judge, Coherence)],
            others=[judge for judge in late if not isinstance(judge, Coherence)],
        )

    @property
    def keep_labels(self) -> bool:
        """Whether the run keeps the labels of those that judge at once. The paper's keywords alone need none, because
        `refused` in the generations says all that they say."""
        return [judge.name for judge in self.all] != [DEFAULT_EVALUATOR]

    @property
    def kept(self) -> list[str]:
        """The names of those whose labels the run keeps."""
        judges = [*(self.all if self.keep_labels else ()), *self.coherences]
        return list(dict.fromkeys(judge.name for judge in judges))

    def stop_when(self, opening: str) -> StopWhen | None:
        """When an answer may end; see `jaxscape.evaluate.base.stop_when_all`."""
        others = [judge for judge in self.all if not isinstance(judge, Coherence)]
        return stop_when_all([*others, *self._by_coherence], opening)

    def refuses(self, opening: str) -> StopWhen | None:
        """Whether an unfinished answer is a refusal, whatever may follow; None if that is not known before its end."""
        return stop_when(self._by_coherence[0], opening)

    @property
    def _by_coherence(self) -> list[Coherence]:
        """The evaluators by coherence, each with the evaluator whose refusals it takes; see `in_run`."""
        first = self.all[0]
        taking = [replace(judge, refusals=first) for judge in self.coherences]
        return [first, *taking] if isinstance(first, Coherence) else taking

    def prepare(self, prompts: Sequence[str], beside: int | None, later: int | None) -> None:
        """Let the evaluators check that they can be used.

        Arguments:
            beside, later: bytes on each device that those which judge at once, and the others, may use; None if that is
                not known.
        """
        for judge in self.all:
            prepare_judge(judge, prompts, beside if judge in self.at_once else later)

    def bound(
        self,
        judges: Sequence[Evaluator],
        run: Run,
        model: Model,
        questions: Questions,
        weights: str,
        beginnings: bool = False,
    ) -> list[Evaluator]:
        """Some of these evaluators, for the answers of a run; see `jaxscape.landscapes.shares.in_run`.

        Arguments:
            weights: checksum of the model's parameters.
            beginnings: whether `coherence` is to judge beginnings of answers too.
        """

        def in_this_run(judge: Evaluator) -> Evaluator:
            if not isinstance(judge, Coherence):
                return judge
            place = (run, run.directory, questions.sent_for, lambda: model, weights)
            return in_run(judge, *place, self.all[0], beginnings)

        return list(map(in_this_run, judges))


def free_beside(free: int | None, model: Model, plan: Plan) -> int | None:
    """The bytes on each device that are left beside the model and what its plan needs; None if that is not known.

    Arguments:
        free: the bytes that are free now, when the model is loaded.
    """
    return None if free is None else free + bytes_of_weights(model) - plan.memory_bytes
