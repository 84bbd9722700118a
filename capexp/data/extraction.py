"""Features of photos from their files, as fast as the machine can.

On a CPU each core processes its own photos from file to features, so that no core waits for another. For a GPU, threads
or processes decode ahead, and each batch is launched before the program waits for the features of the previous batch.

Shapes: B batch, P grid positions, F feature.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from capexp.data.pixels import TASKS_PER_WORKER, Pixels, batched, decode_by_processes, decode_by_threads, decode_photo
from capexp.data.prefetch import prefetch
from capexp.data.vgg16 import Encoder
from capexp.errors import InputError

Result = NDArray[np.float16] | InputError
"""A photo's features (P, F), or the error of a photo that cannot be read."""
Results = Generator[list[Result], None, None]


def compute_features(photos: Iterable[Path], encoder: Encoder, batch_size: int, processes: int = 0) -> Results:
    """Yield the features of photos, in order, at most ``batch_size`` at a time; ``photos`` is read a little ahead.

    Photos are decoded by ``processes`` processes, or by threads if ``processes`` is 0.

    Raises:
        Outage: a process was killed.
    """
    if encoder.device.type == "cpu" and processes == 0:
        return _core_by_core(photos, encoder, batch_size)
    transform = encoder.identity.photo_transform
    decoded = decode_by_processes(photos, transform, processes) if processes else decode_by_threads(photos, transform)
    return _batch_by_batch(decoded, encoder, batch_size)


def _core_by_core(photos: Iterable[Path], encoder: Encoder, batch_size: int) -> Results:
    """Have each of torch's threads take a few photos at a time from file to features."""
    threads = torch.get_num_threads()
    transform = encoder.identity.photo_transform

    def work(batch: list[Path]) -> list[Result]:
        decoded = [decode_photo(photo, transform) for photo in batch]
        readable = [pixels for pixels in decoded if not isinstance(pixels, InputError)]
        features = iter(encoder.encode(readable) if readable else ())
        return [pixels if isinstance(pixels, InputError) else next(features) for pixels in decoded]

    batches = batched(photos, min(batch_size, encoder.photos_per_core))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from prefetch(pool, work, batches, TASKS_PER_WORKER * threads)
    finally:
        torch.set_num_threads(threads)  # for threads that start later; this thread's own number has not changed


def _batch_by_batch(decoded: Iterator[Pixels], encoder: Encoder, batch_size: int) -> Results:
    """Launch each batch before waiting for the features of the previous batch."""
    launched = _launch_batches(decoded, encoder, batch_size)
    finish = next(launched, None)
    while finish is not None:
        following = next(launched, None)
        yield finish()
        finish = following


def _launch_batches(
    decoded: Iterator[Pixels], encoder: Encoder, batch_size: int
) -> Iterator[Callable[[], list[Result]]]:
    """Launch batch after batch; yield for each a function that waits for its results."""
    size = encoder.identity.size
    while True:
        # Copies from pinned memory go on while the next photos are gathered.
        batch = torch.empty((batch_size, size, size, 3), dtype=torch.uint8, pin_memory=encoder.device.type == "cuda")
        errors: list[InputError | None] = []
        count = 0
        for pixels in islice(decoded, batch_size):
            if isinstance(pixels, InputError):
                errors.append(pixels)
            else:
                batch.numpy()[count] = pixels
                count += 1
                errors.append(None)
        if not errors:
            return
        yield partial(_finish, errors, _launch(encoder, batch, count))


def _finish(errors: list[InputError | None], wait: Callable[[], NDArray[np.float16]]) -> list[Result]:
    features = iter(wait())
    return [next(features) if error is None else error for error in errors]


def _launch(encoder: Encoder, batch: torch.Tensor, count: int) -> Callable[[], NDArray[np.float16]]:
    """Launch the first ``count`` photos of a batch; return a function that waits for their features.

    For a full batch cuDNN tries once which algorithm is the fastest for each layer; for the size of the last batch that
    is not worth it. So features may differ by rounding from machine to machine, and from batch to batch.
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = count == len(batch)
    try:
        return encoder.launch(batch[:count])
    finally:
        torch.backends.cudnn.benchmark = benchmark
