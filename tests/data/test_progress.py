"""Progress bars write little where nobody watches them."""

import subprocess
import sys
import threading

from capexp.data.progress import progress_bar

CODE = """
from capexp.data.progress import progress_bar
with progress_bar(total=20_000, unit="photo", desc="features") as bar:
    for _ in range(20_000):
        bar.update(1)
"""


def test_in_a_pipe_a_bar_is_a_few_lines_and_the_last_one_is_complete() -> None:
    written = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stderr
    first, *_, last = written.splitlines()
    assert first.startswith("features:   0%") and last.startswith("features: 100%") and "20000/20000" in last
    assert written.count("\n") < 5 and "\r" not in written


def test_a_bar_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    for _ in range(3):
        with progress_bar(total=1) as bar:
            bar.update(1)
    assert threading.active_count() == before
