"""Code that all commands share: flags and settings, --help, exit statuses, signals, and the lines of epochs."""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin
from urllib.parse import quote

from capexp.distributed import World

if TYPE_CHECKING:
    from collections.abc import Generator

    from pydantic.fields import FieldInfo

    from capexp.captioning.captioner import Captioner
    from capexp.settings import Experiment
    from capexp.training.loop import Epoch, Update

R = TypeVar("R")
USAGE, UNSENT, INTERRUPTED = 2, 3, 130
"""Exit statuses: a user's mistake; a run that was not completely sent to MLflow's server; an interrupt."""
ENCODER_SETTINGS = ("features.weights", "features.net", "captions.root", "captions.photos")
"""The settings of commands that caption new photos."""
_RECENT = 3600  # seconds; a stray folder is removed only if it is younger than this


class Parser(argparse.ArgumentParser):
    """An argument parser that also takes settings of an experiment, ``--section.key value``, and lists them in --help.

    ``used`` lists the settings that have an effect on the command: names (``seed``) or whole sections (``decoding.``,
    with the dot). The parser rejects all others. None, the default, stands for all settings, and ``()`` for no setting.
    """

    def __init__(self, command: str, description: str, used: tuple[str, ...] | None = None, epilog: str = "") -> None:
        self.command, self.used = command, used
        self._experiment: str | None = None
        super().__init__(
            prog=f"python -m capexp.{command}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print the message in one line, without the usage that argparse puts before it, and exit."""
        line = f"capexp.{self.command}: {' '.join(message.split())}; see --help\n"
        self.exit(USAGE, line if World.from_environment().is_main else None)

    def parse(self, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
        """Return the values of the command's own flags, and the given settings as text, keyed by dotted name."""
        argv = sys.argv[1:] if argv is None else argv
        settings: dict[str, str] = {}
        others: list[str] = []
        # Take the settings with a dot out first: argparse would read the value after an unknown flag as a positional
        # argument.
        words = iter(argv)
        for word in words:
            name, equals, value = word.partition("=")
            if not (name.startswith("--") and "." in name):
                others.append(word)
            elif equals:
                settings[name[2:]] = value
            else:
                settings[name[2:]] = self._value(name, next(words, None))
        self._experiment = _value_of("--experiment", others)
        namespace, unknown = self.parse_known_args(others)
        # Flags that argparse does not know are settings without a dot, such as --seed.
        words = iter(unknown)
        for flag in words:
            if not flag.startswith("--"):
                self.error(f"unexpected {flag!r}")
            name, equals, value = flag[2:].partition("=")
            settings[name] = value if equals else self._value(flag, next(words, None))
        for name in settings:
            if self.used == ():
                self.error(f"--{name} has no effect on this command, which takes no settings")
            if self.used is not None and not _is_used(name, self.used):
                self.error(f"--{name} has no effect on this command; settings that have: {', '.join(self.used)}")
        return namespace, settings

    def format_help(self) -> str:
        """Return the help of the command's own flags and of every setting that has an effect on it."""
        if self.used == ():
            return super().format_help()
        from capexp.experiment import find_experiment, load_experiment

        name = self._experiment
        experiment = None if name is None else load_experiment(find_experiment(name), {})
        source = (
            "in brackets their defaults; --experiment NAME --help shows the values of its file"
            if experiment is None
            else f"in brackets the values of experiment {experiment.name}"
        )
        return f"{super().format_help()}\nsettings, {source}:\n\n{_settings_help(self.used, experiment)}"

    def _value(self, flag: str, value: str | None) -> str:
        """Return the value of a flag; exit if it is missing."""
        if value is None:
            self.error(f"{flag} needs a value")
        return value


def _is_used(name: str, used: tuple[str, ...]) -> bool:
    """Return whether ``used`` contains a setting or its section."""
    return any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in used)


def _value_of(flag: str, words: list[str]) -> str | None:
    """Return the value of a flag in a command line that argparse has not parsed; None if the flag is not there."""
    for word, following in zip(words, [*words[1:], None], strict=False):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _settings_help(used: tuple[str, ...] | None, experiment: "Experiment | None") -> str:
    """Return the help of the used settings, grouped by section: type, meaning, bounds, and value or default of each."""
    from pydantic import BaseModel

    from capexp.settings import Experiment

    listing = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)

    def add(section: type[BaseModel], prefix: str, values: BaseModel | None) -> None:
        title, group = prefix.rstrip(".") or "experiment", None
        for name, field in section.model_fields.items():
            inner = None if values is None else getattr(values, name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                add(field.annotation, f"{prefix}{name}.", inner)
            elif used is None or _is_used(f"{prefix}{name}", used):
                group = group or listing.add_argument_group(title, _plain(section.__doc__))
                value = _default_text(field) if values is None else _value_text(inner)
                text = " ".join(filter(None, (_plain(field.description), _bounds_text(field), f"[{value}]")))
                group.add_argument(f"--{prefix}{name}", metavar=_type_text(field), help=text.replace("%", "%%"))

    add(Experiment, "", experiment)
    return listing.format_help().lstrip()


def _plain(docstring: str | None) -> str:
    """Return a docstring in one line, without markup."""
    return re.sub(r":\w+:`([^`]*)`", r"\1", " ".join((docstring or "").split())).replace("``", "")


def _type_text(field: "FieldInfo") -> str:
    """Return the type of a setting as --help shows it: ``N``, ``X``, ``PATH``, or its choices."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", Path: "PATH"}
    return names.get(kind, "JSON") if isinstance(kind, type) else "JSON"


def _bounds_text(field: "FieldInfo") -> str:
    """Return a setting's bounds in words; an empty text if it has none."""
    found = {
        name: getattr(bound, name)
        for bound in field.metadata
        for name in ("ge", "gt", "le", "lt", "multiple_of")
        if getattr(bound, name, None) is not None
    }
    if field.annotation not in (int, float) or not found:
        return ""
    kind = "Whole number" if field.annotation is int else "Number"
    if {"ge", "le"} <= found.keys():
        limits = [f"{found['ge']:,} to {found['le']:,}"]
    else:
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        limits = [f"{words[name]} {value:,}" for name, value in found.items() if name in words]
    if "multiple_of" in found:
        limits.append(f"a multiple of {found['multiple_of']}")
    return f"{kind}, {', '.join(limits)}."


def _default_text(field: "FieldInfo") -> str:
    """Return a setting's default, or ``required``."""
    return "required" if field.is_required() else _value_text(field.get_default(call_default_factory=True))


def _value_text(value: object) -> str:
    """Return a value as a user writes it on the command line; a path in the home directory begins with ``~``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # there may be no home
            if value.is_relative_to(Path.home()):
                return f"~/{value.relative_to(Path.home())}"
    if isinstance(value, Mapping | tuple):
        return json.dumps(_as_json(value))
    return str(value)


def _as_json(value: object) -> object:
    """Convert sections, mappings and tuples to dictionaries and lists; sections keep only the fields that were set."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return {name: _as_json(getattr(value, name)) for name in value.model_fields_set}
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_as_json(inner) for inner in value]
    return value


def add_experiment(parser: argparse.ArgumentParser, default: str | None = "scenes") -> None:
    """Add the flag that names the experiment."""
    parser.add_argument(
        "--experiment",
        metavar="NAME|FILE",
        default=default,
        help="a TOML file, or a name under experiments/ (default: scenes)",
    )


def experiment_of(arguments: argparse.Namespace) -> str:
    """Return the value of ``--experiment``, or ``scenes`` (the embedded data) if the flag is not given."""
    return "scenes" if arguments.experiment is None else str(arguments.experiment)


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the data for an evaluation, and the output file."""
    parser.add_argument(
        "--experiment",
        metavar="NAME|FILE",
        help="the experiment whose data is used (default: scenes; required if the captioner was trained on other data)",
    )
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), default="dev", help="split to use (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE.json", type=Path, help="also write the result to this file")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names a captioner."""
    parser.add_argument(
        "--model",
        required=True,
        help="a bundle's folder, runs:/ID/captioner, models:/NAME/VERSION or models:/NAME@champion",
    )


def use_encoder(captioner: "Captioner", settings: Mapping[str, str]) -> None:
    """Load a captioner's encoder, by the flags in :data:`ENCODER_SETTINGS`.

    ``captions.root`` and ``captions.photos`` name the folder of the photos on which weights are checked, where the
    captioner was trained on a file of features.
    """
    from capexp.errors import InputError
    from capexp.settings import NetSetting

    net = settings.get("features.net", "auto")
    if net not in get_args(NetSetting):
        raise InputError(f"--features.net {net}: none of {', '.join(get_args(NetSetting))}")
    folder = None
    if settings.keys() & {"captions.root", "captions.photos"}:
        folder = Path(settings.get("captions.root", ""), settings.get("captions.photos", ""))
    captioner.use_encoder(settings.get("features.weights"), folder, net)  # type: ignore[arg-type]


def refuse_output(parser: Parser, output: Path | None, flag: str = "--output") -> None:
    """Exit with an error if the output file cannot be written. Call it before the work is done."""
    if output is None:
        return
    folder = Path(os.path.realpath(output)).parent
    if not folder.is_dir() and not output.exists():
        parser.error(f"{flag} {output}: no folder {folder if output.is_symlink() else output.parent}; make it first")
    if Path(os.path.realpath(output)).is_symlink():
        parser.error(f"{flag} {output}: a link that leads to itself")
    if output.is_dir():
        parser.error(f"{flag} {output}: a folder; name a file in it")


def print_epochs(updates: "Generator[Update, None, R]") -> R:
    """Run a generator of updates to its end, print a line for each epoch, and return the generator's result."""
    with contextlib.closing(updates):
        while True:
            try:
                update = next(updates)
            except StopIteration as stop:
                result: R = stop.value
                return result
            print(_describe_epoch(update.run, update.epoch), flush=True)


def _describe_epoch(run: str, epoch: "Epoch") -> str:
    """Return the line that is printed for an epoch; ``run`` is the run's label, empty if there is one run only."""
    label = f"{run}   " if run else ""
    reward = "" if epoch.reward is None else f"reward {epoch.reward:.4f}   dev CIDEr {epoch.dev_cider:.4f}   "
    return (
        f"{label}epoch {epoch.number:3d}   train {epoch.train_loss:.4f}   dev {epoch.dev_loss:.4f}   "
        f"{reward}{epoch.seconds:.1f} s{'  *' if epoch.improved else ''}"
    )


def main(name: str, command: Callable[[], int]) -> NoReturn:
    """Run a command as a program: configure logging and signals, print errors in one line, exit with the status.

    ``name`` is the name of the command, such as "train".
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("capexp").setLevel(logging.DEBUG)  # a run's log file gets all records
    world = World.from_environment()
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: record.levelno >= (logging.INFO if world.is_main else logging.WARNING))
    # Turn off MLflow's hints, migration messages and progress bars, so that the command's own output stays readable.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the URL may contain a password
    # A thread of MLflow's telemetry changes os.environ. A request that another thread makes at this moment fails.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # no warnings about retries
    # These log errors with a traceback; the command reports them in one line.
    for logger in ("mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # Importing torch and MLflow creates a million objects that stay. Looking for garbage among them would take a tenth
    # of the processor time of a short run.
    gc.set_threshold(50_000)
    # OpenMP threads sleep while they wait, instead of spinning, so that two runs on one machine can share its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ignore Pillow's warning about large photos: capexp.data.photos rejects photos above a limit of its own.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    # Print file names that are not UTF-8 as their original bytes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    if world.is_main:
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
    else:  # under torchrun, rank 0 prints and closes an interrupted run; the other ranks end without a message
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ["TQDM_DISABLE"] = "1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "MLFLOW_RUN_ID" in os.environ:
        _remove_stray_folder()
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
            file = f"{error.filename}: " if error.filename else ""
            status = _say(name, f"{file}{error.strerror}", USAGE)
        else:
            raise
    sys.exit(status)


def _remove_stray_folder() -> None:
    """Remove the empty folder that ``mlflow run`` makes if the project's path contains a space or an umlaut.

    MLflow does not decode the percent-encoded path of its default store, and creates a folder with the encoded name
    before this process starts.
    """
    with contextlib.suppress(OSError, UnicodeEncodeError):  # there is none, or it is not empty
        folder = Path(quote(str(Path.cwd())))
        while "%" in str(folder) and time.time() - folder.stat().st_mtime < _RECENT:
            folder.rmdir()
            folder = folder.parent


def _refuse_torchrun(name: str) -> int:
    """Return status 2, with a message, if torchrun has started a command that cannot use several processes; else 0."""
    world = World.from_environment()
    if world.size == 1 or name in ("train", "extract"):
        return 0
    if world.is_main:
        _say(name, "torchrun starts capexp.train and capexp.extract only; start this one by itself", USAGE)
    return USAGE


def _say(name: str, message: str, status: int) -> int:
    """Print a message in one line on stderr; return ``status``."""
    world = World.from_environment()
    rank = "" if world.is_main else f"rank {world.rank}: "
    print(f"capexp.{name}: {rank}{' '.join(message.split())}", file=sys.stderr)
    return status


def _interrupt(signum: int, frame: FrameType | None) -> Any:
    """Raise KeyboardInterrupt at the first signal, and ignore later ones, so that the run can close cleanly."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass)  # with SIG_IGN, Python prints an error for a signal that has arrived already
    raise KeyboardInterrupt


def _pass(signum: int, frame: FrameType | None) -> None:
    """Ignore a signal."""
