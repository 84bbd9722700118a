"""Errors that a user can fix, and functions for their messages: URIs without passwords, shortened lists."""

from urllib.parse import parse_qsl, unquote


class InputError(ValueError):
    """An error that a user can fix, in a file, a photo, a setting or a device.

    The message is one line that names the file or setting, its value, and the remedy. Commands print it and exit with
    status 2. Any other exception is a bug of this project and is shown with its traceback.
    """


class Outage(InputError):
    """A resource is unavailable: a server, a database, disk space, another rank.

    The same command may succeed later, so a study reruns the trial instead of counting it as failed.
    """


class Unsent(Outage):
    """A run has ended, but MLflow's server has not received all of its journal entries."""

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
    """Return a URI without user, password and query, for messages."""
    if uri.startswith("sqlite"):  # the path of a file; an @ in it does not separate a password
        return uri
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def without_secrets(text: str, uri: str) -> str:
    """Remove the secrets of a URI from a text, such as the error of a library that quotes the URI."""
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
    """Return the first names of a list for an error message: ``a, b, c and 12 more``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
