"""The exception for mistakes that the user can correct, and checks that several modules share."""

from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

from jaxscape.runtime.texts import did_you_mean


class UserError(ValueError):
    """Something that the user gave cannot be used. The message says what is wrong and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def reason(error: BaseException) -> str:
    """The type and message of a library's error on one line, at most 300 characters, to be quoted in a `UserError`."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def unknown_name(what: str, name: object, choices: Collection[str]) -> UserError:
    """The error for a name that is none of the choices. It says which of them are near, and lists all of them.

    Arguments:
        what: what the name stands for, such as `figure`.
    """
    return UserError(f"Unknown {what} {name!r}{did_you_mean(name, choices)}: choose {', '.join(choices)}.")


def check_seed(seed: int) -> int:
    """The seed, if it fits into 32 bits. JAX would drop higher bits of a larger one without a warning.

    Raises:
        UserError: the seed is negative or too large.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"A seed is a number from 0 to {2**32 - 1}, not {seed}.")
    return int(seed)


def is_utf8(text: str) -> bool:
    """Whether the text can be encoded as UTF-8. Text from JSON or from file names can hold lone surrogates, which
    cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def as_list(values: Any, name: str) -> list[Any]:
    """The values as a list. A text is a sequence too, of characters, and is never meant as one.

    Arguments:
        name: what the values are, such as `prompts`, for the error.

    Raises:
        UserError: the values are a single text, or have no order.
    """
    if isinstance(values, str | bytes):
        raise UserError(f"{name} must be a list, not the single text {values[:40]!r}: put it into a list.")
    if not isinstance(values, Iterable) or isinstance(values, Mapping | Set) or getattr(values, "ndim", 1) == 0:
        raise UserError(f"{name} must be a list, not a {type(values).__name__}: give a list.")
    return list(values)


def as_texts(values: Any, name: str) -> list[str]:
    """The values as a list of texts.

    Arguments:
        name: what the values are, such as `prompts`, for the error.

    Raises:
        UserError: the values are a single text, are no list, or one of them is no text or not valid Unicode.
    """
    texts = as_list(values, name)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not is_utf8(text):
            what = "not valid Unicode" if isinstance(text, str) else f"a {type(text).__name__}"
            raise UserError(f"Number {number} of the {name} is {what}: give texts.")
    return texts
