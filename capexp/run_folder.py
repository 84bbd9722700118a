"""A run's folder: what it leaves there, whether it may be gone on with, and by which process."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from capexp import __version__, experiment as experiments
from capexp.data.errors import InputError
from capexp.data.files import writing
from capexp.experiment import Experiment
from capexp.preparation import Prepared
from capexp.tracking.journal import JOURNAL
from capexp.tracking.run import PARENT, TrackedRun, adopted_run, git_commit, run_status, run_tags, tracked_run
from capexp.training.checkpoints import Checkpoints
from capexp.training.epoch import Epoch
from capexp.training.fit import is_finished

CHECKPOINTS = Path("checkpoints")
SETTINGS = "experiment.toml"
"""What a run is resumed by, among its checkpoints."""
_VERSION = "capexp_version"  # the tag that each run of this project has from its beginning
_SELF_CRITICAL = "self-critical"  # the folder of the second phase
_SECOND_PHASE = "training.self_critical."
_ALWAYS_FREE = ("training.epochs", "training.patience", "training.save_steps", f"{_SECOND_PHASE}epochs")


def settings_of(run_id: str) -> Experiment:
    """The settings of a run of this folder that is to be resumed.

    Raises:
        InputError: the run is unknown, or has left nothing here to go on from.
    """
    status = run_status(run_id)
    path = CHECKPOINTS / run_id / SETTINGS
    above = run_tags(run_id).get(PARENT)
    if above is not None:
        raise InputError(f"--resume {run_id}: it is one of several under run {above}; go on with what started that one")
    if not path.is_file():
        raise InputError(
            f"--resume {run_id}: the run is {status}, but {path} is missing; resume where it was started, or train anew"
        )
    return experiments.load(path, {})


def may_differ(name: str) -> bool:
    """Whether there are resumed runs that may change a setting."""
    return name in _ALWAYS_FREE or name.startswith(_SECOND_PHASE) or name == "registry.metric"


def refuse_other_settings(run_id: str, before: Experiment, now: Experiment) -> None:
    """A resumed run keeps its settings, but for how long it trains, and for those of a phase that it begins only now.

    Raises:
        InputError: naming the first setting that differs.
    """
    old, new = before.flat(), now.flat()
    is_begun = any((CHECKPOINTS / run_id).glob(f"**/{_SELF_CRITICAL}"))  # of several seeds, by any
    free = {
        name for name in new if name in _ALWAYS_FREE or (may_differ(name) and has_second_phase(now) and not is_begun)
    }
    for name in old | new:
        held, given = old.get(name, "nothing"), new.get(name, "nothing")
        if held != given and name not in free:
            raise InputError(
                f"--{name} {given}: the run was started with {held}; "
                f"a resumed run may only change {', '.join(_ALWAYS_FREE)}"
            )


def tags_of(prepared: Prepared) -> dict[str, str]:
    """What was trained on, and by which code, as tags of a run."""
    return {
        "git_commit": git_commit(),
        "data_digest": prepared.data_digest(),
        "vocabulary_digest": prepared.vocabulary.digest(),
        "encoder": str(prepared.encoder),
        "encoder_key": prepared.encoder.key(),
        _VERSION: __version__,
    }


def has_second_phase(experiment: Experiment) -> bool:
    """Whether self-critical training follows."""
    return experiment.training.self_critical.epochs > 0


def phases(experiment: Experiment) -> int:
    """How many phases a run has, each with checkpoints of its own."""
    return 1 + has_second_phase(experiment)


def second_phase(first: Checkpoints, experiment: Experiment, begins_with: int) -> Checkpoints:
    """The checkpoints of the self-critical phase, which leaves those of the first as they are."""
    folder = first.folder / _SELF_CRITICAL
    with writing(folder):
        folder.mkdir(exist_ok=True)
    second = Checkpoints(folder, experiment.training.keep, begins_with)
    second.clear_parts()
    return second


def best_bundle(folder: Path, experiment: Experiment) -> Path | None:
    """The bundle of the best epoch among a finished run's checkpoints, of its last phase; None where there is none."""
    last = folder / _SELF_CRITICAL if has_second_phase(experiment) else folder
    return Checkpoints(last, experiment.training.keep).best()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run's checkpoints for one process; the system lets go of them however that ends."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"run {folder.name}: another process is training it; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked_run(
    name: str,
    experiment: str,
    folder: Path,
    *,
    resume: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """Open a run as :func:`capexp.tracking.run.tracked_run` does, and lock its folder for this process.

    A run that exists already, because it is resumed or ``mlflow run`` has made it, is locked before MLflow opens it:
    where another process is training it, nothing of the run or its journal changes.
    """
    existing = resume or adopted_run()
    with ExitStack() as stack:
        if existing is not None:
            stack.enter_context(alone(folder / existing))
            if resume is None and (folder / existing / JOURNAL).exists():
                _refuse_adopted(existing)  # another process has trained it since it was asked
        tracked = stack.enter_context(tracked_run(name, experiment, folder, resume=resume, parent=parent, tags=tags))
        if existing is None:
            stack.enter_context(alone(folder / tracked.run_id))
        yield tracked


def is_training(folder: Path) -> bool:
    """Whether a process is at work on the run with these checkpoints."""
    try:
        with alone(folder):
            return False
    except InputError:
        return True


def refuse_trained(folder: Path) -> None:
    """Refuse to adopt a run, by ``MLFLOW_RUN_ID``, that was trained already, in this folder or elsewhere."""
    adopted = adopted_run()
    if adopted is None:
        return
    run_status(adopted)  # refuses an unknown one
    if (folder / adopted).exists() or _VERSION in run_tags(adopted):
        _refuse_adopted(adopted)


def _refuse_adopted(run_id: str) -> NoReturn:
    raise InputError(f"MLFLOW_RUN_ID={run_id}: was trained already; unset it, or give --resume {run_id}")


def refuse_other_data(run_id: str, prepared: Prepared) -> None:
    """A resumed run must find the data, the words and the encoder that it was started with."""
    held, now = run_tags(run_id), tags_of(prepared)
    for name in ("data_digest", "vocabulary_digest", "encoder_key"):
        if name in held and held[name] != now[name]:
            raise InputError(
                f"--resume {run_id}: {name} is {now[name][:12]}, the run was started with {held[name][:12]}; "
                "photos, captions, lists or weights have changed: restore them, or start a new run"
            )


def is_complete(run_id: str, experiment: Experiment, folder: Path = CHECKPOINTS) -> bool:
    """Whether a resumed run would find nothing left to do.

    Raises:
        InputError: it has done more epochs than the experiment has, or would go on with its first phase after the
            second has begun.
    """
    training = experiment.training
    state = Checkpoints(folder / run_id, training.keep).latest()
    if state is None:
        return False
    _refuse_fewer("training.epochs", training.epochs, state.epochs, run_id)
    second = Checkpoints(folder / run_id / _SELF_CRITICAL, training.keep, begins_with=state.best_epoch).latest()
    more = 0 if second is None else second.epochs - state.epochs
    _refuse_fewer(f"{_SECOND_PHASE}epochs", training.self_critical.epochs, more, run_id)
    has_ended = is_finished([Epoch(**record) for record in state.history], training)
    if second is not None and not has_ended:
        raise InputError(
            f"run {run_id}: its self-critical phase has begun after {state.epochs} epochs; leave training.epochs and "
            f"training.patience as they were, or delete {folder / run_id / _SELF_CRITICAL} to do without what it did"
        )
    return has_ended and more >= training.self_critical.epochs and run_status(run_id) == "FINISHED"


def _refuse_fewer(setting: str, wanted: int, done: int, run_id: str) -> None:
    if wanted < done:
        raise InputError(f"--{setting} {wanted}: run {run_id} has done {done} already; give as many or more")
