"""The evaluators that can be chosen by name."""

from jaxscape.evaluate.base import Evaluator
from jaxscape.evaluate.keywords import KeywordEvaluator
from jaxscape.runtime.errors import UserError

DEFAULT_EVALUATOR = "keywords"
EVALUATORS: dict[str, Evaluator] = {
    evaluator.name: evaluator
    for evaluator in (
        KeywordEvaluator(),
        # A new evaluator is one more line here.
    )
}


def find_evaluator(evaluator: str | Evaluator) -> Evaluator:
    """The evaluator of a name; an evaluator itself is returned as it is.

    Raises:
        UserError: there is no evaluator of this name, or the evaluator has the name of another.
    """
    if not isinstance(evaluator, str):
        registered = EVALUATORS.get(evaluator.name)
        if registered is not None and type(registered) is not type(evaluator):
            raise UserError(f"The name {evaluator.name!r} is that of another evaluator: give yours a name of its own.")
        return evaluator
    if evaluator not in EVALUATORS:
        raise UserError(f"Unknown evaluator {evaluator!r}: choose {', '.join(EVALUATORS)}.")
    return EVALUATORS[evaluator]
