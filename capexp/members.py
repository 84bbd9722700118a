"""The members of an ensemble as experiments of their own."""

from collections.abc import Mapping

from capexp import experiment as experiments
from capexp.errors import InputError
from capexp.experiment import Experiment

_SHARED = (
    *("vocabulary.cleaning", "vocabulary.minimum_count", "vocabulary.unknown"),
    *("features.layer", "features.pool", "features.size", "features.mirror"),
)
_PLACES = ("features.weights", "features.cache", "features.precision", "features.batch_size", "training.device")


def members_of(experiment: Experiment) -> tuple[Experiment, ...]:
    """The experiments that an ensemble's members are trained by, one a seed.

    The ensemble says for all of them which the data is, where it and the features lie, and on which device they are
    trained; everything else is their own.

    Raises:
        InputError: a member that is no experiment, is named twice, is an ensemble itself, or has other words or
            features than the ensemble.
    """
    ours = dict(experiments.flatten(experiment.model_dump(mode="json", exclude={"ensemble", "tune"})))
    taken = {name: value for name, value in ours.items() if name.startswith("captions.") or name in _PLACES}
    members: list[Experiment] = []
    for member in experiment.ensemble.members:
        for seed in member.seeds:
            try:
                path = experiments.find(member.experiment)
            except InputError as error:
                raise InputError(f"ensemble.members: {str(error).removeprefix('--experiment ')}") from None
            own = experiments.load(path, {**member.settings, "seed": seed, **taken})
            _refuse_unfit(own, ours, experiment.name)
            if any(one.name == own.name and one.flat() == own.flat() for one in members):
                raise InputError(f"ensemble.members: {member_name(own)} is there twice; leave one out")
            members.append(own)
    if len(members) < 2:
        raise InputError(f"ensemble.members: {len(members)} is no ensemble; name two captioners or more")
    return tuple(members)


def member_name(member: Experiment) -> str:
    """A member in words."""
    return f"{member.name}, seed {member.seed}"


def _refuse_unfit(member: Experiment, ours: Mapping[str, object], name: str) -> None:
    if member.is_ensemble:
        raise InputError(f"ensemble.members: {member.name} is an ensemble itself; name its members in its place")
    theirs = dict(experiments.flatten(member.model_dump(mode="json")))
    for setting in _SHARED:
        if theirs[setting] != ours[setting]:
            raise InputError(
                f"ensemble.members: {member.name} has {setting} = {theirs[setting]}, {name} has {ours[setting]}; "
                "members share words and features: make them the same"
            )
