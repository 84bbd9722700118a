"""One experiment, frozen: the configs of all parts, from a TOML file and flags.

A setting has one name everywhere: ``training.learning_rate`` is the key in the file, the flag on the command
line, the param in MLflow and the parameter of a study.
"""

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from capexp.captioning.decoder import ModelConfig
from capexp.captioning.decoding import DecodingConfig
from capexp.captioning.ensemble import EnsembleConfig
from capexp.data.captions import CaptionsConfig
from capexp.data.vgg16 import FeaturesConfig
from capexp.data.vgg16_weights import NETS
from capexp.data.vocabulary import VocabularyConfig
from capexp.errors import InputError
from capexp.search.space import Choices, TuneConfig
from capexp.tracking.score import Metric
from capexp.training.config import TrainingConfig

FOLDER = Path(__file__).parents[1] / "experiments"
SECTIONS = ("captions", "vocabulary", "features", "model", "training", "ensemble", "decoding", "registry", "tune")

Settings = dict[str, Any]
NAME = r"^\w[\w .-]{0,99}$"  # of experiments, models and studies: no separator of paths, URIs or lines

_OF_ENSEMBLES = ("training.batch_size", "training.order", "training.device")
_DEPTH = 20  # of tables and lists in a file
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last: of file names that are not UTF-8


class RegistryConfig(BaseModel):
    """Under which name the best model is registered, and what makes it a champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(pattern=NAME)
    """One name a data set, so that versions under it compare."""
    metric: Metric = "dev_loss"
    """``dev_loss``: lower is better, of captioners with the same vocabulary; ``dev_cider``: higher is better, of
    captions decoded as each captioner decodes."""


class Experiment(BaseModel):
    """Everything that decides what a run does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    seed: int = Field(default=1, ge=0, lt=2**31)
    captions: CaptionsConfig
    vocabulary: VocabularyConfig = VocabularyConfig()
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    decoding: DecodingConfig = DecodingConfig()
    registry: RegistryConfig
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _ensemble_trains_nothing(self) -> "Experiment":
        if self.is_ensemble:
            own = dict(flatten(self.model_dump(include={"model", "training"})))
            usual = dict(flatten({"model": ModelConfig().model_dump(), "training": TrainingConfig().model_dump()}))
            for name, value in own.items():
                if value != usual[name] and name not in _OF_ENSEMBLES:
                    raise ValueError(
                        f"{name} = {value!r} decides nothing in an ensemble, whose members are trained by themselves; "
                        "set it in their experiments, or in settings of ensemble.members"
                    )
        return self

    @property
    def is_ensemble(self) -> bool:
        """Whether it decodes captioners of other experiments together, instead of training one."""
        return bool(self.ensemble.members)

    def flat(self) -> dict[str, str]:
        """Every setting that decides something by its dotted name, as text; the study's own settings left out."""
        settings = dict(flatten(self.model_dump(mode="json", exclude={"tune"})))
        if self.is_ensemble:
            idle = {name for name in settings if name.startswith(("model.", "training."))} - set(_OF_ENSEMBLES)
        else:
            idle = {"ensemble.members"}
        return {name: str(value) for name, value in settings.items() if name not in idle}

    def to_toml(self) -> str:
        """The experiment as a TOML file with absolute paths, which loads to an equal experiment."""
        record = self.model_dump(mode="json", exclude_none=True, exclude=None if self.is_ensemble else {"ensemble"})
        for path in (("captions", "root"), ("features", "cache")):
            record[path[0]][path[1]] = str(Path(record[path[0]][path[1]]).absolute())
        if self.features.weights not in NETS:
            record["features"]["weights"] = str(Path(self.features.weights).absolute())
        for member in record["ensemble"]["members"] if self.is_ensemble else ():
            if is_path(member["experiment"]):
                member["experiment"] = str(Path(member["experiment"]).absolute())
        return tomli_w.dumps(record)


def is_path(name: str) -> bool:
    """Whether an experiment is named by its file's path."""
    return name.endswith(".toml")


def find(name: str) -> Path:
    """The file of an experiment, by path or by its name under ``experiments/``.

    Raises:
        InputError: there is none.
    """
    for path in (Path(name), FOLDER / f"{name}.toml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in FOLDER.glob("*.toml"))
    raise InputError(f"--experiment {name}: neither a file nor one of {', '.join(known)}")


def load(path: Path, overrides: Mapping[str, object]) -> Experiment:
    """Reads an experiment file, and puts overrides by dotted name over it.

    Paths in the file are relative to the file, paths among the overrides to the working directory. An
    override may be text, as it comes from a command line, or a value.

    Raises:
        InputError: not TOML, an unknown setting, a wrong type, a value out of range; the message names it.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        _refuse_odd(settings, 0)
    except (ValueError, RecursionError) as error:  # of TOML, UTF-8, numbers of thousands of digits, depth
        raise InputError(f"{path}: not TOML ({error}); mend it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    _anchor(settings, path.parent)
    for name, value in overrides.items():
        _set(settings, name, value)
    return _validate(settings, str(path))


def _refuse_odd(value: object, depth: int, name: str = "") -> None:
    """Refuses what TOML allows and no setting is, so that nothing after it stumbles."""
    if depth > _DEPTH:
        raise ValueError("tables or lists too deep")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_odd(inner, depth + 1, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _refuse_odd(inner, depth + 1, name)
    elif isinstance(value, datetime.date | datetime.time):
        raise ValueError(f"{name} = {value} is a date or time, which no setting is")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} is a number of more than 64 bits")


def replace(experiment: Experiment, overrides: Mapping[str, object]) -> Experiment:
    """The experiment with other settings, by dotted name.

    Raises:
        InputError: as :func:`load`.
    """
    settings = experiment.model_dump(mode="json")
    for name, value in overrides.items():
        _set(settings, name, value)
    return _validate(settings, experiment.name)


def override_decoding(decoding: DecodingConfig, overrides: Mapping[str, object]) -> DecodingConfig:
    """A captioner's own way of decoding, but for the settings ``decoding.*`` among the overrides.

    Raises:
        InputError: as :func:`load`.
    """
    settings: Settings = {"decoding": decoding.model_dump(mode="json")}
    for name, value in overrides.items():
        if name.startswith("decoding."):
            _set(settings, name, value)
    try:
        return DecodingConfig.model_validate(settings["decoding"], strict=True)
    except ValidationError as error:
        raise InputError(f"decoding: {_explain(error)}") from None


def setting_type(name: str) -> Any:
    """The type of a setting, with its bounds.

    Raises:
        InputError: no setting has that name.
    """
    model: Any = Experiment
    *sections, last = name.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        model = field.annotation if field is not None else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise _unknown(name)
    if last not in model.model_fields:
        raise _unknown(name)
    field = model.model_fields[last]
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        raise InputError(f"--{name}: a section, not a setting; give --{name}.SETTING")
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def check_search_space(experiment: Experiment) -> None:
    """Refuses a search that no study can make, before its first trial.

    Raises:
        InputError: a name that is no setting, a value the setting does not allow, or a setting whose trials
            would have losses that do not compare or that need other features; an ensemble, which trains nothing.
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
                message = error.errors()[0]["msg"]
                raise InputError(f"tune.search: {name} = {value!r}: {message[0].lower()}{message[1:]}") from None


def setting_names() -> list[str]:
    """All settings by dotted name."""

    def names(model: Any, prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from names(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(names(Experiment, ""))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs of dotted name and value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _validate(settings: Settings, source: str) -> Experiment:
    for name, value in flatten(settings):
        if isinstance(value, str) and _UNFIT.search(value):
            raise InputError(f"{source}: {name} = {value[:60]!r}: no setting holds control characters; take them out")
    try:
        # As JSON, strict: text is taken for a path but not for a number, a whole number for a float. Paths come from
        # overrides in Python.
        return Experiment.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first fault in one line: which setting, what value, what is allowed."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part not in ("Range", "Choices"))  # of tune.search
    if first["type"] == "extra_forbidden":
        return str(_unknown(name))
    if first["type"] == "missing":
        return f"{name} is not set; add it"
    if first["type"] == "value_error":  # raised by a config's own check, whose message names the settings
        return str(first["ctx"]["error"])
    return f"{name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _explain_flag(error: ValidationError) -> str:
    """The first fault of a flag's value; within a table, where."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    inside = [str(part) for part in first["loc"] if part not in ("Range", "Choices")]
    if inside and first["type"] == "missing":
        return f"{'.'.join(inside)} is not set"
    return (f"{'.'.join(inside)}: " if inside else "") + first["msg"][0].lower() + first["msg"][1:]


def _unknown(name: str) -> InputError:
    names = setting_names()
    close = difflib.get_close_matches(name, [*names, *SECTIONS], n=1, cutoff=0.75)
    above = name.rpartition(".")[0]
    beside = [known for known in names if known.rpartition(".")[0] == above]
    if not above:
        beside += [f"{section}.*" for section in SECTIONS]
    remedy = f"did you mean {close[0]}?" if close else f"settings are {', '.join(beside or names)}"
    return InputError(f"unknown setting {name!r}; {remedy}")


def _set(settings: Settings, name: str, value: object) -> None:
    """Puts one override into nested settings."""
    kind = TypeAdapter(setting_type(name))
    if isinstance(value, str):
        try:
            value = kind.dump_python(_read_flag(kind, value), mode="json")
        except ValidationError as error:
            raise InputError(f"--{name} {value}: {_explain_flag(error)}") from None
    *sections, last = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise InputError(f"{section}: should be a section with settings, not a value")
    settings[last] = value


def _read_flag(kind: TypeAdapter[Any], text: str) -> Any:
    """A flag's text as a value; a table or a list, such as a search space, is given as JSON."""
    return kind.validate_json(text) if text.startswith(("{", "[")) else kind.validate_python(text)


def _anchor(settings: Settings, folder: Path) -> None:
    """Makes the paths of a file relative to the working directory instead of to the file."""
    for section, key in (("captions", "root"), ("features", "cache"), ("features", "weights")):
        table = settings.get(section)
        if isinstance(table, dict) and not (key == "weights" and str(table.get(key)) in NETS):
            _anchor_one(table, key, f"{section}.{key}", folder)
    ensemble = settings.get("ensemble")
    members = ensemble.get("members") if isinstance(ensemble, dict) else None
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict) and is_path(str(member.get("experiment"))):
            _anchor_one(member, "experiment", "ensemble.members", folder)


def _anchor_one(table: Settings, key: str, name: str, folder: Path) -> None:
    value = table.get(key)
    if not isinstance(value, str):
        return
    try:
        table[key] = str(folder / Path(value).expanduser())
    except RuntimeError:
        raise InputError(f"{name} = {value!r}: there is no such user; write the path out") from None
