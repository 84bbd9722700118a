"""Downloads Flickr8k, photos and captions, into a folder, and checks it."""

import shlex
from functools import partial
from pathlib import Path

from capexp import cli

OUTPUT = Path(__file__).parents[1] / "cache" / "flickr8k"
"""Where the experiments on Flickr8k look for it."""
RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"


def download(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("download", __doc__, ())
    parser.add_argument("data", choices=("flickr8k",), help="what to bring; two archives, about 1.0 GiB")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument(
        "--source", metavar="URL|FOLDER", default=RELEASE, help="what holds the two archives; default: %(default)s"
    )
    parser.add_argument("--keep-archives", action="store_true", help="leave fetched archives where they are unpacked")
    arguments, _ = parser.parse(argv)
    from capexp.data.flickr8k import bring

    bring(arguments.output, arguments.source, keep=arguments.keep_archives, say=partial(print, flush=True))
    elsewhere = arguments.output.resolve() != OUTPUT.resolve()
    root = f" --captions.root {shlex.quote(str(arguments.output))}" if elsewhere else ""
    print(f"next: python -m capexp.train --experiment flickr8k-merge-conv{root}")
    return 0


if __name__ == "__main__":
    cli.main("download", download)
