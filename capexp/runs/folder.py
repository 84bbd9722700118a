"""A run's folder on disk: its settings, checkpoints and bundles, and the lock that excludes other processes."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from capexp.data.caption_files import read_list
from capexp.data.captions import SPLITS, PhotosBySplit
from capexp.errors import InputError, Outage
from capexp.experiment import load_recorded, to_toml
from capexp.files import write_whole, writing
from capexp.settings import Experiment, SplitName
from capexp.tracking.known_runs import PARENT, run_status, run_tags
from capexp.tracking.outbox import JOURNAL
from capexp.training.checkpoints import Checkpoints
from capexp.training.loop import Epoch
from capexp.training.teacher_forcing import is_done

CHECKPOINTS = Path("checkpoints")
"""The folder that contains the folders of runs, named by their MLflow ids."""
STUDIES = Path("studies")
"""The folder that contains the storage of studies and the folders of their trials."""
SETTINGS = "experiment.toml"
"""The file in a run's folder that holds the settings of the run. A run without it cannot be resumed."""
STUDY = "study"
"""The tag of a study's run; its value is the study's name."""
_SELF_CRITICAL = "self-critical"  # the folder of the self-critical phase's checkpoints, inside the run's folder
_SECOND_PHASE = "training.self_critical."  # the prefix of the self-critical phase's settings
# Settings that every resumed run may change.
_ALWAYS_FREE = ("training.epochs", "training.patience", "training.save_steps", f"{_SECOND_PHASE}epochs")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, named by its MLflow id."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's id in MLflow."""
        return self.path.name

    @classmethod
    def to_resume(cls, run_id: str) -> "RunFolder":
        """Return the folder of the run that ``--resume`` names.

        Raise InputError if there is no such run, if its folder is not on this machine, or if the run belongs to a group
        of runs or a study, which must be resumed instead.
        """
        status, folder = run_status(run_id), cls(CHECKPOINTS / run_id)
        instead = folder.resumed_otherwise()
        if instead is not None:
            raise InputError(f"--resume {run_id}: {instead}")
        if not (folder.path / SETTINGS).is_file():
            raise InputError(
                f"--resume {run_id}: the run is {status}, but {folder.path / SETTINGS} is missing; resume where it was "
                "started, or start a new run"
            )
        return folder

    @classmethod
    def with_journal(cls, run_id: str) -> "RunFolder":
        """Return the folder of a run that has a journal under ``CHECKPOINTS`` or ``STUDIES``.

        The run may be a single one, one of several seeds, or a trial of a study.
        """
        for pattern in (CHECKPOINTS / "*", CHECKPOINTS / "*/*", STUDIES / "*/*"):
            for path in Path().glob(str(pattern / JOURNAL)):
                if path.parent.name == run_id:
                    return cls(path.parent)
        raise InputError(
            f"run {run_id}: has no {JOURNAL} under {CHECKPOINTS} or {STUDIES} in this folder; "
            "start where it was trained"
        )

    def resumed_otherwise(self) -> str | None:
        """Return why ``--resume`` does not accept the run, and what to resume instead; None if it accepts the run."""
        tags = run_tags(self.run_id)
        if PARENT in tags:
            return f"it is one of several under run {tags[PARENT]}; resume that run instead"
        if STUDY in tags:
            return f"it is the run of study {tags[STUDY]}; give the capexp.tune command again"
        return None

    @contextmanager
    def lock(self, is_shared: bool = False) -> Iterator[None]:
        """Hold the lock of the folder inside the block; create the folder if it does not exist.

        A shared lock excludes only processes whose lock is not shared. Raise InputError at once if another process
        holds the lock. The operating system releases the lock when the process ends, even if it is killed.
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
        """Return whether a process holds the lock of the folder; create the folder if it does not exist."""
        try:
            with self.lock():
                return False
        except Outage:
            raise
        except InputError:
            return True

    def experiment(self) -> Experiment:
        """Return the settings that the run was started or last resumed with."""
        return load_recorded(self.path / SETTINGS)

    def write_experiment(self, experiment: Experiment) -> Path:
        """Write the settings file, from which the run can be resumed."""
        return write_whole(self.path / SETTINGS, to_toml(experiment))

    def write_splits(self, splits: PhotosBySplit) -> list[Path]:
        """Write a list of photos for each split, in the format of ``captions.train``; return the files."""
        files = []
        for name, photos in splits.items():
            if not photos:
                continue
            path = self.path / "splits" / f"{name}.txt"
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            files.append(write_whole(path, "".join(f"{photo}\n" for photo in photos)))
        return files

    def splits(self) -> PhotosBySplit | None:
        """Return the photos of each random split of the run; None if the run has no random splits."""
        files = sorted((self.path / "splits").glob("*.txt"))
        drawn: dict[SplitName, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
        for name in SPLITS:
            path = self.path / "splits" / f"{name}.txt"
            if path.is_file():
                drawn[name] = read_list(path)
        return drawn if files else None

    def checkpoints(self, experiment: Experiment) -> Checkpoints:
        """Return the checkpoints of the first phase: training with cross-entropy."""
        return Checkpoints(self.path, experiment.training.keep)

    def second_phase(self, experiment: Experiment, begins_with: int) -> Checkpoints:
        """Return the checkpoints of the self-critical phase, which starts with epoch ``begins_with``'s captioner."""
        return Checkpoints(self.path / _SELF_CRITICAL, experiment.training.keep, begins_with)

    def best_bundle(self, experiment: Experiment) -> Path | None:
        """Return the bundle of the last configured phase's best captioner; None if that phase has saved none yet."""
        folder = self.path / _SELF_CRITICAL if experiment.has_second_phase else self.path
        return Checkpoints(folder, experiment.training.keep).best()

    def best_so_far(self, experiment: Experiment) -> Path | None:
        """Return the bundle of the best captioner of the latest phase that has saved one; None if there is none."""
        return self.best_bundle(experiment) or self.checkpoints(experiment).best()

    def is_complete(self, experiment: Experiment) -> bool:
        """Return whether the run has nothing left to do if it is resumed with these settings.

        Raise InputError if the settings have fewer epochs than are done, or if they would continue the first phase
        although the second one has begun.
        """
        training = experiment.training
        state = self.checkpoints(experiment).latest()
        if state is None:
            return False
        self._refuse_fewer("training.epochs", training.epochs, state.epochs)
        second = self.second_phase(experiment, state.best_epoch).latest()
        second_epochs = 0 if second is None else second.epochs - state.epochs
        self._refuse_fewer(f"{_SECOND_PHASE}epochs", training.self_critical.epochs, second_epochs)
        has_ended = is_done([Epoch(**record) for record in state.history], training)
        if second is not None and not has_ended:
            raise InputError(
                f"run {self.run_id}: its self-critical phase has begun after {state.epochs} epochs; leave "
                f"training.epochs and training.patience as they were, or delete {self.path / _SELF_CRITICAL} to do "
                "without what it did"
            )
        return has_ended and second_epochs >= training.self_critical.epochs and run_status(self.run_id) == "FINISHED"

    def refuse_other_settings(self, experiment: Experiment) -> None:
        """Raise InputError if these settings differ from the run's in one that a resumed run may not change.

        The numbers of epochs, ``training.patience`` and ``training.save_steps`` may always change. The settings of the
        self-critical phase, and ``registry.metric``, may change if the resumed run will begin that phase.
        """
        old, new = self.experiment().flat(), experiment.flat()
        has_begun = any(self.path.glob(f"**/{_SELF_CRITICAL}"))  # with several seeds: in any of their folders
        begins_now = experiment.has_second_phase and not has_begun
        for name in old | new:
            old_value, new_value = old.get(name, "nothing"), new.get(name, "nothing")
            if old_value != new_value and name not in _ALWAYS_FREE and not (begins_now and may_differ(name)):
                raise InputError(
                    f"--{name} {new_value}: the run was started with {old_value}; "
                    f"a resumed run may only change {', '.join(_ALWAYS_FREE)}"
                )

    def _refuse_fewer(self, setting: str, wanted: int, done: int) -> None:
        """Raise InputError if a setting has fewer epochs than are done."""
        if wanted < done:
            raise InputError(f"--{setting} {wanted}: run {self.run_id} has done {done} already; give as many or more")


def may_differ(name: str) -> bool:
    """Return whether a resumed run may change a setting, always or before its self-critical phase begins."""
    return name in _ALWAYS_FREE or name.startswith(_SECOND_PHASE) or name == "registry.metric"
