"""The members of an ensemble, as its file names them."""

from pathlib import Path

import pytest

from capexp.errors import InputError
from capexp.experiment import check_search_space, find_experiment, load_experiment, members_of, to_toml
from capexp.runs.group import check_count
from capexp.settings import Experiment

FLICKR8K = """
[captions]
root = "data"
[vocabulary]
cleaning = "standard"
minimum_count = 5
unknown = "token"
[features]
layer = "conv5_3"
pool = "max2"
mirror = true
weights = "IMAGENET1K_FEATURES"
[registry]
model = "capexp-flickr8k"
"""
TWO = '[[ensemble.members]]\nexperiment = "flickr8k-attention"\nseeds = [1, 2]\n'


def load(folder: Path, members: str, settings: str = FLICKR8K, **overrides: str) -> Experiment:
    path = folder / "together.toml"
    path.write_text(f'name = "together"\n{settings}\n{members}', encoding="utf-8")
    return load_experiment(path, {name.replace("__", "."): value for name, value in overrides.items()})


def test_a_member_is_its_own_experiment_at_its_seed_on_the_ensembles_data(tmp_path: Path) -> None:
    more = 'settings = {training.self_critical.epochs = 6, registry.metric = "dev_cider"}\n'
    together = load(tmp_path, f"{TWO}{more}", features__cache="here", features__net="caffe", training__device="cpu")
    own = load_experiment(find_experiment("flickr8k-attention"), {})
    members = members_of(together)
    assert [one.seed for one in members] == [1, 2]
    for one in members:
        assert one.name == own.name
        assert one.model == own.model
        assert one.training.self_critical.epochs == 6
        assert one.training.model_copy(update={"self_critical": own.training.self_critical, "device": "auto"}) == (
            own.training
        )
        assert (one.captions, one.features) == (together.captions, together.features)
        assert one.training.device == "cpu"


def test_a_file_beside_the_ensembles_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = load_experiment(find_experiment("flickr8k-attention"), {"name": "mine", "captions.root": str(tmp_path)})
    (tmp_path / "mine.toml").write_text(to_toml(mine), encoding="utf-8")
    monkeypatch.chdir("/")
    together = load(tmp_path, TWO.replace("flickr8k-attention", "mine.toml"))
    assert [one.name for one in members_of(together)] == ["mine", "mine"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "again.toml").write_text(to_toml(together), encoding="utf-8")
    assert members_of(load_experiment(tmp_path / "sub" / "again.toml", {})) == members_of(together)


def test_a_flag_names_members_as_json(tmp_path: Path) -> None:
    one = '[{"experiment": "flickr8k-attention", "seeds": [7, 8, 9], "settings": {"model.lstm_units": 64}}]'
    members = members_of(load(tmp_path, TWO, ensemble__members=one))
    assert [(member.seed, member.model.lstm_units) for member in members] == [(7, 64), (8, 64), (9, 64)]


ONE = TWO.replace("[1, 2]", "[1]")
MERGE = ONE.replace("attention", "merge-conv")


@pytest.mark.parametrize(
    ("members", "settings", "says"),
    [
        (ONE, FLICKR8K, "ensemble.members: 1 is no ensemble"),
        (ONE + ONE, FLICKR8K, "flickr8k-attention, seed 1 is there twice"),
        (ONE + MERGE, FLICKR8K, "flickr8k-merge-conv has features.pool = mean, together has max2"),
        (TWO, FLICKR8K.replace("= 5", "= 4"), "has vocabulary.minimum_count = 5, together has 4"),
        (TWO, FLICKR8K.replace("true", "false"), "flickr8k-attention has features.mirror = True, together has False"),
        (TWO, FLICKR8K.replace("mirror", "size = 448\nmirror"), "has features.size = 224, together has 448"),
        (TWO, FLICKR8K.replace("mirror", 'resize = "nearest"\nmirror'), "has features.resize = bilinear, together has"),
        (TWO.replace("flickr8k-attention", "nothing"), FLICKR8K, "ensemble.members: nothing: neither a file nor"),
        (TWO + "settings = {training.epoch = 3}\n", FLICKR8K, "did you mean training.epochs?"),
        (TWO + "settings = {training.epochs = 0}\n", FLICKR8K, "training.epochs = 0"),
        (TWO.replace("[1, 2]", "[-1]"), FLICKR8K, "seed = -1"),
        (TWO.replace("[1, 2]", "[]"), FLICKR8K, "ensemble.members.0.seeds"),
        (TWO.replace("seeds", "seed"), FLICKR8K, "ensemble.members.0.seed"),
        (TWO, FLICKR8K + "[training.self_critical]\nepochs = 2\n", "training.self_critical.epochs = 2 decides nothing"),
        (TWO, FLICKR8K + '[model]\ndecoder = "attention"\n', "model.decoder = 'attention' decides nothing"),
    ],
)  # fmt: skip
def test_what_is_no_ensemble_is_refused_in_one_line(tmp_path: Path, members: str, settings: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        members_of(load(tmp_path, members, settings))
    (line,) = str(caught.value).splitlines()
    assert says in line


def test_an_ensemble_of_ensembles_is_refused() -> None:
    scenes = load_experiment(
        find_experiment("scenes-ensemble"), {"ensemble.members": '[{"experiment": "scenes-ensemble"}]'}
    )
    with pytest.raises(InputError, match="scenes-ensemble is an ensemble itself"):
        members_of(scenes)


def test_an_ensemble_is_neither_searched_nor_run_at_several_seeds(tmp_path: Path) -> None:
    together = load(tmp_path, TWO)
    with pytest.raises(InputError, match="trains nothing that could be searched"):
        check_search_space(together)
    with pytest.raises(InputError, match=r"--seeds 3: together is an ensemble"):
        check_count(3, together)
