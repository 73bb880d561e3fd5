"""The one exception that is the user's to mend, and checks that several modules make."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def reason(error: Exception) -> str:
    """What an error says, on one line and no longer than a sentence."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def check_seed(seed: int) -> int:
    """The seed, if it is one; a key has 32 bits for it, and what is above them would be dropped in silence."""
    if not 0 <= seed < 2**32:
        raise UserError(f"A seed is a number from 0 to {2**32 - 1}, not {seed}.")
    return int(seed)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can spell the text: JSON and file names can hold halves of surrogate pairs, which it cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
