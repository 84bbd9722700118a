"""What the commands share: flags to an Experiment, and faults of the user's making to one line and status 2."""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from capexp.distributed import World

if TYPE_CHECKING:
    from collections.abc import Generator

    from capexp.training.loop import Epoch, Update

R = TypeVar("R")
USAGE, UNSENT, INTERRUPTED = 2, 3, 130
"""Exit statuses."""


class Parser(argparse.ArgumentParser):
    """An argument parser that also takes any setting of an experiment, ``--section.key value``."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        settings = "Settings of the experiment are flags by their dotted names: --training.epochs 5"
        self.command = command
        super().__init__(
            prog=f"python -m capexp.{command}",
            description=description,
            epilog=f"{settings}\n{epilog}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it."""
        line = f"capexp.{self.command}: {' '.join(message.split())}; see --help\n"
        self.exit(USAGE, line if World.from_environment().is_main else None)

    def parse(self, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
        """The command's own flags, and the settings among the others by dotted name."""
        argv = sys.argv[1:] if argv is None else argv
        settings: dict[str, str] = {}
        own: list[str] = []
        # Settings first: to argparse the value of an unknown flag may be a positional argument.
        waiting = iter(argv)
        for word in waiting:
            name, equals, value = word.partition("=")
            if not (name.startswith("--") and "." in name):
                own.append(word)
            elif equals:
                settings[name[2:]] = value
            else:
                settings[name[2:]] = self._value(name, next(waiting, None))
        namespace, rest = self.parse_known_args(own)
        waiting = iter(rest)
        for flag in waiting:
            if not flag.startswith("--"):
                self.error(f"unexpected {flag!r}")
            name, equals, value = flag[2:].partition("=")
            settings[name] = value if equals else self._value(flag, next(waiting, None))
        return namespace, settings

    def _value(self, flag: str, value: str | None) -> str:
        if value is None:
            self.error(f"{flag} needs a value")
        return value


def add_experiment(parser: argparse.ArgumentParser, default: str | None = "scenes") -> None:
    """The flag that names the experiment."""
    parser.add_argument(
        "--experiment",
        metavar="NAME|FILE",
        default=default,
        help="a TOML file, or a name under experiments/ (default: scenes)",
    )


def experiment_of(arguments: argparse.Namespace) -> str:
    """The experiment that the flags name, or the embedded one where they name none."""
    return "scenes" if arguments.experiment is None else str(arguments.experiment)


def add_measured(parser: argparse.ArgumentParser) -> None:
    """The flags that name what a captioner is measured on."""
    parser.add_argument(
        "--experiment",
        metavar="NAME|FILE",
        help="whose data to measure on (default: scenes, for a captioner that was trained on them)",
    )
    parser.add_argument("--split", choices=("train", "dev", "test"), default="dev")
    parser.add_argument("--output", metavar="FILE.json", type=Path, help="also write what comes out there")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flag that names a captioner."""
    parser.add_argument(
        "--model",
        required=True,
        help="a bundle's folder, runs:/ID/captioner, models:/NAME/VERSION or models:/NAME@champion",
    )


def refuse_output(parser: Parser, output: Path | None, flag: str = "--output") -> None:
    """Refuses a file that could not be written, before any work is done."""
    if output is None:
        return
    folder = Path(os.path.realpath(output)).parent
    if not folder.is_dir() and not output.exists():
        parser.error(f"{flag} {output}: no folder {folder if output.is_symlink() else output.parent}; make it first")
    if Path(os.path.realpath(output)).is_symlink():
        parser.error(f"{flag} {output}: a link that leads to itself")
    if output.is_dir():
        parser.error(f"{flag} {output}: a folder; name a file in it")


def refuse_unused(parser: Parser, settings: dict[str, str], used: tuple[str, ...]) -> None:
    """Refuses settings that decide nothing in a command; ``used`` are names, or sections with their dot."""
    for name in settings:
        if not any(name == one or (one.endswith(".") and name.startswith(one)) for one in used):
            parser.error(f"--{name} decides nothing here; settings that do: {', '.join(used)}")


def drain(updates: "Generator[Update, None, R]") -> R:
    """Print a run's epochs as they come; return its result."""
    with contextlib.closing(updates):
        while True:
            try:
                update = next(updates)
            except StopIteration as stop:
                result: R = stop.value
                return result
            print(_line(update.run, update.epoch), flush=True)


def _line(run: str, epoch: "Epoch") -> str:
    label = f"{run}   " if run else ""
    second = "" if epoch.reward is None else f"reward {epoch.reward:.4f}   dev CIDEr {epoch.dev_cider:.4f}   "
    return (
        f"{label}epoch {epoch.number:3d}   train {epoch.train_loss:.4f}   dev {epoch.dev_loss:.4f}   "
        f"{second}{epoch.seconds:.1f} s{'  *' if epoch.improved else ''}"
    )


def main(name: str, command: Callable[[], int]) -> NoReturn:
    """Runs a command as a program: its log on stderr, faults of the user's making in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("capexp").setLevel(logging.DEBUG)  # all of it goes to a run's log file
    world = World.from_environment()
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: record.levelno >= (logging.INFO if world.is_main else logging.WARNING))
    # MLflow's hints, migrations and progress bars would bury what the command itself has to say.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the server's password, if any
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # that it tries again
    for told_in_one_line_below in ("mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(told_in_one_line_below).setLevel(logging.CRITICAL)
    # Threads that wait sleep instead of spinning: two runs on one machine then share its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Large photos are refused at a limit of our own.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    # Names of files that are not UTF-8 are printed as the bytes they are.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    if world.is_main:
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
    else:  # of torchrun's processes the first tells and brings the run to its end
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ["TQDM_DISABLE"] = "1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        status = _refuse_torchrun(name) or command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _say(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (OSError, ValueError) as error:
        from capexp.errors import InputError, Unsent

        if isinstance(error, Unsent):
            status = _say(name, str(error), UNSENT)
        elif isinstance(error, InputError):
            status = _say(name, str(error), USAGE)
        elif isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            status = _say(name, f"{where}{error.strerror}", USAGE)
        else:
            raise
    sys.exit(status)


def _refuse_torchrun(name: str) -> int:
    """Status 2 where torchrun starts what gains nothing by it."""
    world = World.from_environment()
    if world.size == 1 or name in ("train", "extract"):
        return 0
    if world.is_main:
        _say(name, "torchrun starts capexp.train and capexp.extract only; start this one by itself", USAGE)
    return USAGE


def _say(name: str, message: str, status: int) -> int:
    world = World.from_environment()
    where = "" if world.is_main else f"rank {world.rank}: "
    print(f"capexp.{name}: {where}{' '.join(message.split())}", file=sys.stderr)
    return status


def _interrupt(signum: int, frame: FrameType | None) -> Any:
    """The first signal interrupts; while the run is brought to its end, more of them change nothing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass)  # not SIG_IGN: Python complains of a signal that was under way
    raise KeyboardInterrupt


def _pass(signum: int, frame: FrameType | None) -> None:
    """Nothing."""
