"""The one kind of error a user is meant to read."""


class UserError(ValueError):
    """A mistake in what was asked: one line that names what was given, what was expected and the mend.

    The command line prints the message without a traceback and exits with status 2.
    """
