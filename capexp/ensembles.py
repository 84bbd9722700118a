"""An ensemble, run and tracked: its members found or trained, then decoded together, measured and registered."""

import logging
from collections.abc import Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from capexp import experiment as experiments, run_folder, runs
from capexp.captioning.bundle import TrainingRecord, verify_bundle
from capexp.captioning.captioner import Captioner
from capexp.captioning.model import outline_decoder
from capexp.data.errors import InputError
from capexp.data.files import write_whole, writing
from capexp.experiment import Experiment
from capexp.members import member_name, members_of
from capexp.preparation import Prepared
from capexp.registration import encoder_weights, register
from capexp.report import report
from capexp.scoring.evaluation import cross_entropy, perplexity
from capexp.tracking import registry
from capexp.tracking.bundle import find_bundle
from capexp.tracking.gallery import Card
from capexp.tracking.registry import Version
from capexp.tracking.run import PARENT, FoundRun, fetch_artifacts, runs_of
from capexp.tracking.store import prepare_store, store_faults
from capexp.training.config import choose_device
from capexp.training.epoch import Epoch

log = logging.getLogger(__name__)

MEMBER = "member"
"""The tag of a run that was trained for an ensemble: which member it is."""
_BUNDLE = "ensemble"  # the folder of its bundle, in the run's
# What may differ between a member and a run that was trained before: where things are, and what comes after training.
_FREE = {"captions.root", "features.weights", "features.cache", "features.batch_size", "training.device"} | {
    *("training.keep", "training.save_steps", "registry.model", "registry.metric"),
}


@dataclass(frozen=True)
class Ensembled:
    """What an ensemble came to."""

    run_id: str
    members: dict[str, str]
    """What each member is, in words, and the run that has trained it."""
    dev_loss: float
    dev_loss_blind: float
    version: Version
    bundle: Path
    samples: tuple[Card, ...]
    """Photos of the dev split, drawn at random."""


def run_ensemble(
    experiment: Experiment, prepared: Prepared, *, resume: str | None = None, promote: bool = False
) -> Generator[tuple[str, Epoch], None, Ensembled]:
    """Finds or trains the members, then measures and registers the ensemble; yields the epochs of what it trains.

    A member is a finished run, in any experiment of the store, with the same settings, data, words and encoder, whose
    captioner is still to be had. One that was broken off in this folder is gone on with; others are trained as runs
    of their own, nested under the ensemble's, which register nothing.

    Raises:
        InputError: as :func:`capexp.runs.run`.
    """
    device = choose_device(experiment.training.device)
    encoder = encoder_weights(experiment)
    prepare_store()
    with ExitStack() as stack:
        stack.enter_context(store_faults())
        if resume is None:
            run_folder.refuse_trained(run_folder.CHECKPOINTS)
        else:
            run_folder.refuse_other_data(resume, prepared)
        tracked = stack.enter_context(
            run_folder.locked_run(experiment.name, experiment.name, run_folder.CHECKPOINTS, resume=resume)
        )
        folder = run_folder.CHECKPOINTS / tracked.run_id
        settings = write_whole(folder / run_folder.SETTINGS, experiment.to_toml())
        stack.enter_context(runs.log_file(folder / "log.txt", tracked))
        runs.log_beginning(tracked, experiment, prepared, str(device), settings)
        trained: dict[str, str] = {}
        bundles: list[Path] = []
        for member in members_of(experiment):
            named = folder / "members" / f"{member.name}-seed{member.seed}-{len(bundles) + 1}.toml"
            with writing(named):
                named.parent.mkdir(exist_ok=True)
            write_whole(named, member.to_toml())
            run_id, bundle = yield from _bundle_of(member, prepared, tracked.run_id)
            trained[f"{len(bundles) + 1}: {member_name(member)}"] = run_id
            bundles.append(bundle)
        for named in sorted((folder / "members").iterdir()):
            tracked.log_artifact(named)
        tracked.set_tags({f"{MEMBER}_{place}": run_id for place, run_id in enumerate(trained.values(), start=1)})
        members = [Captioner.load(bundle, device) for bundle in bundles]
        captioner = Captioner.ensemble(members, experiment.decoding)
        dev_batches = prepared.batches("dev", experiment.training)
        dev_loss = cross_entropy(captioner.decoder, dev_batches.in_order()).per_token
        captioner.training = TrainingRecord(
            epoch=None, train_loss=None, dev_loss=dev_loss, dev_digest=prepared.splits["dev"].digest()
        )
        bundle = captioner.save(folder / _BUNDLE)
        came_to = {"dev_loss": dev_loss, "dev_perplexity": perplexity(dev_loss), "best_dev_loss": dev_loss}
        measured, samples = report(tracked, experiment, prepared, captioner, came_to, folder)
        version = register(tracked, experiment, prepared, captioner, measured, promote, encoder)
        blind = measured.blind.per_token
        return Ensembled(tracked.run_id, trained, dev_loss, blind, version, bundle, samples)


def _bundle_of(
    member: Experiment, prepared: Prepared, parent: str
) -> Generator[tuple[str, Epoch], None, tuple[str, Path]]:
    """The run that has trained a member, and its captioner's bundle."""
    known = _known(member, prepared)
    for run in known:
        if run.is_finished and (found := _bundle(run, member)) is not None:
            log.info("%s: found, run %s", member_name(member), run.run_id)
            return run.run_id, found
    held = next((run.run_id for run in known if _is_broken_off(run)), None)
    log.info("%s: %s", member_name(member), "trained now" if held is None else f"gone on with, run {held}")
    parameters = outline_decoder(member.model, prepared.encoder.shape, len(prepared.vocabulary)).parameter_count()
    epochs = runs.run(
        member, replace(prepared, decoder_parameters=parameters), resume=held, parent=parent,
        name=member_name(member), tags={MEMBER: member_name(member)}, register_model=False,
    )  # fmt: skip
    try:
        while True:
            yield member_name(member), next(epochs)
    except StopIteration as stop:
        result: runs.Result = stop.value
        return result.run_id, result.bundle
    finally:
        epochs.close()


def _known(member: Experiment, prepared: Prepared) -> list[FoundRun]:
    """The runs with a member's settings on the same data, words and features, the newest first."""
    tags = run_folder.tags_of(prepared)
    alike = {name: tags[name] for name in ("data_digest", "vocabulary_digest", "encoder_key")}
    found = runs_of({"name": member.name, "seed": str(member.seed)}, alike)
    return [run for run in found if "pruned" not in run.tags and _has_settings(run.run_id, member)]


def _has_settings(run_id: str, member: Experiment) -> bool:
    """Whether a run was made with a member's settings, by the file that it has left: params may be cut, or text."""
    path = fetch_artifacts(run_id, run_folder.SETTINGS)
    if path is None:
        return False
    try:
        theirs, ours = experiments.load(path, {}).flat(), member.flat()
    except InputError:  # of another version of the project
        return False
    return all(theirs.get(name) == value for name, value in ours.items() if name not in _FREE)


def _bundle(run: FoundRun, member: Experiment) -> Path | None:
    """The captioner that a finished run has left: in its folder, or among its artifacts."""
    run_id, above = run.run_id, run.tags.get(PARENT, "")
    for folder in (run_folder.CHECKPOINTS / run_id, run_folder.CHECKPOINTS / above / run_id):
        with suppress(InputError):
            found = run_folder.best_bundle(folder, member)
            if found is not None:
                verify_bundle(found)
                return found
    with suppress(InputError):
        found = find_bundle(f"runs:/{run_id}/{registry.ARTIFACT}")
        verify_bundle(found)
        return found
    return None


def _is_broken_off(run: FoundRun) -> bool:
    """Whether a run was begun in this folder by itself or for an ensemble, and did not come to its end."""
    folder = run_folder.CHECKPOINTS / run.run_id
    return not run.is_finished and (folder / run_folder.SETTINGS).is_file()
