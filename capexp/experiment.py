"""Read experiments from TOML files and flags, and report each error in one line with the setting's dotted name."""

import datetime
import difflib
import json
import re
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from capexp.errors import InputError
from capexp.settings import NO_FILE, UNKNOWN_WEIGHTS, WEIGHTS, Choices, DecodingConfig, Experiment, cache_home, flatten

_CHECKOUT = Path(__file__).parents[1]


def _experiments() -> Path:
    """Return the folder of the project's experiments: in a checkout, or where ``pip install`` has put it."""
    beside = _CHECKOUT / "experiments"
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = [Path(sysconfig.get_path("data", scheme)) / "share" / "capexp" / "experiments" for scheme in schemes]
    return next((folder for folder in (beside, *installed) if (folder / "scenes.toml").is_file()), beside)


FOLDER = _experiments()
"""The folder in which experiments are found by name. Installed experiments are never written to."""
CACHE = _CHECKOUT / "cache" if FOLDER.parent == _CHECKOUT else cache_home()
"""The folder of downloaded data: ``cache`` in a checkout, else the user's cache."""

Settings = dict[str, Any]

_DEPTH = 20  # maximum depth of nested tables and lists in a file
# Control characters, and the surrogates by which Python represents file names that are not UTF-8.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# Settings that must be equal in an ensemble and all its members.
_SHARED = (
    *("vocabulary.cleaning", "vocabulary.tokens", "vocabulary.minimum_count", "vocabulary.unknown"),
    *("features.layer", "features.pool", "features.size", "features.resize"),
    *("features.mirror", "features.crops"),
)
# The values of these settings in experiments that were recorded before the settings existed, where they differ from
# today's defaults.
_BEFORE = {"vocabulary.tokens": "whitespace"}
# Settings of the ensemble that replace its members' own values. All settings of captions.* do so too.
_IMPOSED = (
    *("features.weights", "features.net", "features.file"),
    *("features.cache", "features.precision", "features.batch_size"),
    "training.device",
)


def find_experiment(name: str) -> Path:
    """Return the file of an experiment, given as a path or as a name under ``experiments/``."""
    for path in (Path(name), FOLDER / f"{name}.toml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in FOLDER.glob("*.toml"))
    raise InputError(f"--experiment {name}: neither a file nor one of {', '.join(known)}")


def load_experiment(path: Path, overrides: Mapping[str, object]) -> Experiment:
    """Read an experiment file; ``overrides``, keyed by dotted name, replace its settings.

    Paths in the file are relative to the file's folder, paths in the overrides to the working directory. An override
    is a value, or text from the command line.
    """
    settings = _read(path)
    for name, value in overrides.items():
        _set(settings, name, value)
    return _validate(settings, str(path))


def load_recorded(path: Path) -> Experiment:
    """Read the settings that a run has written, possibly before some of today's settings existed."""
    settings = _read(path)
    for name, value in _BEFORE.items():
        section, key = name.split(".")
        table = settings.setdefault(section, {})
        if isinstance(table, dict):
            table.setdefault(key, value)
    return _validate(settings, str(path))


def _read(path: Path) -> Settings:
    """Read an experiment file; paths in it become relative to the working directory."""
    try:
        settings: Settings = tomllib.loads(path.read_text(encoding="utf-8"))
        _check_values(settings)
    except (ValueError, RecursionError) as error:  # TOML syntax, UTF-8, numbers of thousands of digits, depth
        raise InputError(f"{path}: not TOML ({error}); correct it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for table, key, name in _paths(settings):
        try:
            table[key] = str(_resolved(path, Path(table[key]).expanduser()))
        except RuntimeError:
            raise InputError(f"{name} = {table[key]!r}: there is no such user; write the path out") from None
    return settings


def _resolved(path: Path, value: Path) -> Path:
    """Return a path in an experiment file; ``../cache`` in one of the project's own stands for :data:`CACHE`."""
    if path.parent == FOLDER and value.parts[:2] == ("..", "cache"):
        return CACHE.joinpath(*value.parts[2:])
    return path.parent / value


def replace_settings(experiment: Experiment, overrides: Mapping[str, object]) -> Experiment:
    """Return a copy of the experiment in which ``overrides`` replace settings, as in :func:`load_experiment`."""
    settings = experiment.model_dump(mode="json")
    for name, value in overrides.items():
        _set(settings, name, value)
    return _validate(settings, experiment.name)


def override_decoding(decoding: DecodingConfig, overrides: Mapping[str, object]) -> DecodingConfig:
    """Return a captioner's decoding settings, in which overrides of ``decoding.*`` replace settings."""
    settings: Settings = {"decoding": decoding.model_dump(mode="json")}
    for name, value in overrides.items():
        if name.startswith("decoding."):
            _set(settings, name, value)
    try:
        return DecodingConfig.model_validate(settings["decoding"], strict=True)
    except ValidationError as error:
        raise InputError(f"decoding: {_explain(error)}") from None


def to_toml(experiment: Experiment) -> str:
    """Return the experiment as TOML text with absolute paths; loading it gives an equal experiment."""
    import tomli_w  # imported here: a served model needs no TOML, and tomli_w is not among its requirements

    unused = None if experiment.is_ensemble else {"ensemble"}
    settings = experiment.model_dump(mode="json", exclude_none=True, exclude=unused)
    for table, key, _ in _paths(settings):
        table[key] = str(Path(table[key]).absolute())
    return tomli_w.dumps(settings)


def members_of(experiment: Experiment) -> tuple[Experiment, ...]:
    """Return the experiments of an ensemble's members, one per seed.

    The ensemble sets each member's data paths (``captions.*``), weights and their net, cache, the precision and batch
    size of the extraction, and the device. Members must have the same vocabulary settings and the same features as the
    ensemble. They keep all their other settings.
    """
    settings = flatten(experiment.model_dump(mode="json", exclude={"ensemble", "tune"}))
    imposed = {name: value for name, value in settings.items() if name.startswith("captions.") or name in _IMPOSED}
    # If the ensemble was recorded before a setting existed, so were its members.
    before = _BEFORE if experiment.vocabulary.tokens == _BEFORE["vocabulary.tokens"] else {}
    members: list[Experiment] = []
    for config in experiment.ensemble.members:
        for seed in config.seeds:
            try:
                path = find_experiment(config.experiment)
            except InputError as error:
                raise InputError(f"ensemble.members: {str(error).removeprefix('--experiment ')}") from None
            member = load_experiment(path, {**before, **config.settings, "seed": seed, **imposed})
            _check_member(member, settings, experiment.name)
            if any(other.name == member.name and other.flat() == member.flat() for other in members):
                raise InputError(f"ensemble.members: {member_name(member)} is there twice; leave one out")
            members.append(member)
    if len(members) < 2:
        raise InputError(f"ensemble.members: {len(members)} is no ensemble; name two captioners or more")
    return tuple(members)


def member_name(member: Experiment) -> str:
    """Return a member's experiment and seed in words."""
    return f"{member.name}, seed {member.seed}"


def _check_member(member: Experiment, ours: Mapping[str, object], name: str) -> None:
    """Reject a member that is an ensemble, or whose vocabulary or features differ from the ensemble's.

    ``ours`` are the ensemble's settings, keyed by dotted name. ``name`` is the ensemble's name.
    """
    if member.is_ensemble:
        raise InputError(f"ensemble.members: {member.name} is an ensemble itself; name its members in its place")
    theirs = flatten(member.model_dump(mode="json"))
    for setting in _SHARED:
        if theirs[setting] != ours[setting]:
            raise InputError(
                f"ensemble.members: {member.name} has {setting} = {theirs[setting]}, {name} has {ours[setting]}; "
                "members share words and features: make them the same"
            )


def check_search_space(experiment: Experiment) -> None:
    """Reject a search space that no study can use, before the first trial.

    A study cannot search unknown settings, values that a setting does not allow, or settings outside ``model`` and
    ``training``: their trials would need other features, or have losses that are not comparable. An ensemble is not
    searched because it trains nothing.
    """
    if experiment.is_ensemble:
        raise InputError(
            f"--experiment {experiment.name}: an ensemble, which trains nothing that could be searched; search the "
            "experiments of its members"
        )
    for name, space in experiment.tune.search.items():
        kind = TypeAdapter(setting_type(name))
        if name.split(".")[0] not in ("model", "training"):
            raise InputError(
                f"tune.search: {name}: trials with different values of it do not compare; search model.* or training.*"
            )
        for value in space.choices if isinstance(space, Choices) else (space.low, space.high):
            try:
                kind.validate_json(json.dumps(value), strict=True)
            except ValidationError as error:
                raise InputError(f"tune.search: {name} = {value!r}: {_lower(error.errors()[0]['msg'])}") from None


def setting_type(name: str) -> Any:
    """Return the type of a setting, annotated with its bounds."""
    model: Any = Experiment
    *sections, last = name.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        model = field.annotation if field is not None else None
        if not _is_section(model):
            raise _unknown(name)
    if last not in model.model_fields:
        raise _unknown(name)
    field = model.model_fields[last]
    if _is_section(field.annotation):
        raise InputError(f"--{name}: a section, not a setting; give --{name}.SETTING")
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def text_before(name: str) -> str | None:
    """Return the value of a setting in experiments from before the setting existed.

    It is written as by :meth:`Experiment.flat`. It is the default, with few exceptions. None if the setting has no
    default or is unknown.
    """
    if name in _BEFORE:
        return _BEFORE[name]
    model: Any = Experiment
    *sections, last = name.split(".")
    for section in sections:
        field = model.model_fields.get(section) if _is_section(model) else None
        model = None if field is None else field.annotation
    field = model.model_fields.get(last) if _is_section(model) else None
    if field is None or field.is_required() or _is_section(field.annotation):
        return None
    return str(field.get_default(call_default_factory=True))


def setting_names() -> list[str]:
    """Return the dotted names of all settings."""

    def names(model: Any, prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if _is_section(field.annotation):
                yield from names(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(names(Experiment, ""))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _paths(settings: Settings) -> Iterator[tuple[Settings, str, str]]:
    """Yield the table, the key and the dotted name of each setting that is a path of its own.

    Paths relative to ``captions.root`` are left out.
    """
    names = {*WEIGHTS, UNKNOWN_WEIGHTS, NO_FILE}
    for section, key in (("captions", "root"), ("features", "cache"), ("features", "weights"), ("features", "file")):
        table = settings.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str) and table[key] not in names:
            yield table, key, f"{section}.{key}"
    ensemble = settings.get("ensemble")
    members = ensemble.get("members") if isinstance(ensemble, dict) else None
    for member in members if isinstance(members, list) else ():
        # The experiment of a member is a path only if it ends in .toml; otherwise it is a name under experiments/.
        if isinstance(member, dict) and str(member.get("experiment")).endswith(".toml"):
            yield member, "experiment", "ensemble.members"


def _check_values(value: object, depth: int = 0, name: str = "") -> None:
    """Raise ValueError for values that are valid in TOML but not for settings.

    These are dates, times, numbers of more than 64 bits, and deeply nested tables or lists.
    """
    if depth > _DEPTH:
        raise ValueError("tables or lists too deep")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(inner, depth + 1, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, depth + 1, name)
    elif isinstance(value, datetime.date | datetime.time):
        raise ValueError(f"{name} = {value} is a date or time, which no setting is")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} is a number of more than 64 bits")


def _set(settings: Settings, name: str, value: object) -> None:
    """Set one override in nested settings; convert it to the setting's type if it is text."""
    kind = TypeAdapter(setting_type(name))
    if isinstance(value, str):
        try:
            # On the command line, tables and lists, such as a search space, are written as JSON.
            validate = kind.validate_json if value.startswith(("{", "[")) else kind.validate_python
            value = kind.dump_python(validate(value), mode="json")
        except ValidationError as error:
            raise InputError(f"--{name} {value}: {_explain(error, flag=True)}") from None
    *sections, last = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise InputError(f"{section}: should be a section with settings, not a value")
    settings[last] = value


def _validate(settings: Settings, source: str) -> Experiment:
    """Validate nested settings; ``source`` is the file or the experiment that errors name."""
    for name, value in flatten(settings).items():
        if isinstance(value, str) and _FORBIDDEN.search(value):
            raise InputError(f"{source}: {name} = {value[:60]!r}: no setting holds control characters; take them out")
    try:
        # Validate JSON in strict mode: it accepts text for a path and a whole number for a float, but not text for a
        # number. default=str converts the Path objects among overrides.
        experiment = Experiment.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from None
    if experiment.features.cache.parts[:1] == ("~",):
        raise InputError(
            "features.cache: there is no home folder (HOME is not set); give --features.cache FOLDER, or set "
            "XDG_CACHE_HOME"
        )
    return experiment


def _explain(error: ValidationError, flag: bool = False) -> str:
    """Return the first error in one line: the setting, its value and the allowed values.

    With ``flag``, the caller puts the setting and its value before the line, so it names only a position inside a
    table or list.
    """
    first = error.errors()[0]
    # In tune.search the location includes the tag of the space's class.
    name = ".".join(str(part) for part in first["loc"] if part not in ("Range", "Choices"))
    if first["type"] == "value_error":  # from a validator in settings.py; its message names the settings
        return str(first["ctx"]["error"])
    if first["type"] == "missing" and name:
        return f"{name} is not set" + ("" if flag else "; add it")
    if flag:
        return (f"{name}: " if name else "") + _lower(first["msg"])
    if first["type"] == "extra_forbidden":
        return str(_unknown(name))
    return f"{name} = {first['input']!r}: {_lower(first['msg'])}"


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _unknown(name: str) -> InputError:
    """Return the error for an unknown setting, which suggests a similar name or lists the settings of its section."""
    names = setting_names()
    sections = [section for section, field in Experiment.model_fields.items() if _is_section(field.annotation)]
    close = difflib.get_close_matches(name, [*names, *sections], n=1, cutoff=0.75)
    parent = name.rpartition(".")[0]
    siblings = [known for known in names if known.rpartition(".")[0] == parent]
    if not parent:
        siblings += [f"{section}.*" for section in sections]
    remedy = f"did you mean {close[0]}?" if close else f"settings are {', '.join(siblings or names)}"
    return InputError(f"unknown setting {name!r}; {remedy}")
