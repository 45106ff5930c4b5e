"""The error a user can mend: it names the flag, the value seen and the way out."""


class UsageError(ValueError):
    """A command line, file or data set that cannot work; the script prints its message and exits with 2."""
