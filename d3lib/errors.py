"""The one exception that means: the input is at fault, not the program."""


class UserError(Exception):
    """Bad input: the message says in one line what is wrong, where, and what to do next.

    The command line prints the message alone and exits with code 2; a notebook shows it as the last line of the cell.
    """


class StoppedError(UserError):
    """Work that was told to end (SIGTERM, as a cluster's scheduler sends) and has saved what it had."""
