"""One experiment, run and tracked: from photos with captions to a registered captioner."""

import logging
import os
import random
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capexp import __version__, experiment as experiments
from capexp.captioning.captioner import Captioner, TrainingRecord
from capexp.data.cache import Features
from capexp.data.captions import Split
from capexp.data.errors import InputError
from capexp.data.features import State, encoder_at_hand, load_encoder
from capexp.experiment import Experiment
from capexp.preparation import Prepared
from capexp.scoring.evaluation import Loss, blind_cross_entropy
from capexp.search import Pruned
from capexp.tracking import registry
from capexp.tracking.registry import Score, Version
from capexp.tracking.report import Sample, draw_curves, write_gallery
from capexp.tracking.run import Input, TrackedRun, git_commit, prepare_store, run_exists, run_status, tracked_run
from capexp.training.checkpoints import Checkpoints
from capexp.training.fit import Epoch, choose_device, fit, is_finished

log = logging.getLogger(__name__)

CHECKPOINTS = Path("checkpoints")
_SETTINGS = "experiment.toml"
_SAMPLES = 24  # photos in the gallery
_DIFFERENT_ON_RESUME = ("training.epochs", "training.patience")


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_id: str
    best: Epoch
    dev_loss_blind: float | None
    """None where the run was pruned."""
    version: Version | None
    bundle: Path
    samples: tuple[Sample, ...]


def settings_of(run_id: str) -> Experiment:
    """The settings of a run of this folder that is to be resumed.

    Raises:
        InputError: the run is unknown, or has left nothing here to go on from.
    """
    status = run_status(run_id)
    path = CHECKPOINTS / run_id / _SETTINGS
    if not path.is_file():
        raise InputError(f"--resume {run_id}: the run is {status}, but {path} is missing; resume where it was started")
    return experiments.load(path, {})


def refuse_other_settings(before: Experiment, now: Experiment) -> None:
    """A resumed run keeps its settings, but for how long it trains.

    Raises:
        InputError: naming the first setting that differs.
    """
    old, new = before.flat(), now.flat()
    for name in old:
        if old[name] != new[name] and name not in _DIFFERENT_ON_RESUME:
            raise InputError(
                f"--{name} {new[name]}: the run was started with {old[name]}; "
                f"a resumed run may only change {' and '.join(_DIFFERENT_ON_RESUME)}"
            )


def run(
    experiment: Experiment,
    prepared: Prepared,
    *,
    resume: str | None = None,
    parent: str | None = None,
    folder: Path = CHECKPOINTS,
    register: bool = True,
    promote: bool = False,
) -> Generator[Epoch, None, Result]:
    """Trains, tracks and registers; yields every epoch as it is logged, and returns what came of it.

    Its checkpoints go to ``folder``, under the run's id. Thrown ``Pruned``, it ends the run in order, tagged
    ``pruned``. An interrupt ends it KILLED with the best captioner so far logged, not registered. With
    ``register=False`` (a trial of a study) the model is neither logged nor registered; its bundle stays among
    the checkpoints.
    """
    prepare_store()
    device = choose_device(experiment.training.device)
    digest = prepared.splits["dev"].digest()
    with tracked_run(experiment.name, experiment.name, resume=resume, parent=parent) as tracked:
        checkpoints = Checkpoints(folder / tracked.run_id, experiment.training.keep)
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        settings = checkpoints.folder / _SETTINGS
        settings.write_text(experiment.to_toml(), encoding="utf-8")
        with _log_file(checkpoints.folder / "log.txt", tracked):
            log.debug("capexp %s, %s, %s\n%s", __version__, prepared.encoder, device, settings.read_text())
            _log_beginning(tracked, experiment, prepared, str(device), settings)
            captioner = Captioner.fresh(
                experiment.model, prepared.vocabulary, prepared.encoder, experiment.decoding, experiment.seed
            )
            epochs: list[Epoch] = []
            try:
                for epoch in fit(
                    captioner,
                    prepared.batches("train", experiment.training.batch_size),
                    prepared.batches("dev", experiment.training.batch_size),
                    experiment.training,
                    seed=experiment.seed,
                    device=device,
                    dev_digest=digest,
                    checkpoints=checkpoints,
                ):
                    epochs.append(epoch)
                    log.debug("%s", epoch)
                    _log_epoch(tracked, epoch)
                    yield epoch
            except Pruned:
                tracked.set_tags({"pruned": "true"})
                return Result(tracked.run_id, _best(epochs), None, None, _bundle(checkpoints), ())
            except (KeyboardInterrupt, GeneratorExit):
                best = checkpoints.best()
                if register and best is not None:
                    log.info("interrupted: logging the best captioner so far, %s", best.name)
                    registry.log_captioner(Captioner.load(best), None, register_as=None)
                raise
            return _finish(tracked, experiment, prepared, checkpoints, epochs, register, promote)


def _finish(
    tracked: TrackedRun,
    experiment: Experiment,
    prepared: Prepared,
    checkpoints: Checkpoints,
    epochs: list[Epoch],
    register: bool,
    promote: bool,
) -> Result:
    """What follows the last epoch: the best captioner measured, shown and registered."""
    bundle = _bundle(checkpoints)
    device = choose_device(experiment.training.device)
    captioner = Captioner.load(bundle, device)
    dev = prepared.batches("dev", experiment.training.batch_size)
    blind = blind_cross_entropy(captioner.decoder, dev, len(prepared.splits["dev"].photos), experiment.seed)
    best = _best(epochs)
    now = time.time_ns() // 1_000_000
    tracked.log_metrics(
        {
            "best_dev_loss": best.dev_loss,
            "best_epoch": best.number,
            "dev_loss_blind": blind.per_token,
        },
        step=best.number,
        timestamp=now,
    )
    samples = caption_samples(captioner, prepared.splits["dev"], prepared.features["dev"], experiment.seed)
    tracked.log_artifact(draw_curves(epochs, experiment.name, checkpoints.folder / "loss.png"))
    tracked.log_artifact(write_gallery(samples, experiment.name, checkpoints.folder / "captions.html"))
    version = None
    if register:
        version = _register(tracked, experiment, prepared, captioner, blind.per_token, promote)
    return Result(tracked.run_id, best, blind.per_token, version, bundle, samples)


@contextmanager
def study_run(experiment: Experiment, prepared: Prepared, name: str, held: str | None) -> Iterator[TrackedRun]:
    """The run that a study's trials are nested under: the one it had, or a new one."""
    prepare_store()
    resume = held if held and "MLFLOW_RUN_ID" not in os.environ and run_exists(held) else None
    with tracked_run(name, experiment.name, resume=resume) as tracked:
        params = dict(experiments.flatten(experiment.model_dump(mode="json")))
        tracked.log_params({key: str(value) for key, value in params.items()})
        tracked.set_tags(_tags(prepared) | {"study": name, "device": experiment.training.device})
        yield tracked


def register_trial(tracked: TrackedRun, folder: Path, prepared: Prepared, promote: bool) -> Version:
    """Registers the best captioner of a trial, from its checkpoints, under the study's run."""
    experiment = experiments.load(folder / _SETTINGS, {})
    captioner = Captioner.load(_bundle(Checkpoints(folder, experiment.training.keep)))
    dev = prepared.batches("dev", experiment.training.batch_size)
    blind = blind_cross_entropy(captioner.decoder, dev, len(prepared.splits["dev"].photos), experiment.seed)
    return _register(tracked, experiment, prepared, captioner, blind.per_token, promote)


def caption_samples(captioner: Captioner, split: Split, features: Features, seed: int) -> tuple[Sample, ...]:
    """Some photos of a split drawn at random, captioned from their features."""
    count = min(_SAMPLES, len(split.photos))
    chosen = random.Random(seed).sample(range(len(split.photos)), count)
    captions = captioner.caption_features(features.gather(np.array(chosen)))
    return tuple(
        Sample(split.folder / split.photos[photo], caption.text, caption.log_probability, split.references[photo])
        for photo, caption in zip(chosen, captions, strict=True)
    )


def _register(
    tracked: TrackedRun,
    experiment: Experiment,
    prepared: Prepared,
    captioner: Captioner,
    blind: float,
    promote: bool,
) -> Version:
    assert captioner.training is not None
    name = experiment.registry.model
    number = registry.registered_version(name, tracked.run_id)
    if number is None:
        number = registry.log_captioner(captioner, _encoder_weights(experiment), register_as=name)
        assert number is not None
    score = Score(
        experiment.registry.metric,
        captioner.training.dev_loss,
        prepared.splits["dev"].digest(),
        prepared.vocabulary.digest(),
    )
    card = _card(experiment, prepared, captioner.training, blind)
    tags = score.tags() | {"experiment": experiment.name, "git_commit": git_commit()}
    registry.describe_version(name, number, card, tags)
    version = registry.crown(name, number, score, force=promote)
    log.debug("registered %s", version.describe())
    tracked.set_tags({"registered_version": f"{name}/{number}", "champion": f"{version.champion}: {version.reason}"})
    return version


def _encoder_weights(experiment: Experiment) -> State | None:
    """The layers of VGG16 that the captioner needs, where they are at hand: nothing is fetched for this."""
    if not encoder_at_hand(experiment.features):
        return None
    return load_encoder(experiment.features).weights()


def _log_beginning(
    tracked: TrackedRun, experiment: Experiment, prepared: Prepared, device: str, settings: Path
) -> None:
    tracked.log_params(experiment.flat() | {"decoder_parameters": str(prepared.decoder_parameters)})
    tracked.set_tags(_tags(prepared) | {"device": device})
    digests = {name: split.digest() for name, split in prepared.splits.items()}
    lists = experiment.captions
    tracked.log_inputs(
        [
            Input(f"{experiment.name}-train", "training", lists.list_of("train"), digests["train"]),
            Input(f"{experiment.name}-dev", "validation", lists.list_of("dev"), digests["dev"]),
        ]
    )
    tracked.log_artifact(settings)


def _tags(prepared: Prepared) -> dict[str, str]:
    return {
        "git_commit": git_commit(),
        "data_digest": prepared.data_digest(),
        "vocabulary_digest": prepared.vocabulary.digest(),
        "encoder": str(prepared.encoder),
        "capexp_version": __version__,
    }


def _log_epoch(tracked: TrackedRun, epoch: Epoch) -> None:
    metrics = {
        "train_loss": epoch.train_loss,
        "dev_loss": epoch.dev_loss,
        "dev_perplexity": Loss(epoch.dev_loss, 1).perplexity,
        "learning_rate": epoch.learning_rate,
        "epoch_seconds": epoch.seconds,
        "tokens_per_second": epoch.tokens_per_second,
    }
    tracked.log_metrics(metrics, step=epoch.number, timestamp=epoch.ended_at)


def _card(experiment: Experiment, prepared: Prepared, best: TrainingRecord, blind: float) -> str:
    train, dev = prepared.splits["train"], prepared.splits["dev"]
    perplexity = Loss(best.dev_loss, 1).perplexity
    captions = sum(map(len, train.references))
    rows = {
        "dev loss": f"{best.dev_loss:.4f} nats per token (perplexity {perplexity:.2f}), epoch {best.epoch}",
        "dev loss, photos shuffled": f"{blind:.4f}",
        "train loss": f"{best.train_loss:.4f} (dropout on)",
        "trained on": f"{len(train.photos)} photos, {captions} captions of `{experiment.captions.root.name}`",
        "measured on": f"{len(dev.photos)} dev photos; the test split was not read",
        "vocabulary": f"{len(prepared.vocabulary)} entries, cleaning `{experiment.vocabulary.cleaning}`",
        "parameters": f"{prepared.decoder_parameters:,} trainable",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""**{experiment.name}**: {experiment.model.decoder} decoder on {prepared.encoder}.

| | |
| --- | --- |
{table}

All settings are the params of the run, and `experiment.toml` among its artifacts.
Load it with `mlflow.pyfunc.load_model("models:/{experiment.registry.model}@champion")`.
"""


def _best(epochs: list[Epoch]) -> Epoch:
    return min(epochs, key=lambda epoch: epoch.dev_loss)


def _bundle(checkpoints: Checkpoints) -> Path:
    bundle = checkpoints.best()
    assert bundle is not None, f"{checkpoints.folder}: no epoch has improved"
    return bundle


@contextmanager
def _log_file(path: Path, tracked: TrackedRun) -> Iterator[None]:
    """Copies the project's log to a file beside the checkpoints, and keeps it with the run however it ends."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("capexp")
    root.addHandler(handler)
    try:
        yield
    except Exception:
        log.error("the run has failed", exc_info=True)
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
        tracked.log_artifact(path)


def is_complete(run_id: str, experiment: Experiment) -> bool:
    """Whether a resumed run would find nothing left to do."""
    state = Checkpoints(CHECKPOINTS / run_id, experiment.training.keep).latest()
    if state is None or run_status(run_id) != "FINISHED":
        return False
    return is_finished([Epoch(**record) for record in state.history], experiment.training)
