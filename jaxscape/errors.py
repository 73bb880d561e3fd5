"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do.

    The command line prints it without a traceback and exits with code 2.
    """
