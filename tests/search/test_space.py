"""Search spaces: what a study may draw from, and what it refuses."""

import json

import pytest

from capexp.errors import InputError
from capexp.experiment import check_search_space, find_experiment, load_experiment
from capexp.settings import Choices, Range


def scenes_with(space: dict[str, object]) -> None:
    experiment = load_experiment(find_experiment("scenes"), {"tune.search": json.dumps(space)})
    check_search_space(experiment)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"model.width": {"low": 1, "high": 2}}, "unknown setting 'model.width'"),
        ({"captions.train": {"choices": ["a", "b"]}}, "trials with different values of it do not compare"),
        ({"vocabulary.minimum_count": {"low": 1, "high": 5}}, "trials with different values of it do not compare"),
        ({"seed": {"low": 1, "high": 5}}, "trials with different values of it do not compare"),
        ({"model.dropout": {"low": 0.5, "high": 1.5}}, "model.dropout = 1.5"),
        ({"model.lstm_units": {"low": 0, "high": 8}}, "model.lstm_units = 0"),
        ({"model.lstm_units": {"low": 8.5, "high": 16.0}}, "model.lstm_units = 8.5"),
        ({"model.decoder": {"choices": ["merge", "transformer-xl"]}}, "model.decoder = 'transformer-xl'"),
        ({"model.dropout": {"low": 0.5, "high": 0.5}}, "low = 0.5 is not below high = 0.5"),
        ({"model.dropout": {"low": 0.1, "high": 0.5, "step": 1e-300}}, "give one of 1 to 1,000,000 steps"),
        ({"model.dropout": {"low": 0.1, "high": 0.5, "step": 5e-324}}, "give one of 1 to 1,000,000 steps"),
        ({"model.dropout": {"low": 0.1, "high": 0.5, "step": 0.6}}, "give one of 1 to 1,000,000 steps"),
        ({"model.dropout": {"low": 0.1, "high": 0.5, "step": 0}}, "greater than 0"),
        ({"model.lstm_units": {"low": 1, "high": 8, "step": 0.5}}, "give a whole step"),
        ({"model.lstm_units": {"low": 1, "high": 10**400}}, "high"),
        ({"model.dropout": {"low": 0.0, "high": 0.5, "log": True}}, "log = true needs low above 0"),
        ({"model.dropout": {"choices": [0.5]}}, "choices"),
        ({"model.dropout": {"low": 0.1}}, "model.dropout.high is not set"),
        ({}, "at least 1 item"),
    ],
)
def test_a_space_that_no_study_can_search_is_refused_by_name(space: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as refused:
        scenes_with(space)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    print(refused.value)


@pytest.mark.parametrize(
    ("name", "value"), [("tune.pruner", "successive"), ("tune.trials", "0"), ("tune.trials", "-1")]
)
def test_a_study_that_cannot_be_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"--{name} {value}"):
        load_experiment(find_experiment("scenes"), {name: value})


def test_learning_rate_batch_size_and_decoder_are_searched_by_naming_them() -> None:
    scenes_with(
        {
            "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "training.batch_size": {"choices": [16, 32]},
            "model.embedding_size": {"low": 16, "high": 64, "step": 16},
            "model.photo_norm": {"choices": ["none", "unit"]},
        }
    )


def test_what_a_study_can_go_on_with_has_the_same_kind() -> None:
    assert Range(low=1, high=4).kind == Range(low=2, high=9, step=2).kind
    whole, real, log = Range(low=1, high=4), Range(low=1.0, high=4.0), Range(low=1, high=4, log=True)
    assert len({whole.kind, real.kind, log.kind, Choices(choices=(1, 4)).kind}) == 4
    assert Choices(choices=(4, 1)).kind != Choices(choices=(1, 4)).kind
