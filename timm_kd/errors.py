"""The error a user can mend: it names the flag, the value seen and the way out."""


class UsageError(ValueError):
    """A command line, file or data set that cannot work; the script prints its message and exits with 2."""


def shortened(error: Exception, most: int = 300) -> str:
    """An error of timm or torch on one line."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f'{text[:most]}...'
