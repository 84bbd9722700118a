"""A run's folder on disk: settings, checkpoints, bundle, and the lock that keeps it to one process."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from capexp.errors import InputError, Outage
from capexp.experiment import load_experiment, to_toml
from capexp.files import write_whole, writing
from capexp.settings import Experiment
from capexp.tracking.known_runs import PARENT, run_status, run_tags
from capexp.tracking.outbox import JOURNAL
from capexp.training.checkpoints import Checkpoints
from capexp.training.loop import Epoch
from capexp.training.teacher_forcing import is_done

CHECKPOINTS = Path("checkpoints")
"""Where runs have their folders, by their MLflow ids."""
STUDIES = Path("studies")
"""Where studies have their storage and their trials' folders."""
SETTINGS = "experiment.toml"
"""What a run is resumed by, in its folder."""
STUDY = "study"
"""The tag of a study's run: the study's name."""
_SELF_CRITICAL = "self-critical"  # the folder of the second phase
_SECOND_PHASE = "training.self_critical."
_ALWAYS_FREE = ("training.epochs", "training.patience", "training.save_steps", f"{_SECOND_PHASE}epochs")


@dataclass(frozen=True)
class RunFolder:
    """The folder that a run leaves on disk, named by its MLflow id."""

    path: Path

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self.path.name

    @classmethod
    def to_resume(cls, run_id: str) -> "RunFolder":
        """Return the folder of a run that ``--resume`` names; refuse what is not resumed so."""
        status, folder = run_status(run_id), cls(CHECKPOINTS / run_id)
        another_way = folder.resumed_otherwise()
        if another_way is not None:
            raise InputError(f"--resume {run_id}: {another_way}")
        if not (folder.path / SETTINGS).is_file():
            raise InputError(
                f"--resume {run_id}: the run is {status}, but {folder.path / SETTINGS} is missing; resume where it was "
                "started, or train anew"
            )
        return folder

    @classmethod
    def with_journal(cls, run_id: str) -> "RunFolder":
        """Return the folder of a run that has a journal here: a run, one of several, or a trial of a study."""
        for pattern in (CHECKPOINTS / "*", CHECKPOINTS / "*/*", STUDIES / "*/*"):
            for path in Path().glob(str(pattern / JOURNAL)):
                if path.parent.name == run_id:
                    return cls(path.parent)
        raise InputError(
            f"run {run_id}: has no {JOURNAL} under {CHECKPOINTS} or {STUDIES} here; start where it was trained"
        )

    def resumed_otherwise(self) -> str | None:
        """Return how to go on with a run that ``--resume`` does not take; None where it does."""
        tags = run_tags(self.run_id)
        if PARENT in tags:
            return f"it is one of several under run {tags[PARENT]}; go on with what started that one"
        if STUDY in tags:
            return f"it is the run of study {tags[STUDY]}; give the capexp.tune command again"
        return None

    @contextmanager
    def lock(self, is_shared: bool = False) -> Iterator[None]:
        """Lock the folder for this process, or for those that share the lock; refuse at once where that fails.

        The system releases the lock however the process ends.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
        with file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"run {self.run_id}: another process is training it; wait for it or stop it") from None
            yield

    def is_locked(self) -> bool:
        """Return whether a process is at work on the run."""
        try:
            with self.lock():
                return False
        except Outage:
            raise
        except InputError:
            return True

    def experiment(self) -> Experiment:
        """Return the settings that the run was started or last resumed with."""
        return load_experiment(self.path / SETTINGS, {})

    def write_experiment(self, experiment: Experiment) -> Path:
        """Write the settings by which the run is resumed."""
        return write_whole(self.path / SETTINGS, to_toml(experiment))

    def checkpoints(self, experiment: Experiment) -> Checkpoints:
        """Return the checkpoints of the first phase, or of all where there is one phase."""
        return Checkpoints(self.path, experiment.training.keep)

    def second_phase(self, experiment: Experiment, begins_with: int) -> Checkpoints:
        """Return the checkpoints of the self-critical phase, which begins with the captioner of that epoch."""
        return Checkpoints(self.path / _SELF_CRITICAL, experiment.training.keep, begins_with)

    def best_bundle(self, experiment: Experiment) -> Path | None:
        """Return the best captioner of the last phase so far; None where there is none."""
        last = self.path / _SELF_CRITICAL if experiment.has_second_phase else self.path
        return Checkpoints(last, experiment.training.keep).best()

    def best_so_far(self, experiment: Experiment) -> Path | None:
        """Return the best captioner of the latest phase that has one."""
        return self.best_bundle(experiment) or self.checkpoints(experiment).best()

    def is_complete(self, experiment: Experiment) -> bool:
        """Return whether a resumed run would find nothing left to do.

        Refused are settings with fewer epochs than are done, and a first phase that would go on after the second one
        has begun.
        """
        training = experiment.training
        state = self.checkpoints(experiment).latest()
        if state is None:
            return False
        self._refuse_fewer("training.epochs", training.epochs, state.epochs)
        second = self.second_phase(experiment, state.best_epoch).latest()
        more = 0 if second is None else second.epochs - state.epochs
        self._refuse_fewer(f"{_SECOND_PHASE}epochs", training.self_critical.epochs, more)
        has_ended = is_done([Epoch(**record) for record in state.history], training)
        if second is not None and not has_ended:
            raise InputError(
                f"run {self.run_id}: its self-critical phase has begun after {state.epochs} epochs; leave "
                f"training.epochs and training.patience as they were, or delete {self.path / _SELF_CRITICAL} to do "
                "without what it did"
            )
        return has_ended and more >= training.self_critical.epochs and run_status(self.run_id) == "FINISHED"

    def refuse_other_settings(self, experiment: Experiment) -> None:
        """Refuse settings that a resumed run may not change.

        The numbers of epochs may change, and the self-critical settings as long as that phase has not begun.
        """
        old, new = self.experiment().flat(), experiment.flat()
        is_begun = any(self.path.glob(f"**/{_SELF_CRITICAL}"))  # of several seeds, by any
        begins_now = experiment.has_second_phase and not is_begun
        for name in old | new:
            before, given = old.get(name, "nothing"), new.get(name, "nothing")
            if before != given and name not in _ALWAYS_FREE and not (begins_now and may_differ(name)):
                raise InputError(
                    f"--{name} {given}: the run was started with {before}; "
                    f"a resumed run may only change {', '.join(_ALWAYS_FREE)}"
                )

    def _refuse_fewer(self, setting: str, wanted: int, done: int) -> None:
        if wanted < done:
            raise InputError(f"--{setting} {wanted}: run {self.run_id} has done {done} already; give as many or more")


def may_differ(name: str) -> bool:
    """Return whether some resumed run may change a setting."""
    return name in _ALWAYS_FREE or name.startswith(_SECOND_PHASE) or name == "registry.metric"
