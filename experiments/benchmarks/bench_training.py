"""Targets per second when training the tutorial's captioner: ours, its rivals, and the matrix products alone.

    python experiments/benchmarks/bench_training.py                      on this machine, five rounds
    python experiments/benchmarks/bench_training.py --growth             also how the cost grows; some minutes more
    python experiments/benchmarks/bench_training.py --entries 2540       with the vocabulary of flickr8k-merge-conv
    python experiments/benchmarks/bench_training.py --profile            where the time of a step goes, by operation
    python experiments/benchmarks/bench_training.py --vocabulary-layer   that layer beside torch's fused function
    python experiments/benchmarks/bench_training.py --device cuda

All train the same model (4096 features, 256 units, 7,579 entries by default) on made-up captions as long as Flickr8k's.

- "the tutorial's method" makes a sample of each prefix, padded to the longest caption, with one photo per batch.
- "Keras", if TensorFlow is installed, does the same in the tutorial's own framework.
- "plain" is teacher forcing over batches of 64 captions, each batch padded to its longest caption, in float32, with an
  unfused Adam.
- The floor is the matrix products that a target needs, at the speed of one large product.
"""

import importlib.util
import multiprocessing
import os
import string
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import numpy as np
import torch
from torch import Tensor, nn

from capexp.captioning.captioner import Captioner
from capexp.captioning.vocabulary_layer import VocabularyLayer
from capexp.data.batches import Batch, CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vocabulary import Vocabulary
from capexp.distributed import ALONE, World, choose_device
from capexp.settings import DecodingConfig, ModelConfig, TrainingConfig
from capexp.training.loop import Training
from capexp.training.steps import PackedSteps, choose_steps
from capexp.training.teacher_forcing import CrossEntropy

ENTRIES, FEATURES, UNITS, LONGEST = 7579, 4096, 256, 34  # the tutorial's values for Flickr8k
CAPTIONS, MEAN_LENGTH, BATCH = 5, 9.2, 64  # captions per photo; words per caption; captions per batch
Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Task:
    """Made-up photos and captions, which all contestants train on."""

    def __init__(
        self,
        photos: int,
        device: torch.device,
        entries: int = ENTRIES,
        length: float = MEAN_LENGTH,
        batch: int = BATCH,
        kind: type[CaptionBatches] = CaptionBatches,
    ) -> None:
        rng = np.random.default_rng(1)
        names = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=4)][: entries - 3]
        self.device, self.vocabulary = device, Vocabulary(tuple(names), "tutorial", "drop")
        counts = np.clip(rng.gamma(6, length / 6, (photos, CAPTIONS)).round(), 1, LONGEST - 1).astype(int)
        texts = tuple(
            tuple(" ".join(names[i] for i in np.minimum(rng.zipf(1.3, count), len(names)) - 1) for count in row)
            for row in counts
        )
        split = Split("train", Path(), tuple(f"{i}.jpg" for i in range(photos)), texts)
        block = rng.random((min(photos, 1000), 1, FEATURES), dtype=np.float32).astype(np.float16)
        self.features = Features(block, np.arange(photos) % len(block))
        self.batches = kind(split, self.vocabulary, self.features, batch)
        self.texts = texts
        self._epoch = 0

    def captioner(self) -> Captioner:
        """Return a new, untrained captioner."""
        identity = EncoderIdentity("fc2", "none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "made up")
        return Captioner.fresh(ModelConfig(), self.vocabulary, identity, DecodingConfig(), seed=1)

    def ours(self, precision: Precision, captured: bool = True) -> Callable[[], float]:
        """Return a contestant that trains an epoch in the project's own loop; on a GPU with captured steps or without.

        As for all contestants, calling it returns the number of targets.
        """
        config = TrainingConfig(precision=precision)
        training = Training(self.captioner(), self.batches, self.batches, config, 1, self.device)
        objective = CrossEntropy(training, choose_steps if captured else PackedSteps)

        def epoch() -> float:
            self._epoch += 1
            return objective.train_epoch(self._epoch).loss.targets

        return epoch

    def plain(self) -> Callable[[], float]:
        """Return a contestant with the usual padded teacher forcing."""
        model = Rival(len(self.vocabulary)).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=False)
        encoded = [self._tokens(text) for photo in self.texts for text in photo]

        def epoch() -> float:
            done = 0
            order = torch.randperm(len(encoded)).tolist()
            for start in range(0, len(order), BATCH):
                some = order[start : start + BATCH]
                padded = nn.utils.rnn.pad_sequence([encoded[i] for i in some], batch_first=True).to(self.device)
                photos = self._photos(np.array(some) // CAPTIONS)
                logits = model(photos, padded[:, :-1])  # (B, T, V)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), ignore_index=0)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                loss.item()
                done += int((padded[:, 1:] != 0).sum())
            return done

        return epoch

    def tutorial(self, photos: int) -> Callable[[], float]:
        """Return a contestant with the tutorial's method, over the first ``photos`` photos."""
        model = Rival(len(self.vocabulary)).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=False)

        def epoch() -> float:
            done = 0
            for photo in range(photos):
                inputs, targets = (value.to(self.device) for value in self._prefixes(photo))
                features = self._photos(np.full(len(inputs), photo))
                logits = model(features, inputs, last=True)  # (M, V)
                loss = nn.functional.cross_entropy(logits, targets)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                loss.item()
                done += len(targets)
            return done

        return epoch

    def keras(self, photos: int) -> Callable[[], float]:
        """Return a contestant with the tutorial's method in Keras, over the first ``photos`` photos."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from tensorflow import keras

        layers = keras.layers
        seen, said = keras.Input((FEATURES,)), keras.Input((LONGEST,), dtype="int32")
        photo = layers.Dense(UNITS, activation="relu")(layers.Dropout(0.5)(seen))
        words = layers.Embedding(len(self.vocabulary), UNITS, mask_zero=True)(said)
        words = layers.LSTM(UNITS)(layers.Dropout(0.5)(words))
        merged = layers.Dense(UNITS, activation="relu")(layers.add([photo, words]))
        model = keras.Model((seen, said), layers.Dense(len(self.vocabulary), activation="softmax")(merged))
        model.compile(loss="categorical_crossentropy", optimizer="adam")
        targets = 0

        def samples() -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
            nonlocal targets
            for photo in range(photos):
                inputs, following = (value.numpy() for value in self._prefixes(photo))
                features = self.features.gather(np.full(len(inputs), photo))[:, 0].astype(np.float32)
                targets += len(following)
                yield (features, inputs), keras.utils.to_categorical(following, len(self.vocabulary))

        def epoch() -> float:
            nonlocal targets
            targets = 0
            model.fit(samples(), steps_per_epoch=photos, epochs=1, verbose=0)
            return targets

        return epoch

    def floor(self, precision: Precision) -> Callable[[], float]:
        """Return a contestant that computes large products, and counts the targets that need as much arithmetic."""
        size = 2048 if self.device.type == "cpu" else 8192
        a = torch.randn(size, size, device=self.device).to(DTYPES[precision])
        b = torch.randn(size, size, device=self.device).to(DTYPES[precision])
        targets = (
            2 * size**3 / multiplications(len(self.vocabulary), self.batches.targets / (len(self.texts) * CAPTIONS))
        )
        times = 10 if self.device.type == "cpu" else 50

        def products() -> float:
            for _ in range(times):
                a @ b
            return targets * times

        return products

    def _prefixes(self, photo: int) -> tuple[Tensor, Tensor]:
        """Return all prefixes of a photo's captions ``(M, LONGEST)``, and the next word of each ``(M,)``."""
        samples, following = [], []
        for text in self.texts[photo]:
            tokens = self._tokens(text)
            for length in range(1, len(tokens)):
                samples.append(nn.functional.pad(tokens[:length], (LONGEST - length, 0)))
                following.append(tokens[length])
        return torch.stack(samples), torch.stack(following)

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor([1, *self.vocabulary.encode(text), 2])

    def _photos(self, photos: np.ndarray) -> Tensor:
        return torch.from_numpy(self.features.gather(photos)).float()[:, 0].to(self.device)


class Rival(nn.Module):
    """The tutorial's layers in plain PyTorch."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.photo, self.dense = nn.Linear(FEATURES, UNITS), nn.Linear(UNITS, UNITS)
        self.embedding, self.dropout = nn.Embedding(entries, UNITS, padding_idx=0), nn.Dropout(0.5)
        self.lstm, self.vocabulary = nn.LSTM(UNITS, UNITS, batch_first=True), nn.Linear(UNITS, entries)

    def forward(self, photos: Tensor, words: Tensor, last: bool = False) -> Tensor:
        """Return the logits ``(B, T, V)``, or with ``last`` those of the last step only ``(B, V)``."""
        outputs, _ = self.lstm(self.dropout(self.embedding(words)))
        photo = torch.relu(self.photo(self.dropout(photos)))
        merged = outputs[:, -1] + photo if last else outputs + photo.unsqueeze(1)
        logits: Tensor = self.vocabulary(torch.relu(self.dense(merged)))
        return logits


def multiplications(entries: int, targets_a_caption: float) -> float:
    """Return the floating-point operations of a target's matrix products, forward and backward.

    Forward takes 2 per weight. Backward takes 4, or 2 for the photo's layer, because nothing before it is trained.
    """
    a_target = 4 * UNITS * 2 * UNITS + UNITS * UNITS + UNITS * entries
    return 6 * a_target + 4 * FEATURES * UNITS / targets_a_caption


def cross_entropies(smoothing: float, precision: Precision, device: torch.device) -> dict[str, Callable[[], float]]:
    """Return contestants that compute the cross-entropy of a batch after the vocabulary layer, and all its gradients.

    Torch's function returns one loss, the one to minimise. Ours returns the plain one too, which is reported.
    """
    torch.manual_seed(1)
    layer, count = VocabularyLayer(UNITS, ENTRIES).to(device), round(BATCH * (MEAN_LENGTH + 1))
    times = 1 if device.type == "cpu" else 50
    inputs = torch.randn(count, UNITS, device=device).relu().requires_grad_()
    targets = torch.randint(ENTRIES, (count,), device=device)

    def ours() -> float:
        for _ in range(times):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                _, loss = layer.cross_entropy(inputs, targets, smoothing)
            _differentiate(loss, layer, inputs)
        return times * count

    def torchs(options: Any) -> float:
        for _ in range(times):
            read, weight, bias = (one.to(DTYPES[precision]) for one in (inputs, layer.weight, layer.bias))
            loss = nn.functional.linear_cross_entropy(
                read, weight, targets, linear_bias=bias, label_smoothing=smoothing, options=options
            )
            _differentiate(loss, layer, inputs)
        return times * count

    name = f"{precision}, smoothing {smoothing:g}"
    contestants = {f"ours, {name}": ours, f"torch, all logits, {name}": lambda: torchs(None)}
    if not smoothing:  # with label smoothing torch warns and computes all logits at once
        contestants[f"torch, in chunks, {name}"] = lambda: torchs(nn.LinearCrossEntropyOptions())
    return contestants


def _differentiate(loss: Tensor, layer: nn.Module, inputs: Tensor) -> None:
    layer.zero_grad()
    inputs.grad = None
    torch.autograd.backward(loss)


class First(CaptionBatches):
    """Batches of which an epoch has only the first 50."""

    def epoch(self, seed: int, number: int, world: World = ALONE, done: int = 0) -> Iterator[Batch]:
        """Yield the first batches of an epoch."""
        return islice(super().epoch(seed, number, world, done), 50)


def peak_of(photos: int) -> None:
    """Train on the first batches of an epoch, to measure their peak of memory."""
    task = Task(photos, torch.device("cpu"), kind=First)
    task.ours("float32")()


@cache
def keras_task(photos: int, entries: int) -> Callable[[], float]:
    """Return the contestant in Keras; it is made once per process."""
    return Task(photos, torch.device("cpu"), entries).keras(photos)


def keras_epoch(photos: int, entries: int) -> float:
    """Train an epoch in Keras; return its number of targets."""
    return keras_task(photos, entries)()


def main() -> None:
    """Run the benchmark and print its record."""
    parser = bench.arguments(__doc__)
    parser.add_argument(
        "--photos", type=int, default=400, help="number of photos in a round; the tutorial's method takes a tenth"
    )
    parser.add_argument("--entries", type=int, default=ENTRIES, help="number of entries of the vocabulary")
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows too")
    parser.add_argument("--profile", action="store_true", help="only print the time of each operation in our steps")
    parser.add_argument(
        "--vocabulary-layer", action="store_true", help="only measure the vocabulary layer, beside torch's own function"
    )
    arguments = parser.parse_args()
    if arguments.growth and arguments.entries != ENTRIES:
        parser.error("--growth has vocabularies of its own; leave --entries out")
    torch.set_num_threads(arguments.threads)
    device, entries = choose_device(arguments.device), arguments.entries
    if arguments.vocabulary_layer:
        record = bench.Record("vocabulary-layer", "targets", device, {"entries": ENTRIES, "units": UNITS})
        for smoothing, precision in product((0.0, 0.1), DTYPES):
            racing = cross_entropies(smoothing, precision, device)
            first, *others = racing
            record.race(racing, [(first, other) for other in others], arguments.rounds)
        record.finish(arguments.output)
        return
    task = Task(arguments.photos, device, entries)
    if arguments.profile:
        for precision in DTYPES:
            print(f"ours, {precision}, milliseconds a step of {task.batches.targets / len(task.batches):.0f} targets:")
            bench.profile(task.ours(precision), len(task.batches), device)
        return
    settings = {"photos": arguments.photos, "entries": entries, "units": UNITS, "features": FEATURES, "batch": BATCH}
    record = bench.Record("training" if entries == ENTRIES else f"training-{entries}", "targets", device, settings)
    contestants = {
        "tutorial's method": task.tutorial(max(arguments.photos // 10, 1)),
        "plain": task.plain(),
        "ours, float32": task.ours("float32"),
        "ours, bfloat16": task.ours("bfloat16"),
        "floor, float32": task.floor("float32"),
        "floor, bfloat16": task.floor("bfloat16"),
    }
    pairs = [
        (f"ours, {precision}", other)
        for precision in DTYPES
        for other in ("tutorial's method", "plain", f"floor, {precision}")
    ]
    if device.type == "cpu" and importlib.util.find_spec("tensorflow"):
        # In a process of its own: TensorFlow's threads keep running when it has nothing to do.
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        few = max(arguments.photos // 10, 1)
        contestants["Keras"] = lambda: pool.submit(keras_epoch, few, entries).result()
        pairs += [(f"ours, {precision}", "Keras") for precision in DTYPES]
    if device.type == "cuda":
        contestants["ours, bfloat16, not captured"] = task.ours("bfloat16", captured=False)
        pairs.append(("ours, bfloat16", "ours, bfloat16, not captured"))
    record.race(contestants, pairs, arguments.rounds)
    if arguments.growth:
        _growth(record, arguments.photos, arguments.rounds)
    record.finish(arguments.output)


def _growth(record: bench.Record, photos: int, rounds: int) -> None:
    device, threads = record.device, torch.get_num_threads()
    sizes = (16, 64, 256, 1024) if device.type == "cpu" else (64, 128, 256, 512)
    tasks = {
        "entries": {str(n): Task(photos, device, entries=n) for n in (2_500, 7_500, 15_000, 30_000)},
        "captions a batch": {str(n): Task(photos, device, batch=n) for n in sizes},
        "words a caption": {str(n): Task(photos, device, length=n) for n in (5, 10, 20)},
    }
    for name, of_name in tasks.items():
        found = bench.Record(name, "targets", device, {})
        found.race({size: task.ours("bfloat16") for size, task in of_name.items()}, [], rounds)
        record.growth[f"targets a second, bfloat16, by {name}"] = found.rates
    if device.type == "cpu":
        found = bench.Record("threads", "targets", device, {})
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            one = bench.Record("threads", "targets", device, {})
            one.race({str(count): Task(photos, device).ours("float32")}, [], rounds)
            found.rates |= one.rates
        torch.set_num_threads(threads)
        record.growth["targets a second, float32, by threads"] = found.rates
    record.growth["MiB at most, by photos"] = {str(n): bench.peak(peak_of, n) for n in (1_000, 10_000, 100_000)}


if __name__ == "__main__":
    main()
