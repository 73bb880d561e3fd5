"""The exception for mistakes that the user can correct, and checks that several modules share."""


class UserError(ValueError):
    """Something that the user gave cannot be used. The message says what is wrong and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def reason(error: Exception) -> str:
    """The type and message of a library's error on one line, at most 300 characters, to be quoted in a `UserError`."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


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
