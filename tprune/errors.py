"""The errors a user is meant to read."""


class UserError(ValueError):
    """A mistake in what was asked: one line that names what was given, what was expected and the mend.

    The command line prints the message without a traceback and exits with status 2.
    """


class BudgetError(UserError):
    """A budget that the method cannot reach on this model.

    Attributes:
        low, high: the reach in the terms of `--keep` or `--sparsity`; None where it is not known.
    """

    def __init__(self, message: str, low: float | None = None, high: float | None = None):
        super().__init__(message)
        self.low, self.high = low, high
