"""Several runs nested under one: an experiment at several seeds, or the members of an ensemble."""

import statistics
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from capexp.captioning.bundle import TrainingRecord, verify_bundle
from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import cross_entropy, perplexity
from capexp.data.dataset import Dataset
from capexp.errors import InputError
from capexp.experiment import load_recorded, member_name, members_of, replace_settings, to_toml
from capexp.files import write_whole, writing
from capexp.report.model_card import describe_run, describe_use
from capexp.runs.conclusion import conclude
from capexp.runs.folder import CHECKPOINTS, SETTINGS, STUDY, RunFolder
from capexp.runs.lifecycle import OpenRun, Plan, comparable_tags, opened
from capexp.runs.registration import encoder_weights, register, register_bundle
from capexp.runs.run import EarlierRun, Result, child, describe_end
from capexp.settings import Experiment
from capexp.tracking.known_runs import PARENT, FoundRun, fetch_artifacts, nested_runs, run_tags, runs_of
from capexp.tracking.models import find_bundle
from capexp.tracking.registry import ARTIFACT, Version
from capexp.training.loop import Update

SEEDS, SEED, MEMBER = "seeds", "seed", "member"
"""Tags: the number of seeds of a parent run, the seed of a nested run, the name of an ensemble's member."""
_EPOCH_METRICS = ("dev_loss", "dev_perplexity")  # logged after each epoch: they are not results of the run
_ENSEMBLE = "ensemble"  # the folder of the ensemble's bundle, inside the run's folder
# Settings that are ignored in the search for a run to use as a member: they do not change the captioner.
_FREE = {"captions.root", "features.cache", "features.batch_size", "training.device"} | {
    *("features.weights", "features.net", "features.file"),
    *("training.keep", "training.save_steps", "registry.model", "registry.metric"),
}


@dataclass(frozen=True)
class Spread:
    """The mean and standard deviation of a metric over the seeds."""

    mean: float
    deviation: float
    """The sample standard deviation (divisor n - 1)."""


@dataclass(frozen=True)
class SeedsResult:
    """The results of an experiment at several seeds."""

    run_id: str
    metrics: dict[int, dict[str, float]]
    """The metrics of each seed, keyed by their names in MLflow."""
    spreads: dict[str, Spread]
    """Keyed by the metrics' names in MLflow."""
    version: Version
    """The registered version: the captioner of the best seed."""


def count_of_seeds(run_id: str) -> int | None:
    """Return the number of seeds that are nested under a run; None if the run is not a parent of seeds."""
    count = run_tags(run_id).get(SEEDS)
    return None if count is None else int(count)


def check_count(count: int, experiment: Experiment) -> None:
    """Raise InputError if the value of ``--seeds`` does not fit the experiment.

    There must be at least two seeds, all below 2^31. An ensemble takes no ``--seeds``: its settings name the seeds.
    """
    if experiment.is_ensemble:
        raise InputError(f"--seeds {count}: {experiment.name} is an ensemble; its seeds are those of ensemble.members")
    if count < 2:
        raise InputError(f"--seeds {count}: fewer than two seeds have no spread; give 2 or more")
    if experiment.seed + count > 2**31:
        raise InputError(
            f"--seeds {count}: with seed = {experiment.seed} the last seed would be 2^31 or more; lower seed"
        )


def train_seeds(plan: Plan, count: int, resume: str | None = None) -> Generator[Update, None, SeedsResult]:
    """Train an experiment at ``count`` seeds, one after the other: its own seed and the following ones.

    Each seed is a run nested under one parent run. The mean and standard deviation of their results are metrics of the
    parent run, ``NAME_mean`` and ``NAME_std``. The captioner of the best seed by ``registry.metric`` is registered
    under the parent run.

    ``resume`` is the id of a parent run to continue. Finished seeds are not trained again; a larger ``count`` adds
    seeds.
    """
    experiment = plan.experiment
    seeds = {
        seed: replace_settings(experiment, {"seed": seed}) for seed in range(experiment.seed, experiment.seed + count)
    }
    if resume is not None:
        # Check the settings against each earlier seed's checkpoints: is_complete raises InputError. ``opened`` would
        # already write them to the run's folder.
        for seed, run_id in _runs_by_seed(resume).items():
            seed_experiment = replace_settings(experiment, {"seed": seed})
            RunFolder(plan.folder / resume / run_id).is_complete(seed_experiment)
    plan = replace(plan, name=f"{experiment.name}, {count} seeds", tags={SEEDS: str(count)})
    with opened(plan, resume) as run:
        run.tracked.set_tags(plan.tags)
        run_ids = _runs_by_seed(run.run_id)
        results: dict[int, Result] = {}
        for seed, seed_experiment in seeds.items():
            label = f"seed {seed}"
            seed_plan = Plan(
                seed_experiment, plan.data, f"{experiment.name}, {label}", label, {SEED: str(seed)}, run.run_id,
                run.folder.path, registers=False,
            )  # fmt: skip
            results[seed] = yield from child(seed_plan, _earlier_run(seed_plan, run_ids.get(seed)))
        return _summarize(run, results)


def _runs_by_seed(run_id: str) -> dict[int, str]:
    """Return the id of the newest nested run of each seed that was started."""
    runs = reversed(nested_runs(run_id))
    return {int(run.data.tags[SEED]): str(run.info.run_id) for run in runs if SEED in run.data.tags}


def _earlier_run(plan: Plan, run_id: str | None) -> EarlierRun | None:
    """Return the earlier run of a seed, with its captioner if the run is complete; None if ``run_id`` is None."""
    if run_id is None:
        return None
    folder = RunFolder(plan.folder / run_id)
    is_complete = folder.is_complete(plan.experiment)
    return EarlierRun(run_id, folder.best_bundle(plan.experiment) if is_complete else None)


def _summarize(run: OpenRun, results: Mapping[int, Result]) -> SeedsResult:
    """Log the mean and standard deviation over the seeds, register the best captioner and describe the run."""
    experiment = run.plan.experiment
    metrics_by_run = {str(nested.info.run_id): dict(nested.data.metrics) for nested in nested_runs(run.run_id)}
    metrics = {
        seed: {
            name: value
            for name, value in metrics_by_run[result.run_id].items()
            if name.startswith(("best_", "dev_")) and name not in _EPOCH_METRICS
        }
        for seed, result in results.items()
    }
    spreads = {
        name: Spread(statistics.mean(values), statistics.stdev(values))
        for name in next(iter(metrics.values()))
        if len(values := [one_seed[name] for one_seed in metrics.values() if name in one_seed]) == len(metrics)
    }
    logged = {f"{name}_mean": spread.mean for name, spread in spreads.items()}
    logged |= {f"{name}_std": spread.deviation for name, spread in spreads.items()}
    run.tracked.log_metrics(logged, len(metrics), time.time_ns() // 1_000_000)
    best = min(metrics, key=lambda seed: _selection_cost(metrics[seed], experiment))
    best_loss = {"best_dev_loss": metrics[best]["best_dev_loss"]}
    points = run.tracked.log_metrics(best_loss, best, time.time_ns() // 1_000_000)
    run.tracked.set_tags({"best_seed": str(best), "best_run": results[best].run_id})
    best_experiment = replace_settings(experiment, {"seed": best})
    version = register_bundle(run.with_experiment(best_experiment), results[best].bundle, points)
    spread_texts = [
        f"{name} {spreads[name].mean:.4f} ± {spreads[name].deviation:.4f}" for name in ("best_dev_loss", "dev_cider")
    ]
    result = (
        f"Mean and standard deviation over {len(results)} seeds: {', '.join(spread_texts)}; the best is seed {best}."
    )
    run.tracked.describe(describe_run(experiment, run.plan.data, [result, describe_use(version.numbered_uri)]))
    return SeedsResult(run.run_id, metrics, spreads, version)


def _selection_cost(metrics: Mapping[str, float], experiment: Experiment) -> float:
    """Return the value by which the best seed is selected: the dev loss, or minus the dev CIDEr. Lower is better."""
    return metrics["best_dev_loss"] if experiment.registry.metric == "dev_loss" else -metrics["dev_cider"]


def train_ensemble(plan: Plan, resume: str | None = None) -> Generator[Update, None, tuple[Result, dict[str, str]]]:
    """Find or train the members of an ensemble, then evaluate and register the ensemble.

    A finished run is reused as a member if it has the member's settings, data, vocabulary and encoder, and its
    captioner is still available. It may be in any MLflow experiment of the store. An interrupted run with these
    settings is resumed if its folder is in ``checkpoints/`` on this machine. Every other member is trained as a run
    nested under the ensemble's run. Only the ensemble is registered.

    ``resume`` is the id of an ensemble's run to continue. Returns the ensemble's result, and the members' run ids,
    keyed by the member's number and name.
    """
    experiment, data = plan.experiment, plan.data
    encoder = encoder_weights(plan)
    with opened(plan, resume) as run:
        members: dict[str, str] = {}
        captioners: list[Captioner] = []
        for number, member in enumerate(members_of(experiment), start=1):
            _write_member(run, member, number)
            name = member_name(member)
            member_plan = Plan(member, data, name, name, {MEMBER: name}, run.run_id, CHECKPOINTS, registers=False)
            earlier = _earlier_member(member, data) or _begun_member(member, run.run_id)
            result = yield from child(member_plan, earlier)
            members[f"{number}: {name}"] = result.run_id
            captioners.append(Captioner.load(result.bundle, run.device))
        run.tracked.set_tags({f"{MEMBER}_{number}": run_id for number, run_id in enumerate(members.values(), start=1)})
        captioner = Captioner.ensemble(captioners, experiment.decoding)
        loss = cross_entropy(captioner.decoder, data.batches("dev", experiment.training).in_order()).per_token
        captioner.take_data(data)
        captioner.record = TrainingRecord(
            epoch=None, train_loss=None, dev_loss=loss, dev_digest=data.splits["dev"].digest()
        )
        run.tracked.log_params({"decoder_parameters": str(captioner.decoder.parameter_count())})
        bundle = captioner.save(run.folder.path / _ENSEMBLE)
        metrics = {"dev_loss": loss, "dev_perplexity": perplexity(loss), "best_dev_loss": loss}
        evaluation, samples, points = conclude(run, captioner, metrics)
        version = register(run, captioner, evaluation, encoder, points)
        describe_end(run, captioner, evaluation, bundle, version)
        blind = evaluation.blind.per_token
        result = Result(
            run.run_id, bundle, dev_loss=loss, dev_loss_blind=blind, version=version, samples=samples
        )  # fmt: skip
        return result, members


def _write_member(run: OpenRun, member: Experiment, number: int) -> None:
    """Write a member's settings into the ensemble's folder, and log them as an artifact."""
    path = run.folder.path / "members" / f"{member.name}-seed{member.seed}-{number}.toml"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    run.tracked.log_artifact(write_whole(path, to_toml(member)))


def _earlier_member(member: Experiment, data: Dataset) -> EarlierRun | None:
    """Return the run to reuse or to resume as a member; None if the member must be trained.

    It is the newest finished run with the member's settings whose captioner is available. If there is none, it is the
    newest unfinished one whose folder is on this machine.
    """
    candidates = _matching_runs(member, data)
    for run in candidates:
        if run.is_finished and (bundle := _available_bundle(run, member)) is not None:
            return EarlierRun(run.run_id, bundle)
    for run in candidates:
        # An interrupted run of this machine: an ordinary run, or a member of an ensemble.
        if not run.is_finished and (CHECKPOINTS / run.run_id / SETTINGS).is_file():
            return EarlierRun(run.run_id)
    return None


def _begun_member(member: Experiment, run_id: str) -> EarlierRun | None:
    """Return the newest unfinished run of a member under the ensemble's run ``run_id``; None if there is none.

    :func:`_earlier_member` does not find a run that was killed before it had logged its settings and data. Such a run
    is found here by the tag that it has from its start.
    """
    for run in nested_runs(run_id, f"tags.{MEMBER} = '{member_name(member)}'"):
        settings = CHECKPOINTS / run.info.run_id / SETTINGS
        # Members with the same name may differ in their settings.
        if run.info.status != "FINISHED" and (not settings.is_file() or _has_settings(settings, member)):
            return EarlierRun(str(run.info.run_id))
    return None


def _matching_runs(member: Experiment, data: Dataset) -> list[FoundRun]:
    """Return the runs with a member's settings on the same data, vocabulary and features, the newest first.

    Pruned trials, and parent runs of seeds or of a study, are left out.
    """
    found = runs_of({"name": member.name, "seed": str(member.seed)}, comparable_tags(data))
    single_runs = [run for run in found if not {"pruned", SEEDS, STUDY} & run.tags.keys()]
    # MLflow may truncate params, so the settings are read from the file among a run's artifacts.
    files = {run.run_id: fetch_artifacts(run.run_id, SETTINGS) for run in single_runs}
    return [run for run in single_runs if (path := files[run.run_id]) is not None and _has_settings(path, member)]


def _has_settings(path: Path, member: Experiment) -> bool:
    """Return whether a run was made with a member's settings; ``path`` is the run's settings file."""
    try:
        run_settings, member_settings = load_recorded(path).flat(), member.flat()
    except InputError:  # written by another version of the project
        return False
    # With cleaning 'tutorial' the vocabulary is split at whitespace anyway: ``vocabulary.tokens`` affects only scores.
    free = _FREE | ({"vocabulary.tokens"} if member.vocabulary.cleaning == "tutorial" else set())
    return all(run_settings.get(name) == value for name, value in member_settings.items() if name not in free)


def _available_bundle(run: FoundRun, member: Experiment) -> Path | None:
    """Return the bundle of a finished run's captioner from its folder or its artifacts; None if neither has one."""
    run_id, parent = run.run_id, run.tags.get(PARENT, "")
    for folder in (CHECKPOINTS / run_id, CHECKPOINTS / parent / run_id):
        with suppress(InputError):
            bundle = RunFolder(folder).best_bundle(member)
            if bundle is not None:
                verify_bundle(bundle)
                return bundle
    with suppress(InputError):
        bundle = find_bundle(f"runs:/{run_id}/{ARTIFACT}")
        verify_bundle(bundle)
        return bundle
    return None
