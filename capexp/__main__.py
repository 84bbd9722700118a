"""``capexp COMMAND ...``, or ``python -m capexp COMMAND ...``: the same as ``python -m capexp.COMMAND ...``."""

import sys
from importlib import import_module

from capexp import cli

COMMANDS = ("train", "tune", "evaluate", "compare", "caption", "extract", "download", "app", "sync", "bundle")


def main() -> None:
    """Run the command that the first word names, and exit with its status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        is_help = name in ("-h", "--help")
        told = f"usage: capexp COMMAND ...; COMMAND is one of {', '.join(COMMANDS)}; capexp COMMAND --help tells more"
        print(told, file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else cli.USAGE)
    sys.argv = [f"capexp {name}", *sys.argv[2:]]
    cli.main(name, getattr(import_module(f"capexp.{name}"), name))


if __name__ == "__main__":
    main()
