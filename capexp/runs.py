"""One experiment, run and tracked: from photos with captions to a registered captioner."""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from capexp import __version__
from capexp.captioning.captioner import Captioner
from capexp.data.errors import Unsent
from capexp.data.files import write_whole, writing
from capexp.experiment import Experiment
from capexp.preparation import Prepared
from capexp.registration import encoder_weights, keep, register
from capexp.report import report
from capexp.run_folder import (
    CHECKPOINTS,
    SETTINGS,
    has_second_phase,
    locked_run,
    may_differ,
    phases,
    refuse_other_data,
    refuse_trained,
    second_phase,
    tags_of,
)
from capexp.scoring.evaluation import perplexity
from capexp.search.trial import Pruned
from capexp.tracking.gallery import Card
from capexp.tracking.plots import draw_losses
from capexp.tracking.registry import Version
from capexp.tracking.run import Input, TrackedRun
from capexp.tracking.store import discreet, prepare_store, store_faults
from capexp.training.checkpoints import Checkpoints, refuse_cramped
from capexp.training.config import choose_device
from capexp.training.epoch import Epoch
from capexp.training.fit import fit
from capexp.training.ranks import ALONE, Ranks
from capexp.training.self_critical import refine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_id: str
    best: Epoch
    dev_loss_blind: float | None
    """None where the run was pruned."""
    version: Version | None
    bundle: Path
    samples: tuple[Card, ...]
    """Photos of the dev split, drawn at random."""


def run(
    experiment: Experiment,
    prepared: Prepared,
    *,
    resume: str | None = None,
    parent: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    folder: Path = CHECKPOINTS,
    register_model: bool = True,
    promote: bool = False,
    ranks: Ranks = ALONE,
) -> Generator[Epoch, None, Result]:
    """Trains, tracks and registers; yields every epoch as it is logged, and returns what came of it.

    The run has the experiment's name, or ``name`` and ``tags`` where it is one of several, nested under ``parent``.
    Its checkpoints go to ``folder``, under the run's id. Thrown ``Pruned``, it ends the run in order, tagged
    ``pruned``. An interrupt ends it KILLED with the best captioner so far logged, not registered. With
    ``register_model=False`` (a trial of a study, nested under ``parent`` and tagged with its number) the model is
    neither logged nor registered; its bundle stays among the checkpoints. Of several processes the first calls
    this, and the others :func:`follow`.
    """
    device = choose_device(experiment.training.device)
    encoder = encoder_weights(experiment) if register_model else None
    refuse_cramped(folder, prepared.decoder_parameters, experiment.training.keep, phases(experiment))
    prepare_store()
    with ExitStack() as stack:
        stack.enter_context(store_faults())
        if resume is None:
            refuse_trained(folder)
        else:
            refuse_other_data(resume, prepared)
        tracked = stack.enter_context(
            locked_run(name or experiment.name, experiment.name, folder, resume=resume, parent=parent, tags=tags)
        )
        checkpoints = Checkpoints(folder / tracked.run_id, experiment.training.keep)
        if resume is not None:
            checkpoints.clear_parts()
        settings = write_whole(checkpoints.folder / SETTINGS, experiment.to_toml())  # what a run is resumed by
        with log_file(checkpoints.folder / "log.txt", tracked):
            log.debug("capexp %s, %s, %s\n%s", __version__, prepared.encoder, device, experiment.to_toml())
            log_beginning(tracked, experiment, prepared, str(device), settings)
            if resume is not None:
                now = experiment.flat()
                tracked.set_tags({f"resumed.{name}": now[name] for name in now if may_differ(name)})
            captioner = _fresh(experiment, prepared)
            epochs: list[Epoch] = []
            try:
                first = _first(captioner, experiment, prepared, device, checkpoints, ranks)
                yield from _logged(first, tracked, epochs)
                if has_second_phase(experiment):
                    captioner = Captioner.load(_bundle(checkpoints), device)
                    checkpoints = second_phase(checkpoints, experiment, _best(epochs).number)
                    second = _second(captioner, experiment, prepared, device, checkpoints, epochs, ranks)
                    yield from _logged(second, tracked, epochs)
                ranks.leave()
                best = _best(epochs)
                tracked.log_artifact(draw_losses(epochs, experiment.name, checkpoints.folder / "loss.png"))
                came_to = {"best_dev_loss": best.dev_loss, "best_epoch": float(best.number)}
                captioner = Captioner.load(_bundle(checkpoints), device)
                measured, samples = report(tracked, experiment, prepared, captioner, came_to, checkpoints.folder)
            except Pruned:
                tracked.set_tags({"pruned": "true"})
                return Result(tracked.run_id, _best(epochs), None, None, _bundle(checkpoints), ())
            except (KeyboardInterrupt, GeneratorExit):
                held = checkpoints.best()
                if register_model and held is not None:
                    log.info("interrupted: logging the best captioner so far, %s", held.name)
                    keep(tracked, Captioner.load(held), encoder)
                raise
            bundle = _bundle(checkpoints)
            version = None
            if register_model:
                best_captioner = Captioner.load(bundle)
                version = register(tracked, experiment, prepared, best_captioner, measured, promote, encoder)
            return Result(tracked.run_id, best, measured.blind.per_token, version, bundle, samples)


def follow(experiment: Experiment, prepared: Prepared, ranks: Ranks) -> None:
    """What each of several processes but the first does in a run: its share of the training."""
    device = choose_device(experiment.training.device)
    nothing = Checkpoints(Path(), experiment.training.keep)  # those of the first one count
    captioner = _fresh(experiment, prepared)
    epochs = list(_first(captioner, experiment, prepared, device, nothing, ranks))
    if has_second_phase(experiment):
        deque(_second(captioner, experiment, prepared, device, nothing, epochs, ranks), 0)
    ranks.leave()


def _fresh(experiment: Experiment, prepared: Prepared) -> Captioner:
    return Captioner.fresh(
        experiment.model, prepared.vocabulary, prepared.encoder, experiment.decoding, experiment.seed
    )


def _first(
    captioner: Captioner,
    experiment: Experiment,
    prepared: Prepared,
    device: torch.device,
    checkpoints: Checkpoints,
    ranks: Ranks,
) -> Generator[Epoch, None, None]:
    return fit(
        captioner,
        prepared.batches("train", experiment.training),
        prepared.batches("dev", experiment.training),
        experiment.training,
        seed=experiment.seed,
        device=device,
        dev_digest=prepared.splits["dev"].digest(),
        checkpoints=checkpoints,
        ranks=ranks,
    )


def _second(
    captioner: Captioner,
    experiment: Experiment,
    prepared: Prepared,
    device: torch.device,
    checkpoints: Checkpoints,
    before: Sequence[Epoch],
    ranks: Ranks,
) -> Generator[Epoch, None, None]:
    return refine(
        captioner,
        (prepared.splits["train"], prepared.features["train"]),
        (prepared.splits["dev"], prepared.features["dev"]),
        prepared.batches("train", experiment.training),
        prepared.batches("dev", experiment.training),
        experiment.training,
        before=tuple(before),
        seed=experiment.seed,
        device=device,
        dev_digest=prepared.splits["dev"].digest(),
        checkpoints=checkpoints,
        ranks=ranks,
    )


def log_beginning(tracked: TrackedRun, experiment: Experiment, prepared: Prepared, device: str, settings: Path) -> None:
    """Logs all that decides a run: settings, what it is trained or measured on, by which code and where."""
    tracked.log_params(experiment.flat() | {"decoder_parameters": str(prepared.decoder_parameters)})
    tracked.set_tags(tags_of(prepared) | {"device": device})
    digests = {name: split.digest() for name, split in prepared.splits.items()}
    lists = experiment.captions
    tracked.log_inputs(
        [
            Input(f"{experiment.name}-train", "training", lists.list_of("train"), digests["train"]),
            Input(f"{experiment.name}-dev", "validation", lists.list_of("dev"), digests["dev"]),
        ]
    )
    tracked.log_artifact(settings)


def _logged(phase: Iterator[Epoch], tracked: TrackedRun, epochs: list[Epoch]) -> Generator[Epoch, None, None]:
    """The epochs of a phase, each logged and kept."""
    for epoch in phase:
        epochs.append(epoch)
        log.debug("%s", epoch)
        _log_epoch(tracked, epoch)
        yield epoch


def _log_epoch(tracked: TrackedRun, epoch: Epoch) -> None:
    metrics = {
        "train_loss": epoch.train_loss,
        "dev_loss": epoch.dev_loss,
        "dev_perplexity": perplexity(epoch.dev_loss),
        "learning_rate": epoch.learning_rate,
        "epoch_seconds": epoch.seconds,
        "tokens_per_second": epoch.tokens_per_second,
    }
    if epoch.reward is not None and epoch.dev_cider is not None:
        metrics |= {"reward": epoch.reward, "epoch_dev_cider": epoch.dev_cider}
    tracked.log_metrics(metrics, step=epoch.number, timestamp=epoch.ended_at)


def _best(epochs: list[Epoch]) -> Epoch:
    """The last improvement: by dev loss, or in the self-critical phase by dev CIDEr."""
    return [epoch for epoch in epochs if epoch.improved][-1]


def _bundle(checkpoints: Checkpoints) -> Path:
    bundle = checkpoints.best()
    assert bundle is not None, f"{checkpoints.folder}: no epoch has improved"
    return bundle


class _Discreet(logging.Formatter):
    """Keeps the password of a tracking server out of what is logged: its errors quote the address."""

    def format(self, record: logging.LogRecord) -> str:
        return discreet(super().format(record))


@contextmanager
def log_file(path: Path, tracked: TrackedRun) -> Iterator[None]:
    """Copies the project's log to a file beside the checkpoints, and keeps it with the run however it ends."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Discreet("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("capexp")
    root.addHandler(handler)
    try:
        yield
    except Unsent:
        raise
    except Exception:
        log.debug("the run has failed", exc_info=True)  # to the file alone: the command tells the user
        raise
    finally:
        root.removeHandler(handler)
        with writing(path):
            handler.close()
        tracked.log_artifact(path)
