"""What training leaves on disk: the best captioners, and the state to go on from."""

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

from capexp.captioning.captioner import Captioner
from capexp.data.errors import InputError
from capexp.data.files import sync, writing

log = logging.getLogger(__name__)

_LAST, _PREVIOUS = "last.pt", "previous.pt"
_NAME = re.compile(r"ep(\d{3,})-train[\d.]+-dev[\d.]+")


@dataclass(frozen=True)
class TrainingState:
    """All that training goes on from after an epoch; order and dropout follow from seed and epoch."""

    decoder: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    """The epochs done, as plain values."""


class Checkpoints:
    """The folder of one run: ``last.pt``, the one before it, and bundles named ``ep003-train3.245-dev3.612``.

    Everything is written beside, synced and renamed. The last good state stays until the next is whole; the
    captioner of the best epoch is always there, earlier improvements as ``keep`` says.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def best(self) -> Path | None:
        """The bundle of the best epoch so far: improvements are saved only, so the last one."""
        bundles = self._bundles()
        return bundles[-1] if bundles else None

    def save_captioner(self, captioner: Captioner) -> Path:
        """Saves an improvement under the name that tells its epoch and losses, in nats per token."""
        training = captioner.training
        assert training is not None
        name = f"ep{training.epoch:03d}-train{training.train_loss:.3f}-dev{training.dev_loss:.3f}"
        bundle = captioner.save(self.folder / name)
        for old in self._bundles()[: -self.keep]:
            shutil.rmtree(old)
        return bundle

    def save_state(self, state: TrainingState) -> None:
        """Makes this the state to go on from, and keeps the one before it.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
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

    def clear_parts(self) -> None:
        """Deletes what a killed process has left half-written; only the process that owns the run may."""
        for part in self.folder.glob(".*.part"):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()

    def latest(self) -> TrainingState | None:
        """The newest state that is whole, or None where nothing was saved yet.

        Raises:
            InputError: states are there, and none is whole, or the captioners that belong to them are gone.
        """
        there = [path for path in (self.folder / _LAST, self.folder / _PREVIOUS) if path.exists()]
        if there and not self._bundles():
            raise InputError(f"{self.folder}: no captioner (ep...) is left in it; restore the best one, or train anew")
        for path in there:
            try:
                return _read_state(path)
            except InputError as error:
                log.warning("%s; passed over", error)
                path.unlink()  # so that it does not take the place of a whole one at the next save
        if there:
            raise InputError(f"{self.folder}: no state in it is whole; train anew")
        return None

    def _bundles(self) -> list[Path]:
        """Bundles by epoch."""
        numbered = [(int(match[1]), path) for path in self.folder.glob("ep*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(numbered)]


def refuse_cramped(folder: Path, parameters: int, keep: int) -> None:
    """Makes the folder of all runs, and refuses a disk that a run of so many parameters would fill.

    Raises:
        InputError: too little room, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    # In float32: bundles kept, the next and the one logged; states with Adam's two moments, two kept and the next.
    need = 4 * parameters * (keep + 2 + 3 * 3) + 2**20
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder.absolute()}: {free / 2**20:,.0f} MiB are free, a run needs about {need / 2**20:,.0f}; make room"
        )


def _read_state(path: Path) -> TrainingState:
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; every entry has a checksum
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: {damaged} is damaged")
        return TrainingState(**torch.load(path, map_location="cpu", weights_only=True))
    except (zipfile.BadZipFile, RuntimeError, TypeError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole training state ({error})") from None
