"""The error that a user can mend."""


class InputError(ValueError):
    """Something outside the program is wrong: a file, a photo, a setting, a device.

    The message is one line that names what is wrong, its value, and the remedy. Commands print it and end
    with exit status 2; any other exception is a defect of ours and keeps its traceback.
    """


def listed(names: list[str], shown: int = 3) -> str:
    """The first few of many names, for an error line: ``a, b, c and 12 more``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
