"""The measures of weights that can be chosen by name."""

from collections.abc import Callable, Sequence

from jaxscape.evaluate.damage import Damage
from jaxscape.evaluate.first_token import FirstToken
from jaxscape.evaluate.likelihood import Likelihood
from jaxscape.evaluate.measure import Subject, WeightMeasure
from jaxscape.evaluate.multiple_choice import MultipleChoice
from jaxscape.evaluate.perplexity import Perplexity
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.texts import did_you_mean

MEASURES: dict[str, Callable[[Subject, str], WeightMeasure]] = {
    "first-token": FirstToken.make,
    "damage": Damage.make,
    "likelihood": Likelihood.make,
    "multiple-choice": MultipleChoice.make,
    "perplexity": Perplexity.make,
    # A new measure is one more line here.
}
"""What makes each measure of a subject and of the text after the colon of its name."""

FORMS = ("first-token", "damage", "likelihood", "multiple-choice:FILE", "perplexity:SET|FILE")
"""What can be written to choose a measure."""


def check_names(names: Sequence[str]) -> None:
    """Raise a `UserError` if there are no names, or one of them names no measure or is given twice."""
    if not names:
        raise UserError(f"Give at least one measure: {', '.join(FORMS)}.")
    for name in names:
        kind = name.partition(":")[0]
        if kind not in MEASURES:
            hint = did_you_mean(kind, MEASURES)
            raise UserError(f"Unknown measure {name!r}{hint}: choose {', '.join(FORMS)}.")
        if list(names).count(name) > 1:
            raise UserError(f"The measure {name!r} is given twice: give each measure once.")


def make_measures(names: Sequence[str], subject: Subject) -> list[WeightMeasure]:
    """The measures of these names, made for a subject.

    Raises:
        UserError: a name is not that of a measure, or a measure lacks something that it needs.
    """
    check_names(names)
    made = []
    for name in names:
        kind, _, option = name.partition(":")
        made.append(MEASURES[kind](subject, option))
    return made
