"""Errors that a user can mend, and how URIs are shown without passwords."""

from urllib.parse import parse_qsl, unquote


class InputError(ValueError):
    """Something outside the program is wrong: a file, a photo, a setting, a device.

    The message is one line that names what is wrong, its value, and the remedy. Commands print it and end
    with exit status 2; any other exception is a defect of ours and keeps its traceback.
    """


class Outage(InputError):
    """Something that the work needs beside its input is unavailable: a server, a database, disk space.

    The same work may go well later, so a study runs the trial again instead of calling it failed.
    """


class Unsent(Outage):
    """A run has ended, but MLflow's server has not received all that it logged."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(run_id, reason)
        self.run_id = run_id

    def __str__(self) -> str:
        run_id, reason = self.args
        return (
            f"run {run_id} has ended, but not all of it was sent ({reason}); nothing is lost: when the server is back, "
            f"python -m capexp.sync {run_id}"
        )


def shown_uri(uri: str) -> str:
    """Return a URI without user, password and query."""
    if uri.startswith("sqlite"):  # a file: an @ in its path ends no password
        return uri
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def without_secrets(text: str, uri: str) -> str:
    """Return a text without the secrets of a URI: libraries quote both in their errors."""
    if uri.startswith("sqlite"):
        return text
    rest, _, query = uri.partition("://")[2].partition("?")
    credentials = rest.rpartition("@")[0]
    secrets = {credentials, credentials.partition(":")[2]}
    secrets |= {value for name, value in parse_qsl(query) if "pass" in name}
    text = text.replace(uri, shown_uri(uri))
    for secret in sorted(secrets | {unquote(secret) for secret in secrets}, key=len, reverse=True):
        text = text.replace(secret, "***") if secret else text
    return text


def listed(names: list[str], shown: int = 3) -> str:
    """Return the first few of many names, for an error line: ``a, b, c and 12 more``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
