"""Several runs under one: an experiment at several seeds, and an ensemble with its members."""

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
from capexp.experiment import load_experiment, member_name, members_of, replace_settings, to_toml
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
"""Tags: how many seeds a run has under it, which seed a run is, which member of an ensemble."""
_OF_AN_EPOCH = ("dev_loss", "dev_perplexity")  # not results of a run
_ENSEMBLE = "ensemble"  # the folder of an ensemble's bundle, in the run's
# What may differ between a member and a run that was trained before: where things are, and what comes after training.
_FREE = {"captions.root", "features.weights", "features.cache", "features.batch_size", "training.device"} | {
    *("training.keep", "training.save_steps", "registry.model", "registry.metric"),
}


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds."""

    mean: float
    deviation: float
    """Sample standard deviation (of n - 1)."""


@dataclass(frozen=True)
class SeedsResult:
    """An experiment at several seeds."""

    run_id: str
    metrics: dict[int, dict[str, float]]
    """By seed and MLflow's name."""
    spreads: dict[str, Spread]
    version: Version


def count_of_seeds(run_id: str) -> int | None:
    """Return how many seeds a run has under it; None where it is one run."""
    count = run_tags(run_id).get(SEEDS)
    return None if count is None else int(count)


def check_count(count: int, experiment: Experiment) -> None:
    """Refuse fewer than two seeds, seeds beyond 2^31 and an ensemble, whose seeds are in its settings."""
    if experiment.is_ensemble:
        raise InputError(f"--seeds {count}: {experiment.name} is an ensemble; its seeds are those of ensemble.members")
    if count < 2:
        raise InputError(f"--seeds {count}: fewer than two seeds have no spread; give 2 or more")
    if experiment.seed + count > 2**31:
        raise InputError(f"--seeds {count}: from seed = {experiment.seed} on there are not so many; lower seed")


def train_seeds(plan: Plan, count: int, resume: str | None = None) -> Generator[Update, None, SeedsResult]:
    """Train an experiment at its seed and the following ones, in turn.

    Each is a run nested under one that holds mean and standard deviation of their results, as ``NAME_mean`` and
    ``NAME_std``; the best by ``registry.metric`` is registered there. Resumed, what is finished is not run again; a
    larger ``count`` adds seeds.
    """
    experiment = plan.experiment
    seeds = {
        seed: replace_settings(experiment, {"seed": seed}) for seed in range(experiment.seed, experiment.seed + count)
    }
    if resume is not None:  # refused before the new settings are written
        for seed, run_id in _begun(resume).items():
            one = replace_settings(experiment, {"seed": seed})
            RunFolder(plan.folder / resume / run_id).is_complete(one)
    plan = replace(plan, name=f"{experiment.name}, {count} seeds", tags={SEEDS: str(count)})
    with opened(plan, resume) as run:
        run.tracked.set_tags(plan.tags)
        begun = _begun(run.run_id)
        results: dict[int, Result] = {}
        for seed, one in seeds.items():
            label = f"seed {seed}"
            of_seed = Plan(
                one, plan.data, f"{experiment.name}, {label}", label, {SEED: str(seed)}, run.run_id, run.folder.path,
                registers=False,
            )  # fmt: skip
            results[seed] = yield from child(of_seed, _earlier_seed(of_seed, begun.get(seed)))
        return _summarize(run, results)


def _begun(run_id: str) -> dict[int, str]:
    """Return the newest run of each seed that was begun."""
    runs = reversed(nested_runs(run_id))
    return {int(run.data.tags[SEED]): str(run.info.run_id) for run in runs if SEED in run.data.tags}


def _earlier_seed(plan: Plan, run_id: str | None) -> EarlierRun | None:
    if run_id is None:
        return None
    folder = RunFolder(plan.folder / run_id)
    is_complete = folder.is_complete(plan.experiment)
    return EarlierRun(run_id, folder.best_bundle(plan.experiment) if is_complete else None)


def _summarize(run: OpenRun, results: Mapping[int, Result]) -> SeedsResult:
    """Log mean and standard deviation over the seeds, and register the best captioner."""
    experiment = run.plan.experiment
    known = {str(nested.info.run_id): dict(nested.data.metrics) for nested in nested_runs(run.run_id)}
    metrics = {
        seed: {
            name: value
            for name, value in known[result.run_id].items()
            if name.startswith(("best_", "dev_")) and name not in _OF_AN_EPOCH
        }
        for seed, result in results.items()
    }
    spreads = {
        name: Spread(statistics.mean(values), statistics.stdev(values))
        for name in next(iter(metrics.values()))
        if len(values := [of_seed[name] for of_seed in metrics.values() if name in of_seed]) == len(metrics)
    }
    logged = {f"{name}_mean": spread.mean for name, spread in spreads.items()}
    logged |= {f"{name}_std": spread.deviation for name, spread in spreads.items()}
    run.tracked.log_metrics(logged, len(metrics), time.time_ns() // 1_000_000)
    best = min(metrics, key=lambda seed: _cost(metrics[seed], experiment))
    run.tracked.set_tags({"best_seed": str(best), "best_run": results[best].run_id})
    one = replace_settings(experiment, {"seed": best})
    version = register_bundle(run.with_experiment(one), results[best].bundle)
    told = [
        f"{name} {spreads[name].mean:.4f} ± {spreads[name].deviation:.4f}" for name in ("best_dev_loss", "dev_cider")
    ]
    mean = f"Mean and standard deviation over {len(results)} seeds: {', '.join(told)}; the best is seed {best}."
    run.tracked.describe(describe_run(experiment, run.plan.data, [mean, describe_use(version.numbered_uri)]))
    return SeedsResult(run.run_id, metrics, spreads, version)


def _cost(metrics: Mapping[str, float], experiment: Experiment) -> float:
    """Return what the best seed is chosen by: lower is better."""
    return metrics["best_dev_loss"] if experiment.registry.metric == "dev_loss" else -metrics["dev_cider"]


def train_ensemble(plan: Plan, resume: str | None = None) -> Generator[Update, None, tuple[Result, dict[str, str]]]:
    """Find or train the members of an ensemble, then evaluate and register it.

    A member is a finished run, in any experiment of the store, with the same settings, data, words and encoder, whose
    captioner is still to be had. One that was interrupted in this folder is resumed; others are trained as runs of
    their own, nested under the ensemble's, which register nothing.

    Returns the result, and each member in words with the run that has trained it.
    """
    experiment, data = plan.experiment, plan.data
    encoder = encoder_weights(experiment)
    with opened(plan, resume) as run:
        members: dict[str, str] = {}
        captioners: list[Captioner] = []
        for number, member in enumerate(members_of(experiment), start=1):
            _write_member(run, member, number)
            name = member_name(member)
            of_member = Plan(member, data, name, name, {MEMBER: name}, run.run_id, CHECKPOINTS, registers=False)
            result = yield from child(of_member, _earlier_member(member, data))
            members[f"{number}: {name}"] = result.run_id
            captioners.append(Captioner.load(result.bundle, run.device))
        run.tracked.set_tags({f"{MEMBER}_{number}": run_id for number, run_id in enumerate(members.values(), start=1)})
        captioner = Captioner.ensemble(captioners, experiment.decoding)
        loss = cross_entropy(captioner.decoder, data.batches("dev", experiment.training).in_order()).per_token
        captioner.record = TrainingRecord(
            epoch=None, train_loss=None, dev_loss=loss, dev_digest=data.splits["dev"].digest()
        )
        run.tracked.log_params({"decoder_parameters": str(captioner.decoder.parameter_count())})
        bundle = captioner.save(run.folder.path / _ENSEMBLE)
        metrics = {"dev_loss": loss, "dev_perplexity": perplexity(loss), "best_dev_loss": loss}
        evaluation, samples = conclude(run, captioner, metrics)
        version = register(run, captioner, evaluation, encoder)
        describe_end(run, captioner, evaluation, bundle, version)
        blind = evaluation.blind.per_token
        result = Result(
            run.run_id, bundle, dev_loss=loss, dev_loss_blind=blind, version=version, samples=samples
        )  # fmt: skip
        return result, members


def _write_member(run: OpenRun, member: Experiment, number: int) -> None:
    """Keep a member's settings among the ensemble's files."""
    path = run.folder.path / "members" / f"{member.name}-seed{member.seed}-{number}.toml"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    run.tracked.log_artifact(write_whole(path, to_toml(member)))


def _earlier_member(member: Experiment, data: Dataset) -> EarlierRun | None:
    """Return the newest finished run with a member's settings whose captioner is to be had, or one to go on with."""
    known = _known(member, data)
    for run in known:
        if run.is_finished and (bundle := _bundle(run, member)) is not None:
            return EarlierRun(run.run_id, bundle)
    for run in known:
        # Begun in this folder, by itself or for an ensemble, and broken off.
        if not run.is_finished and (CHECKPOINTS / run.run_id / SETTINGS).is_file():
            return EarlierRun(run.run_id)
    return None


def _known(member: Experiment, data: Dataset) -> list[FoundRun]:
    """Return the runs with a member's settings on the same data, words and features, the newest first."""
    found = runs_of({"name": member.name, "seed": str(member.seed)}, comparable_tags(data))
    single = [run for run in found if not {"pruned", SEEDS, STUDY} & run.tags.keys()]
    return [run for run in single if _has_settings(run.run_id, member)]


def _has_settings(run_id: str, member: Experiment) -> bool:
    """Return whether a run was made with a member's settings, by the file that it left: params may be cut short."""
    path = fetch_artifacts(run_id, SETTINGS)
    if path is None:
        return False
    try:
        theirs, ours = load_experiment(path, {}).flat(), member.flat()
    except InputError:  # of another version of the project
        return False
    return all(theirs.get(name) == value for name, value in ours.items() if name not in _FREE)


def _bundle(run: FoundRun, member: Experiment) -> Path | None:
    """Return the captioner that a finished run has left: in its folder, or among its artifacts."""
    run_id, above = run.run_id, run.tags.get(PARENT, "")
    for folder in (CHECKPOINTS / run_id, CHECKPOINTS / above / run_id):
        with suppress(InputError):
            found = RunFolder(folder).best_bundle(member)
            if found is not None:
                verify_bundle(found)
                return found
    with suppress(InputError):
        found = find_bundle(f"runs:/{run_id}/{ARTIFACT}")
        verify_bundle(found)
        return found
    return None
