"""Download Flickr8k (photos, captions and lists) into a folder, and check that it is complete."""

import shlex
from functools import partial
from pathlib import Path

from capexp import cli
from capexp.experiment import CACHE

OUTPUT = CACHE / "flickr8k"
"""The folder in which the experiments on Flickr8k expect the data."""
RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
"""The URL from which the two archives are downloaded."""


def download(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("download", __doc__, ())
    parser.add_argument("data", choices=("flickr8k",), help="the data set; two archives, about 1.0 GiB in total")
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, default=OUTPUT, help="folder for the data (default: %(default)s)"
    )
    parser.add_argument(
        "--source", metavar="URL|FOLDER", default=RELEASE, help="where the two archives are (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        choices=("text", "photos"),
        help="one of the two archives: captions and lists (2 MB, for a copy that lacks the lists), or photos",
    )
    parser.add_argument(
        "--keep-archives", action="store_true", help="do not delete the downloaded archives after unpacking"
    )
    arguments, _ = parser.parse(argv)
    from capexp.data.flickr8k import bring

    bring(
        arguments.output, arguments.source, only=arguments.only, keep=arguments.keep_archives,
        say=partial(print, flush=True),
    )  # fmt: skip
    if arguments.only is not None:
        return 0
    elsewhere = arguments.output.resolve() != OUTPUT.resolve()
    root = f" --captions.root {shlex.quote(str(arguments.output))}" if elsewhere else ""
    print(f"next: python -m capexp.train --experiment flickr8k-merge-conv{root}")
    return 0


if __name__ == "__main__":
    cli.main("download", download)
