"""What training leaves on disk: the best captioners, and the state to go on from."""

import logging
import os
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capexp.captioning.captioner import Captioner
from capexp.data.errors import InputError

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
        """Makes this the state to go on from, and keeps the one before it."""
        beside = self.folder / f".{_LAST}.{os.getpid()}.part"
        try:
            with beside.open("wb") as file:
                torch.save(asdict(state), file)
                file.flush()
                os.fsync(file.fileno())
            last = self.folder / _LAST
            if last.exists():
                last.replace(self.folder / _PREVIOUS)
            beside.replace(last)
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
            InputError: states are there, and none is whole.
        """
        there = [path for path in (self.folder / _LAST, self.folder / _PREVIOUS) if path.exists()]
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


def _read_state(path: Path) -> TrainingState:
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; every entry has a checksum
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: {damaged} is damaged")
        return TrainingState(**torch.load(path, map_location="cpu", weights_only=True))
    except (zipfile.BadZipFile, RuntimeError, TypeError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole training state ({error})") from None
