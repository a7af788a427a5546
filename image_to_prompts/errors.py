"""The one exception that a user can cause, and the one line it becomes."""


class UserError(ValueError):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with code 2; in a notebook it is an ordinary
    exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
