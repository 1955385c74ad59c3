"""The one exception that is a person's slip and not a bug."""


class UserError(Exception):
    """What is wrong, where, and what to do, in one line.

    The commands print the message without a traceback and exit with status 2.
    """
