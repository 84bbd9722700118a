"""Checkpoints on disk: the best captioners, and the training states to resume from."""

import io
import logging
import os
import re
import shutil
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capexp.captioning.bundle import verify_bundle
from capexp.captioning.captioner import Captioner
from capexp.errors import InputError
from capexp.files import sync, writing
from capexp.settings import TrainingConfig

log = logging.getLogger(__name__)

_LAST, _PREVIOUS = "last.pt", "previous.pt"
_NAME = re.compile(r"ep(\d{3,})-train[\d.]+-dev[\d.]+")


@dataclass(frozen=True)
class EpochProgress:
    """The progress within an epoch."""

    steps: int = 0
    """The number of steps done."""
    sums: tuple[float, ...] = ()
    """Sums over these steps: loss in nats, targets; in the self-critical phase also rewards and captions."""
    seconds: float = 0.0
    """The seconds spent on these steps."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that is needed to resume a training.

    The states of random generators are not needed: they follow from seed, epoch and step.
    """

    decoder: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    """The finished epochs, as dictionaries."""
    average: dict[str, Any] | None = None
    """The EMA of the decoder's weights, if the training has one."""
    progress: EpochProgress = EpochProgress()
    """The progress within the epoch after the finished ones."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "TrainingState":
        """Return the state of a ``dataclasses.asdict`` record. Earlier versions of the project saved no progress."""
        return cls(**record | {"progress": EpochProgress(**record.get("progress", {}))})

    @property
    def epochs(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The last epoch that was an improvement; 0 if none was."""
        return max((record["number"] for record in self.history if record["improved"]), default=0)


class Checkpoints:
    """The folder of one training phase: the states ``last.pt`` and ``previous.pt``, and bundles of captioners.

    The name of a bundle is like ``ep003-train3.245-dev3.612``. States are saved after each epoch, and within a long
    one.

    All files are written to a temporary name, synced and renamed. The captioner of an improvement is saved first, then
    the state that refers to it. Only then are older captioners deleted. So for both states the captioner of the best
    epoch is on disk, even if the process is killed at any time.
    """

    def __init__(self, folder: Path, keep: int, begins_with: int = 1) -> None:
        """``keep`` is the number of newest captioners to keep.

        ``begins_with`` is the epoch of the first captioner saved here. If the process is killed before it saves a
        state, only this captioner is on disk.
        """
        self.folder = folder
        self.keep = keep
        self.begins_with = begins_with

    def best(self) -> Path | None:
        """Return the bundle of the best epoch so far, which is the last one because only improvements are saved."""
        bundles = self._numbered()
        return bundles[-1][1] if bundles else None

    def save_captioner(self, captioner: Captioner) -> Path:
        """Save the captioner of an improvement; its name contains the epoch and its losses in nats per token."""
        record = captioner.record
        assert record is not None
        name = f"ep{record.epoch:03d}-train{record.train_loss:.3f}-dev{record.dev_loss:.3f}"
        return captioner.save(self.folder / name)

    def save_state(self, state: TrainingState) -> None:
        """Save the state to resume from, keep the one before it, and delete old captioners that neither state needs."""
        part = self.folder / f".{_LAST}.{os.getpid()}.part"
        content = io.BytesIO()
        torch.save(asdict(state), content)  # to memory first: torch would hide the cause of a disk error
        try:
            with writing(self.folder / _LAST):
                with part.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                last = self.folder / _LAST
                if last.exists():
                    last.replace(self.folder / _PREVIOUS)
                part.replace(last)
                sync(self.folder)
        finally:
            part.unlink(missing_ok=True)
        numbers = [number for number, _ in self._numbered()]
        kept = {*numbers[-self.keep :], *[number for number in numbers if number < state.epochs][-1:]}
        for number, bundle in self._numbered():
            if number not in kept:
                shutil.rmtree(bundle)

    def clear_parts(self) -> None:
        """Delete the incomplete files of a killed process. Only call it while holding the run's lock."""
        for part in self.folder.glob(".*.part"):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()

    def latest(self) -> TrainingState | None:
        """Return the newest state that is intact and has its captioner; None if nothing was saved yet.

        Change nothing on disk. Raise InputError if states were saved but none of them is usable.
        """
        return self._choose()[0]

    def go_back(self) -> TrainingState | None:
        """Return the state of :meth:`latest`, and delete all newer states and captioners.

        Log a warning for each state that is not usable. Only call it while holding the run's lock.
        """
        state, problems = self._choose()
        for problem in problems:
            log.warning("%s; passed over", problem)
        if state is not None and problems:
            (self.folder / _LAST).unlink()  # otherwise the next save would replace the intact state by this one
        for number, bundle in self._numbered():
            if state is None or number > state.epochs:
                shutil.rmtree(bundle)
        return state

    def _choose(self) -> tuple[TrainingState | None, list[str]]:
        """Return the state to resume from, and the problems of newer states."""
        paths = [path for path in (self.folder / _LAST, self.folder / _PREVIOUS) if path.is_file()]
        bundles = dict(self._numbered())
        problems: list[str] = []
        for path in paths:
            try:
                state = _read_state(path)
            except InputError as error:
                problems.append(str(error))
                continue
            if state.best_epoch == 0:  # saved within the first epoch: there is no captioner yet
                return state, problems
            if state.best_epoch not in bundles:
                problems.append(f"{path}: its captioner (ep{state.best_epoch:03d}...) is missing")
                continue
            try:
                verify_bundle(bundles[state.best_epoch])
            except InputError as error:
                problems.append(f"{path}: its captioner is damaged ({error})")
                continue
            return state, problems
        if not paths and bundles.keys() - {self.begins_with}:
            problems.append(f"{_LAST} is missing")
        if problems:
            raise InputError(
                f"{self.folder}: no state to resume from ({'; '.join(problems)}); restore it, or start a new run"
            )
        return None, []

    def _numbered(self) -> list[tuple[int, Path]]:
        """Return the bundles with their epochs, sorted by epoch."""
        return sorted(
            (int(match[1]), path) for path in self.folder.glob("ep*") if (match := _NAME.fullmatch(path.name))
        )


def check_disk_space(folder: Path, parameters: int, config: TrainingConfig, extra: int = 0, runs: int = 1) -> None:
    """Create the folder of all runs; raise InputError if there is not enough space on its disk.

    ``parameters`` is the number of the decoder's parameters, ``extra`` the bytes that a bundle holds beside them, and
    ``runs`` the number of runs that are to be trained.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    # All in float32. Bundles: ``keep``, the one of the previous state, the next one and the logged one. States: two and
    # the next one, each with the weights, Adam's two moments and an EMA of the weights.
    phases = 1 + (config.self_critical.epochs > 0)
    bundles, states = config.keep + 3, 3 * 4
    need = (4 * parameters * (bundles + states) + extra * bundles) * phases * runs + 2**20
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder.absolute()}: {free / 2**20:,.0f} MiB are free, a run needs about {need / 2**20:,.0f}; free space"
        )


def _read_state(path: Path) -> TrainingState:
    """Read a training state; raise InputError if the file is damaged or incomplete."""
    try:
        with zipfile.ZipFile(path) as archive:  # the format of torch.save; every entry has a checksum
            damaged = archive.testzip()
        if damaged is None:
            state = TrainingState.of(torch.load(path, map_location="cpu", weights_only=True))
            assert [record["number"] for record in state.history] == list(range(1, state.epochs + 1))
            assert state.best_epoch > 0 or (state.epochs == 0 and state.progress.steps > 0)
            return state
        reason = f"{damaged} is damaged"
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ..., depending on the damage
        reason = " ".join(str(error).split())[:80] or type(error).__name__
    raise InputError(f"{path}: not a whole training state ({reason})")
