"""Experiments: one name a setting, from file and flags alike; what is not one is refused by that name."""

import json
import tomllib
from pathlib import Path

import pytest

from capexp.data.vgg16_weights import NETS
from capexp.errors import InputError
from capexp.experiment import (
    FOLDER,
    find_experiment,
    load_experiment,
    load_recorded,
    replace_settings,
    setting_names,
    setting_type,
    text_before,
    to_toml,
)
from capexp.settings import Choices, Experiment, flatten

FILES = sorted(FOLDER.glob("*.toml"))
SMALL = 'name = "small"\n[captions]\nroot = "data"\n[registry]\nmodel = "capexp-small"\n'


def write(folder: Path, more: str = "", base: str = SMALL) -> Path:
    path = folder / "small.toml"
    path.write_text(base + more)
    return path


def refusal(path: Path, overrides: dict[str, object] | None = None) -> str:
    """The one line that refuses an experiment."""
    with pytest.raises(InputError) as caught:
        load_experiment(path, overrides or {})
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_experiment_file_loads_under_its_name(path: Path) -> None:
    assert find_experiment(path.stem) == path
    assert load_experiment(path, {}).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_toml_round_trip_gives_an_equal_experiment(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path, {})
    (tmp_path / "again.toml").write_text(to_toml(experiment))
    again = load_experiment(tmp_path / "again.toml", {})
    assert again == experiment and to_toml(again) == to_toml(experiment)


def test_toml_round_trip_keeps_settings_that_are_not_the_defaults(tmp_path: Path) -> None:
    more = (
        '[features]\nlayer = "conv5_3"\npool = "max2"\nweights = "vgg.pth"\ncache = "features"\n'
        "[training]\nlearning_rate = 1e-5\n[tune]\ntrials = 7\n[tune.search]\nmodel.dropout = {low = 0.1, high = 0.2}\n"
        '"training.batch_size" = {low = 8, high = 16, step = 8}\n'
    )
    experiment = load_experiment(write(tmp_path, more), {"seed": "42"})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "again.toml").write_text(to_toml(experiment))
    again = load_experiment(tmp_path / "sub" / "again.toml", {})
    assert again == experiment
    assert (again.seed, again.tune.trials, again.training.learning_rate) == (42, 7, 1e-5)
    assert set(again.tune.search) == {"model.dropout", "training.batch_size"}


def test_search_by_choices_is_read_from_a_file_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "[tune.search]\nmodel.lstm_units = {choices = [8, 16]}\n")
    experiment = load_experiment(path, {})
    assert experiment.tune.search == {"model.lstm_units": Choices(choices=(8, 16))}
    path.write_text(to_toml(experiment))
    assert load_experiment(path, {}) == experiment


def test_toml_of_relative_paths_means_the_same_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    text = to_toml(load_experiment(Path("small.toml"), {}))
    assert tomllib.loads(text)["captions"]["root"] == str(tmp_path / "data")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flat_names_are_the_dotted_names_of_all_settings_that_decide_something_but_the_studys(path: Path) -> None:
    experiment = load_experiment(path, {})
    names = [name for name in setting_names() if not name.startswith("tune.")]
    if experiment.is_ensemble:
        kept = ("training.batch_size", "training.order", "training.device")
        names = [name for name in names if not name.startswith(("model.", "training.")) or name in kept]
    else:
        names.remove("ensemble.members")
    assert list(experiment.flat()) == names


def test_flat_values_are_the_settings_as_text(tmp_path: Path) -> None:
    flat = load_experiment(write(tmp_path), {"training.learning_rate": 0.5, "vocabulary.cleaning": "tutorial"}).flat()
    assert flat["training.learning_rate"] == "0.5"
    assert flat["vocabulary.cleaning"] == "tutorial"
    assert flat["captions.root"] == str(tmp_path / "data")


def test_every_setting_has_one_name_in_file_flag_and_param(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path), {})
    named = dict(flatten(json.loads(experiment.model_dump_json(exclude={"tune"}))))
    for name, value in named.items():
        assert setting_type(name) is not None
        assert replace_settings(experiment, {name: str(value)}) == experiment


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("[training]\nepoch = 3\n", ("'training.epoch'", "did you mean training.epochs?")),
        ("[trainig]\nepochs = 3\n", ("'trainig'", "did you mean")),
        ("[model]\nlstm_unit = 3\n", ("'model.lstm_unit'", "did you mean model.lstm_units?")),
        ("[decoding]\nqqqqqqqq = 3\n", ("'decoding.qqqqqqqq'",)),
        ('[training]\nepochs = "10"\n', ("training.epochs = '10'", "integer")),
        ("[training]\nepochs = 10.0\n", ("training.epochs = 10.0", "integer")),
        ("[training]\nepochs = true\n", ("training.epochs = True", "integer")),
        ('[model]\ndropout = "0.5"\n', ("model.dropout = '0.5'", "number")),
        ("[vocabulary]\ncleaning = 3\n", ("vocabulary.cleaning = 3", "'tutorial' or 'standard'")),
        ("[training]\nepochs = 0\n", ("training.epochs = 0", "greater than or equal to 1")),
        ("[training]\nlearning_rate = 0.0\n", ("training.learning_rate = 0.0", "greater than 0")),
        ("[training]\nlearning_rate = inf\n", ("training.learning_rate", "finite")),
        ("[model]\ndropout = 1.5\n", ("model.dropout = 1.5", "less than 1")),
        ("[model]\ndropout = nan\n", ("model.dropout", "nan")),
        ("[model]\nembedding_size = -1\n", ("model.embedding_size = -1", "greater than or equal to 1")),
        ("[model]\nembedding_size = 100000\n", ("model.embedding_size = 100000", "8192")),
        ('[features]\nlayer = "fc3"\n', ("features.layer = 'fc3'", "'fc2' or 'conv5_3'")),
        ('[features]\npool = "mean"\n', ("features.pool = 'mean'", "fc2")),
        ("[features]\nsize = 336\n", ("features.size = 336", "fc2", "224")),
        ('[features]\nlayer = "conv5_3"\nsize = 225\n', ("features.size = 225", "multiple of 16")),
        ('[features]\nlayer = "conv5_3"\nsize = 1040\n', ("features.size = 1040", "1024")),
        ('[features]\nlayer = "conv5_3"\npool = "max3"\n', ("features.pool = 'max3'", "224", "48 divides")),
        ('[features]\nweights = "IMAGENET1K_FEATURES"\n', ("features.layer = 'fc2'", "IMAGENET1K_FEATURES")),
        ('[features]\nnet = "keras"\n', ("features.net = 'keras'", "'auto', 'caffe' or 'torchvision'")),
        ('[features]\nresize = "bicubic"\n', ("features.resize = 'bicubic'", "'bilinear' or 'nearest'")),
        ("[features]\nweights = []\n", ("features.weights = []", "string")),
        ("training = 3\n", ("training", "3")),
        ("[training\n", ("not TOML", "line")),
        ("[training]\nepochs = 1\nepochs = 2\n", ("not TOML", "line")),
    ],
)
def test_fault_in_a_file_is_refused_with_setting_and_value(tmp_path: Path, more: str, parts: tuple[str, ...]) -> None:
    path = write(tmp_path, base=more + SMALL) if more == "training = 3\n" else write(tmp_path, more)
    line = refusal(path)
    assert line.startswith(f"{path}: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("setting", ["name", "captions", "registry", "captions.root", "registry.model"])
def test_setting_without_a_default_is_asked_for(tmp_path: Path, setting: str) -> None:
    lines = {
        "name": ('name = "small"\n',),
        "captions": ("[captions]\n", 'root = "data"\n'),
        "captions.root": ('root = "data"\n',),
    }
    lines |= {"registry": ("[registry]\n", 'model = "capexp-small"\n'), "registry.model": ('model = "capexp-small"\n',)}
    text = SMALL
    for part in lines[setting]:
        text = text.replace(part, "")
    assert f"{setting} is not set" in refusal(write(tmp_path, base=text))


@pytest.mark.parametrize("name", ["a/b", ""])
def test_name_that_cannot_name_a_file_is_refused(tmp_path: Path, name: str) -> None:
    assert f"name = {name!r}" in refusal(write(tmp_path, base=SMALL.replace("small", name, 1)))


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("training.epoch", "3", ("'training.epoch'", "did you mean training.epochs?")),
        ("training.epochs.more", "3", ("'training.epochs.more'",)),
        ("epochs", "3", ("'epochs'",)),
        ("training", "3", ("--training", "section")),
        ("training.epochs", "ten", ("--training.epochs ten", "integer")),
        ("training.epochs", "1.5", ("--training.epochs 1.5", "integer")),
        ("training.epochs", "0", ("--training.epochs 0", "greater than or equal to 1")),
        ("model.dropout", "1.5", ("--model.dropout 1.5", "less than 1")),
        ("model.dropout", "nan", ("--model.dropout nan",)),
        ("model.embedding_size", "-1", ("--model.embedding_size -1", "greater than or equal to 1")),
        ("vocabulary.unknown", "keep", ("--vocabulary.unknown keep", "'drop' or 'token'")),
        ("features.pool", "mean", ("features.pool = 'mean'", "fc2")),
    ],
)
def test_fault_in_an_override_is_refused_with_setting_and_value(
    tmp_path: Path, name: str, value: str, parts: tuple[str, ...]
) -> None:
    path = write(tmp_path)
    line = refusal(path, {name: value})
    for part in parts:
        assert part in line
    with pytest.raises(InputError):
        replace_settings(load_experiment(path, {}), {name: value})


def test_overrides_as_text_or_as_values_go_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nepochs = 9\npatience = 4\n")
    texts = load_experiment(path, {"training.epochs": "3", "training.learning_rate": "1e-2", "seed": "5"})
    values = load_experiment(path, {"training.epochs": 3, "training.learning_rate": 0.01, "seed": 5})
    assert (
        texts
        == values
        == replace_settings(
            load_experiment(path, {}), {"training.epochs": 3, "training.learning_rate": 0.01, "seed": 5}
        )
    )
    assert (texts.training.epochs, texts.training.patience, texts.training.learning_rate) == (3, 4, 0.01)


def test_override_mends_a_fault_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nepochs = 0\n")
    assert load_experiment(path, {"training.epochs": "2"}).training.epochs == 2


def paths(experiment: Experiment) -> list[Path]:
    features = experiment.features
    return [path.resolve() for path in (experiment.captions.root, features.cache, Path(features.weights))]


def test_paths_in_a_file_are_relative_to_it_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    write(there, '[features]\nlayer = "conv5_3"\nweights = "vgg.pth"\ncache = "../features"\n')
    monkeypatch.chdir(here)
    file = Path("../there/small.toml")
    assert paths(load_experiment(file, {})) == [there / "data", tmp_path / "features", there / "vgg.pth"]
    overrides = {"captions.root": "data", "features.cache": "features", "features.weights": "other.pth"}
    assert paths(load_experiment(file, overrides)) == [here / "data", here / "features", here / "other.pth"]
    assert paths(load_experiment(file, {"captions.root": "/data"}))[0] == Path("/data")


@pytest.mark.parametrize("name", sorted(NETS))
def test_names_of_weights_are_no_paths(tmp_path: Path, name: str) -> None:
    experiment = load_experiment(write(tmp_path, f'[features]\nlayer = "conv5_3"\nweights = "{name}"\n'), {})
    assert experiment.features.weights == name
    assert tomllib.loads(to_toml(experiment))["features"]["weights"] == name


def test_home_is_meant_by_its_sign_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path, base=SMALL.replace('"data"', '"~/data"'))
    assert load_experiment(path, {}).captions.root == tmp_path / "home" / "data"


def test_unknown_experiment_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^--experiment nothing: [^\n]*$") as caught:
        find_experiment("nothing")
    assert all(path.stem in str(caught.value) for path in FILES)


def test_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    assert "latin.toml: not TOML" in refusal(tmp_path / "latin.toml")


def test_experiment_is_frozen(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path), {})
    with pytest.raises(ValueError, match="frozen"):
        experiment.training.epochs = 3


def test_settings_recorded_before_a_setting_existed_are_read_as_they_were_meant(tmp_path: Path) -> None:
    path = write(tmp_path)
    recorded = load_experiment(path, {})
    (tmp_path / "now.toml").write_text(to_toml(recorded))
    assert load_recorded(tmp_path / "now.toml") == recorded and recorded.vocabulary.tokens == "words"
    before = to_toml(recorded).replace('tokens = "words"\n', "")
    assert before != to_toml(recorded)
    (tmp_path / "before.toml").write_text(before)
    assert load_recorded(tmp_path / "before.toml").vocabulary.tokens == "whitespace"
    assert text_before("vocabulary.tokens") == "whitespace" and text_before("training.average") == "0.0"


def test_without_a_home_the_cache_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    path = write(tmp_path)
    with pytest.raises(
        InputError, match=r"^features\.cache: there is no home folder .*--features\.cache FOLDER.*XDG_CACHE"
    ):
        load_experiment(path, {})
    assert load_experiment(path, {"features.cache": "here"}).features.cache == Path("here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_experiment(path, {}).features.cache == tmp_path / "capexp" / "features"
