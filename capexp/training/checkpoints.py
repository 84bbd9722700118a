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
    sums: tuple[float, ...] = ()
    """Sums over the steps done: loss in nats, targets; in the self-critical phase also rewards and captions."""
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainingState:
    """All that a training is resumed from. Random numbers are not in it: they follow from seed, epoch and step."""

    decoder: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    """The epochs done, as dictionaries."""
    average: dict[str, Any] | None = None
    """The EMA of the decoder's weights, where training keeps one."""
    progress: EpochProgress = EpochProgress()
    """Within the epoch after those done."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "TrainingState":
        """Return the state of a ``dataclasses.asdict`` record; earlier versions saved no progress."""
        return cls(**record | {"progress": EpochProgress(**record.get("progress", {}))})

    @property
    def epochs(self) -> int:
        """The number of epochs done."""
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The last epoch that was an improvement; 0 where none was."""
        return max((record["number"] for record in self.history if record["improved"]), default=0)


class Checkpoints:
    """The folder of one run: ``last.pt``, ``previous.pt``, and bundles named ``ep003-train3.245-dev3.612``.

    States are saved after each epoch, and within a long one.

    Everything is written beside, synced and renamed: first the captioner of an improvement, then the state that knows
    of it, and only then older captioners are deleted. So each of the two states finds the captioner of its best epoch,
    whenever the process is killed.
    """

    def __init__(self, folder: Path, keep: int, begins_with: int = 1) -> None:
        """``begins_with`` is the epoch whose captioner may be on disk although no state is yet."""
        self.folder = folder
        self.keep = keep
        self.begins_with = begins_with

    def best(self) -> Path | None:
        """Return the bundle of the best epoch so far: the last one, as only improvements are saved."""
        bundles = self._numbered()
        return bundles[-1][1] if bundles else None

    def save_captioner(self, captioner: Captioner) -> Path:
        """Save an improvement under a name with its epoch and its losses in nats per token."""
        record = captioner.record
        assert record is not None
        name = f"ep{record.epoch:03d}-train{record.train_loss:.3f}-dev{record.dev_loss:.3f}"
        return captioner.save(self.folder / name)

    def save_state(self, state: TrainingState) -> None:
        """Save the state to resume from, keep the one before it, and delete captioners that neither needs."""
        beside = self.folder / f".{_LAST}.{os.getpid()}.part"
        content = io.BytesIO()
        torch.save(asdict(state), content)  # to memory first: torch hides what a disk has against it
        try:
            with writing(self.folder / _LAST):
                with beside.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                last = self.folder / _LAST
                if last.exists():
                    last.replace(self.folder / _PREVIOUS)
                beside.replace(last)
                sync(self.folder)
        finally:
            beside.unlink(missing_ok=True)
        numbers = [number for number, _ in self._numbered()]
        kept = {*numbers[-self.keep :], *[number for number in numbers if number < state.epochs][-1:]}
        for number, bundle in self._numbered():
            if number not in kept:
                shutil.rmtree(bundle)

    def clear_parts(self) -> None:
        """Delete what a killed process has left half-written; only the process that holds the run's lock may."""
        for part in self.folder.glob(".*.part"):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()

    def latest(self) -> TrainingState | None:
        """Return the newest state that is whole and has its captioner; None where nothing was saved yet.

        Changes nothing on disk. States of which none is whole are an error.
        """
        return self._choose()[0]

    def go_back(self) -> TrainingState | None:
        """Return the state of :meth:`latest`, and delete what is newer; only the process that holds the lock may.

        A state that is not whole is passed over with a warning.
        """
        state, faults = self._choose()
        for fault in faults:
            log.warning("%s; passed over", fault)
        if state is not None and faults:
            (self.folder / _LAST).unlink()  # so that it does not take the place of a whole one at the next save
        for number, bundle in self._numbered():
            if state is None or number > state.epochs:
                shutil.rmtree(bundle)
        return state

    def _choose(self) -> tuple[TrainingState | None, list[str]]:
        """Return the state to resume from, and what is wrong with newer ones."""
        there = [path for path in (self.folder / _LAST, self.folder / _PREVIOUS) if path.is_file()]
        bundles = dict(self._numbered())
        faults: list[str] = []
        for path in there:
            try:
                state = _read_state(path)
            except InputError as error:
                faults.append(str(error))
                continue
            if state.best_epoch == 0:  # within the first epoch
                return state, faults
            if state.best_epoch not in bundles:
                faults.append(f"{path}: its captioner (ep{state.best_epoch:03d}...) is missing")
                continue
            try:
                verify_bundle(bundles[state.best_epoch])
            except InputError as error:
                faults.append(f"{path}: its captioner is damaged ({error})")
                continue
            return state, faults
        if not there and bundles.keys() - {self.begins_with}:
            faults.append(f"{_LAST} is missing")
        if faults:
            raise InputError(f"{self.folder}: nothing to go on from ({'; '.join(faults)}); restore it, or train anew")
        return None, []

    def _numbered(self) -> list[tuple[int, Path]]:
        """Return the bundles with their epochs, in order."""
        return sorted(
            (int(match[1]), path) for path in self.folder.glob("ep*") if (match := _NAME.fullmatch(path.name))
        )


def check_disk_space(folder: Path, parameters: int, config: TrainingConfig, runs: int = 1) -> None:
    """Make the folder of all runs, and refuse a disk that runs of a decoder of so many parameters would fill."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    # In float32: bundles kept, the one before, the next and the one logged; states with Adam's two moments and a mean
    # of the weights, two kept and the next.
    phases = 1 + (config.self_critical.epochs > 0)
    need = 4 * parameters * (config.keep + 3 + 3 * 4) * phases * runs + 2**20
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder.absolute()}: {free / 2**20:,.0f} MiB are free, a run needs about {need / 2**20:,.0f}; make room"
        )


def _read_state(path: Path) -> TrainingState:
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; every entry has a checksum
            damaged = archive.testzip()
        if damaged is None:
            state = TrainingState.of(torch.load(path, map_location="cpu", weights_only=True))
            assert [record["number"] for record in state.history] == list(range(1, state.epochs + 1))
            assert state.best_epoch > 0 or (state.epochs == 0 and state.progress.steps > 0)
            return state
        reason = f"{damaged} is damaged"
    except MemoryError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... by kind of damage
        reason = " ".join(str(error).split())[:80] or type(error).__name__
    raise InputError(f"{path}: not a whole training state ({reason})")
