"""Sampled captions per second in the self-critical phase: a whole step, and its sampling and its rewards alone.

On a GPU the step is also taken one operation after another, instead of by CUDA graphs.

    python experiments/benchmarks/bench_self_critical.py                 on this machine, three rounds
    python experiments/benchmarks/bench_self_critical.py --device cuda
    python experiments/benchmarks/bench_self_critical.py --profile       where the time of a step goes, by operation

The sizes are those of ``flickr8k-self-critical``: 512 units, a grid of 49 x 512, 2,540 entries, 25 photos with five
samples each, reference captions of weight 0.2. Photos and reference captions are made up. The decoder is untrained, but
ends its captions after as many words as people do, on average.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import numpy as np
import torch
from bench_training import CAPTIONS, Task

from capexp.captioning.captioner import Captioner
from capexp.captioning.decoding import sample_captions
from capexp.data.batches import CaptionBatches
from capexp.data.features import Features
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vocabulary import EOS
from capexp.distributed import choose_device
from capexp.settings import DecodingConfig, ModelConfig, SelfCriticalConfig, TrainingConfig
from capexp.training.loop import Training
from capexp.training.policy_steps import PackedPolicySteps
from capexp.training.reward import Reward
from capexp.training.self_critical import SelfCritical

ENTRIES, UNITS, POSITIONS, FEATURES, WORDS = 2540, 512, 49, 512, 10.8
CONFIG = SelfCriticalConfig(epochs=1, learning_rate=1e-4, photos=25, samples=CAPTIONS, cross_entropy=0.2)


def prepare(photos: int, device: torch.device) -> Training:
    """Return a training whose captioner ends a caption with the probability 1 / (``WORDS`` + 1) at each word."""
    task = Task(photos, device, ENTRIES, WORDS)
    grids = np.random.default_rng(1).random((min(photos, 200), POSITIONS, FEATURES), np.float32).astype(np.float16)
    features = Features(grids, np.arange(photos) % len(grids))
    batches = CaptionBatches(task.batches.split, task.vocabulary, features, 128, "photos")
    model = ModelConfig(
        decoder="attention",
        embedding_size=UNITS,
        lstm_units=UNITS,
        dropout=0.5,
        output_dropout=0.5,
        photo_norm="standard",
    )
    identity = EncoderIdentity("conv5_3", "max2", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "made up")
    captioner = Captioner.fresh(model, task.vocabulary, identity, DecodingConfig(), seed=1)
    with torch.no_grad():
        captioner.decoder.get_parameter("vocabulary.bias")[EOS] = np.log(len(task.vocabulary) / WORDS)
    config = TrainingConfig(precision="float32", self_critical=CONFIG)
    return Training(captioner, batches, batches, config, 1, device)


def main() -> None:
    """Run the benchmark and print its record."""
    parser = bench.arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, steps = choose_device(arguments.device), arguments.steps
    training = prepare(CONFIG.photos * steps, device)
    objective, vocabulary = SelfCritical(training, 0), training.captioner.vocabulary
    packed = SelfCritical(prepare(CONFIG.photos * steps, device), 0, PackedPolicySteps)
    reward = Reward(training.train.split.references, vocabulary)
    start = training.decoder.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    batches = list(training.train.photo_batches(CONFIG.photos, 1, 1))
    draw = partial(sample_captions, vocabulary=vocabulary, count=CONFIG.samples, maximum_length=30)

    def sample() -> list[torch.Tensor]:
        training.decoder.eval()
        with training.autocast():
            return [draw(training.decoder, batch.features.to(device)) for batch in batches]

    drawn = sample()
    captions = sum(map(len, drawn))

    def whole(objective: SelfCritical = objective) -> float:
        objective.train_epoch(1)
        objective.training.decoder.load_state_dict(start)  # else captions would become longer or shorter
        return captions

    def sampling() -> float:
        return sum(map(len, sample()))

    def rewards() -> float:
        for batch, samples in zip(batches, drawn, strict=True):
            reward.of(batch.photos.repeat(CONFIG.samples).tolist(), samples.tolist())
        return captions

    if arguments.profile:
        bench.profile(whole, steps, device)
        return
    settings = {"steps": steps, "targets": int(sum((samples != 0).sum() for samples in drawn))}
    record = bench.Record("self-critical", "captions", device, settings)
    contestants: dict[str, Callable[[], float]] = {"whole": whole, "sampling": sampling, "rewards": rewards}
    pairs = [("sampling", "whole"), ("rewards", "whole")]
    if not isinstance(objective.steps, PackedPolicySteps):
        contestants["whole, one operation after another"] = partial(whole, packed)
        pairs.append(("whole", "whole, one operation after another"))
    record.race(contestants, pairs, arguments.rounds)
    seconds = {name: captions / steps / rate for name, rate in record.rates.items()}
    if isinstance(objective.steps, PackedPolicySteps):  # else sampling is faster in the whole than alone
        seconds["learning"] = seconds["whole"] - seconds["sampling"] - seconds["rewards"]
    for name, value in seconds.items():
        print(f"{name}: {1000 * value:.1f} ms a step, {6000 / CONFIG.photos * value:.1f} s an epoch of 6,000 photos")
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
