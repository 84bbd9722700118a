"""Small files of features in every format that is read."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from numpy.typing import NDArray
from safetensors.numpy import save_file

NAMES = ["a.jpg", "b.jpg", "sub/c.png", "d.jpg"]
Table = dict[str, NDArray[np.float32]]


def table(*shape: int) -> Table:
    generator = np.random.default_rng(7)
    return {name: generator.random(shape or (1, 8), np.float32).astype(np.float16).astype(np.float32) for name in NAMES}


def stack(values: Table) -> NDArray[np.float32]:
    return np.stack([*values.values()])


def write_pickle(path: Path, values: Table) -> None:
    path.write_bytes(pickle.dumps(values))


def write_npz(path: Path, values: Table) -> None:
    with path.open("wb") as file:
        np.savez(file, **values)  # type: ignore[arg-type]


def write_npz_table(path: Path, values: Table) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, names=np.array([*values]), features=stack(values))


def write_npy(path: Path, values: Table) -> None:
    with path.open("wb") as file:
        np.save(file, stack(values))
    path.with_suffix(".txt").write_text("\n".join(values))


def write_hdf5(path: Path, values: Table) -> None:
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value


def write_hdf5_table(path: Path, values: Table) -> None:
    with h5py.File(path, "w") as file:
        file["names"] = [*values]
        file.create_dataset("features", data=stack(values), compression="gzip", chunks=True)


def write_safetensors(path: Path, values: Table) -> None:
    save_file(values, path)


def write_safetensors_table(path: Path, values: Table) -> None:
    save_file({"features": stack(values)}, path)
    path.with_name("names.txt").write_text("\n".join(values))


def write_images(path: Path, values: Table) -> None:
    """Karpathy's captions file: the order of its images is that of the columns."""
    images = [{"filename": name, "sentences": [{"raw": "a dog"}], "split": "train"} for name in values]
    path.with_name("captions.json").write_text(json.dumps({"images": images}))


def write_matlab5(path: Path, values: Table) -> None:
    scipy.io.savemat(path, {"feats": stack(values).reshape(len(values), -1).T}, appendmat=False, do_compression=True)
    write_images(path, values)


def write_matlab7(path: Path, values: Table) -> None:
    """As MATLAB 7.3 writes it: HDF5 behind 512 bytes, and the columns as rows."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["feats"] = stack(values).reshape(len(values), -1).astype(np.float64)
    content = path.read_bytes()
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + content[512:])
    write_images(path, values)


FORMATS: dict[str, Callable[[Path, Table], None]] = {
    "pickle": write_pickle,
    "npz": write_npz,
    "npz table": write_npz_table,
    "npy": write_npy,
    "hdf5": write_hdf5,
    "hdf5 table": write_hdf5_table,
    "safetensors": write_safetensors,
    "safetensors table": write_safetensors_table,
    "matlab 5": write_matlab5,
    "matlab 7.3": write_matlab7,
}
