"""One experiment at several seeds, because one seed proves nothing: nested runs, their mean and spread."""

import logging
import statistics
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass

from capexp import experiment as experiments, run_folder, runs
from capexp.data.errors import InputError
from capexp.data.files import write_whole
from capexp.experiment import Experiment
from capexp.preparation import Prepared
from capexp.registration import register_bundle
from capexp.tracking.registry import Version
from capexp.tracking.run import TrackedRun, nested_runs, run_tags
from capexp.tracking.store import await_store, prepare_store, store_faults
from capexp.training.epoch import Epoch

log = logging.getLogger(__name__)

SEEDS, SEED = "seeds", "seed"
"""The tags that tell how many there are, of the run above, and which one it is, of the others."""
_OF_AN_EPOCH = ("dev_loss", "dev_perplexity")  # not what a run came to


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds."""

    mean: float
    deviation: float
    """Sample standard deviation (of n - 1)."""


@dataclass(frozen=True)
class Seeds:
    """What an experiment came to at several seeds."""

    run_id: str
    metrics: dict[int, dict[str, float]]
    """By seed and MLflow's name."""
    spreads: dict[str, Spread]
    version: Version


def seeds_of(run_id: str) -> int | None:
    """How many seeds a run stands for; None where it is one run."""
    count = run_tags(run_id).get(SEEDS)
    return None if count is None else int(count)


def run_seeds(
    experiment: Experiment, prepared: Prepared, count: int, *, resume: str | None = None, promote: bool = False
) -> Generator[tuple[int, Epoch], None, Seeds]:
    """Runs the experiment at its seed and the following ones, in turn; yields each epoch with its seed.

    Each is a run nested under one that holds mean and standard deviation of what they came to, as ``NAME_mean`` and
    ``NAME_std``. The best by ``registry.metric`` is registered there. Resumed, what is finished is not run again; a
    larger ``count`` adds seeds.

    Raises:
        InputError: as :func:`capexp.runs.run`.
    """
    prepare_store()
    name, tags = f"{experiment.name}, {count} seeds", {SEEDS: str(count)}
    with ExitStack() as stack:
        stack.enter_context(store_faults())
        if resume is None:
            run_folder.refuse_trained(run_folder.CHECKPOINTS)
        else:
            run_folder.refuse_other_data(resume, prepared)
            for seed, run_id in _begun(resume).items():  # before the new settings are written
                one = experiments.replace(experiment, {"seed": seed})
                run_folder.is_complete(run_id, one, run_folder.CHECKPOINTS / resume)
        tracked = stack.enter_context(
            run_folder.locked_run(name, experiment.name, run_folder.CHECKPOINTS, resume=resume, tags=tags)
        )
        folder = run_folder.CHECKPOINTS / tracked.run_id
        write_whole(folder / run_folder.SETTINGS, experiment.to_toml())
        tracked.log_params(experiment.flat())
        tracked.set_tags(run_folder.tags_of(prepared) | tags | {"device": experiment.training.device})
        begun = _begun(tracked.run_id)
        done: dict[int, str] = {}
        for seed in range(experiment.seed, experiment.seed + count):
            one = experiments.replace(experiment, {"seed": seed})
            held = begun.get(seed)
            await_store()
            if held is None or not run_folder.is_complete(held, one, folder):
                epochs = runs.run(
                    one, prepared, resume=held, parent=tracked.run_id, name=f"{experiment.name}, seed {seed}",
                    tags={SEED: str(seed)}, folder=folder, register_model=False,
                )  # fmt: skip
                result = yield from _with_seed(seed, epochs)
                held = result.run_id
            done[seed] = held
        return _summarize(tracked, experiment, prepared, done, promote)


def _with_seed(
    seed: int, epochs: Generator[Epoch, None, runs.Result]
) -> Generator[tuple[int, Epoch], None, runs.Result]:
    try:
        while True:
            yield seed, next(epochs)
    except StopIteration as stop:
        result: runs.Result = stop.value
        return result
    finally:
        epochs.close()


def _begun(run_id: str) -> dict[int, str]:
    """The runs that were begun, by seed."""
    return {int(run.data.tags[SEED]): run.info.run_id for run in nested_runs(run_id)}


def _summarize(
    tracked: TrackedRun, experiment: Experiment, prepared: Prepared, done: dict[int, str], promote: bool
) -> Seeds:
    known = {run.info.run_id: dict(run.data.metrics) for run in nested_runs(tracked.run_id)}
    metrics = {
        seed: {
            name: value
            for name, value in known[run_id].items()
            if name.startswith(("best_", "dev_")) and name not in _OF_AN_EPOCH
        }
        for seed, run_id in done.items()
    }
    spreads = {
        name: Spread(statistics.mean(values), statistics.stdev(values))
        for name in next(iter(metrics.values()))
        if len(values := [of_seed[name] for of_seed in metrics.values() if name in of_seed]) == len(metrics)
    }
    logged = {f"{name}_mean": spread.mean for name, spread in spreads.items()}
    logged |= {f"{name}_std": spread.deviation for name, spread in spreads.items()}
    tracked.log_metrics(logged, len(metrics), time.time_ns() // 1_000_000)
    best = min(metrics, key=lambda seed: _worth(metrics[seed], experiment))
    tracked.set_tags({"best_seed": str(best), "best_run": done[best]})
    one = experiments.replace(experiment, {"seed": best})
    bundle = run_folder.best_bundle(run_folder.CHECKPOINTS / tracked.run_id / done[best], one)
    assert bundle is not None
    version = register_bundle(tracked, one, prepared, bundle, promote)
    return Seeds(tracked.run_id, metrics, spreads, version)


def _worth(metrics: dict[str, float], experiment: Experiment) -> float:
    """Lower is better."""
    return metrics["best_dev_loss"] if experiment.registry.metric == "dev_loss" else -metrics["dev_cider"]


def check_count(count: int, experiment: Experiment) -> None:
    """Refuses a number of seeds that has no spread, or leads beyond the last seed, and an ensemble, which has its own.

    Raises:
        InputError: it does.
    """
    if experiment.is_ensemble:
        raise InputError(f"--seeds {count}: {experiment.name} is an ensemble; its seeds are those of ensemble.members")
    if count < 2:
        raise InputError(f"--seeds {count}: fewer than two seeds have no spread; give 2 or more")
    if experiment.seed + count > 2**31:
        raise InputError(f"--seeds {count}: from seed = {experiment.seed} on there are not so many; lower seed")
