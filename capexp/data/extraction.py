"""Photos from their files to features, as fast as the machine goes.

On a CPU each core takes photos of its own all the way, so that none waits for another. On a GPU, threads or processes
decode ahead, and the next batch is sent before the features of the last one are waited for.

Shapes: B batch, P grid positions, F feature.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from capexp.data.pixels import AHEAD, Pixels, ahead, decode_by_processes, decode_by_threads, decode_photo, parts
from capexp.data.vgg16 import Encoder
from capexp.errors import InputError

Result = NDArray[np.float16] | InputError
"""A photo's features (P, F), or what is wrong with it."""
Results = Generator[list[Result], None, None]


def compute_features(photos: Iterable[Path], encoder: Encoder, batch_size: int, processes: int = 0) -> Results:
    """Features of photos in order, at most ``batch_size`` at a time; few photos are taken ahead of need.

    ``processes`` decode, or where there are none, threads.

    Raises:
        Outage: a process was killed.
    """
    if encoder.device.type == "cpu" and processes == 0:
        return _core_by_core(photos, encoder, batch_size)
    size = encoder.identity.size
    decoded = decode_by_processes(photos, size, processes) if processes else decode_by_threads(photos, size)
    return _batch_by_batch(decoded, encoder, batch_size)


def _core_by_core(photos: Iterable[Path], encoder: Encoder, batch_size: int) -> Results:
    """Each of torch's threads takes a few photos at a time from file to features."""
    threads = torch.get_num_threads()

    def work(part: list[Path]) -> list[Result]:
        decoded = [decode_photo(photo, encoder.identity.size) for photo in part]
        good = [pixels for pixels in decoded if not isinstance(pixels, InputError)]
        features = iter(encoder.encode(good) if good else ())
        return [pixels if isinstance(pixels, InputError) else next(features) for pixels in decoded]

    tasks = ((part,) for part in parts(photos, min(batch_size, encoder.at_once)))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from ahead(pool, work, tasks, AHEAD * threads)
    finally:
        torch.set_num_threads(threads)  # for threads that begin later; this one has kept its own


def _begin(encoder: Encoder, batch: torch.Tensor, good: int) -> Callable[[], NDArray[np.float16]]:
    """Begins with the first photos of a batch, and gives what waits for their features.

    For a full batch cuDNN tries, once, which way to compute each layer is fastest; that is not worth it for the size of
    the last one. So features may differ by rounding from machine to machine, and from batch to batch.
    """
    tries = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = good == len(batch)
    try:
        return encoder.begin(batch[:good])
    finally:
        torch.backends.cudnn.benchmark = tries


def _batch_by_batch(decoded: Iterator[Pixels], encoder: Encoder, batch_size: int) -> Results:
    """The device has the next batch before the features of the last one are waited for."""
    size = encoder.identity.size
    begun: tuple[list[InputError | None], Callable[[], NDArray[np.float16]]] | None = None
    while True:
        # Copies from pinned memory go on while the next photos are gathered.
        batch = torch.empty((batch_size, size, size, 3), dtype=torch.uint8, pin_memory=encoder.device.type == "cuda")
        faults: list[InputError | None] = []
        good = 0
        for pixels in islice(decoded, batch_size):
            if isinstance(pixels, InputError):
                faults.append(pixels)
            else:
                batch.numpy()[good] = pixels
                good += 1
                faults.append(None)
        last, begun = begun, (faults, _begin(encoder, batch, good)) if faults else None
        if last is not None:
            faults, finish = last
            features = iter(finish())
            yield [next(features) if fault is None else fault for fault in faults]
        if begun is None:
            return
