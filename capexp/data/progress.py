"""Progress bars: redrawn on a terminal, a line now and then in a file or a pipe."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_LINE_SECONDS = 30.0  # between two lines in a file or a pipe


def progress_bar(**options: Any) -> "tqdm[Any]":
    """Return tqdm's bar on stderr, with tqdm's options."""
    from tqdm import tqdm  # imported here: a served model needs no bars, and tqdm is not among its requirements

    class Lines(tqdm):  # type: ignore[type-arg]
        """A bar that writes lines instead of redrawing itself."""

        monitor_interval = (
            0  # else tqdm starts a thread for this class, which never ends, to redraw bars that stand still
        )

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Write the bar as a line."""
            self.fp.write(f"{msg or self}\n")
            self.fp.flush()

        def close(self) -> None:
            """Write the last line."""
            if not self.disable:
                self.display()
                self.disable = True

    if sys.stderr.isatty():
        return tqdm(**options)
    return Lines(mininterval=_LINE_SECONDS, ascii=True, **options)
