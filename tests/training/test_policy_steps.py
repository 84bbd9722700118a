"""Steps of the self-critical phase come to the same, packed or captured, in a GPU's graphs or without."""

import copy
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import test_self_critical
import torch
from recorded import RecordedGraphs, as_on_a_gpu
from small import CPU, Noise, waits_for_gpu

from capexp.data.batches import CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import build_vocabulary
from capexp.distributed import ALONE, World
from capexp.settings import SelfCriticalConfig, TrainingConfig, VocabularyConfig
from capexp.training import policy_steps
from capexp.training.checkpoints import TrainingState
from capexp.training.loop import Training
from capexp.training.policy_steps import (
    CapturedPolicySteps,
    PackedPolicySteps,
    PolicyStep,
    PolicySteps,
    choose_policy_steps,
)
from capexp.training.self_critical import SelfCritical

devices = pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
decoders = pytest.mark.parametrize("decoder", ["merge", "attention"])


class Task:
    """Photos of one to four captions each; the last batch is not full."""

    def __init__(self, decoder: str, dropout: float = 0.0, photos: int = 53, batch: int = 5) -> None:
        noise = Noise(decoder, photos, captions=4, words=8, entries=20, dropout=dropout)
        self.batches = CaptionBatches(noise.split, noise.vocabulary, noise.features, 16, "photos")
        self.captioner = noise.captioner(maximum_length=8)
        self.batch = batch

    def training(
        self,
        device: torch.device,
        cross_entropy: float = 0.2,
        learning_rate: float = 1e-3,
        seed: int = 1,
        world: World = ALONE,
    ) -> Training:
        """With a copy of the captioner on the device."""
        settings = SelfCriticalConfig(
            epochs=3, photos=self.batch, samples=4, learning_rate=learning_rate, cross_entropy=cross_entropy
        )
        config = TrainingConfig(precision="float32", clip_norm=1, self_critical=settings)
        captioner = copy.deepcopy(self.captioner)
        captioner.decoder.to(device)
        return Training(captioner, self.batches, self.batches, config, seed, device, world)


def drawn(steps: PolicySteps, count: int) -> list[tuple[PolicyStep, list[int], list[list[int]]]]:
    """The results of the first steps, with their photos and captions."""
    seen = []
    rewards = steps.reward.of

    def of(photos: list[int], captions: list[list[int]]) -> torch.Tensor:
        seen.append((photos, captions))
        return rewards(photos, captions)

    steps.reward.of = of  # type: ignore[method-assign, assignment]
    results = list(islice(steps.of_epoch(1), count))
    return [(result, *captions) for result, captions in zip(results, seen, strict=True)]


@devices
@decoders
@pytest.mark.parametrize("cross_entropy", [0.0, 0.2])
def test_captured_steps_draw_the_captions_of_packed_ones_and_learn_the_same(
    device: torch.device, decoder: str, cross_entropy: float
) -> None:
    task = Task(decoder)
    packed, captured = (
        kind(task.training(device, cross_entropy), 0) for kind in (PackedPolicySteps, CapturedPolicySteps)
    )
    theirs, ours = (drawn(steps, 10) for steps in (packed, captured))
    for their, our in zip(theirs, ours, strict=True):
        assert our[1:] == their[1:]
        assert our[0] == pytest.approx(their[0], rel=1e-5)
    assert len({tuple(caption) for _, _, captions in ours for caption in captions}) > 50
    pairs = zip(packed.training.decoder.parameters(), captured.training.decoder.parameters(), strict=True)
    for their_value, our_value in pairs:
        if their_value.grad is not None:  # of the tenth step, clipped
            assert our_value.grad is not None
            scale = float(their_value.grad.abs().max())
            torch.testing.assert_close(our_value.grad, their_value.grad, rtol=1e-4, atol=1e-4 * scale)
        torch.testing.assert_close(our_value, their_value, rtol=1e-4, atol=1e-4)


@devices
@decoders
def test_the_first_steps_gradient_is_the_same_to_one_part_in_a_hundred_thousand(
    device: torch.device, decoder: str
) -> None:
    task = Task(decoder)
    gradients = []
    for kind in (PackedPolicySteps, CapturedPolicySteps):
        steps = kind(task.training(device), 0)
        next(steps.of_epoch(1))
        values = [value.grad for value in steps.training.decoder.parameters() if value.requires_grad]
        gradients.append([torch.zeros(()) if one is None else one.cpu() for one in values])
    for their, our in zip(*gradients, strict=True):
        assert float((our - their).norm()) <= 1e-5 * float(their.norm()) + 1e-8


class Beside(World):
    """Beside ranks that have sampled 100 targets together."""

    def sum(self, *values: float) -> list[float]:
        return [value + 100 for value in values]

    def sum_gradients(self, module: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
        return loss


@pytest.mark.parametrize("world", [Beside(1, 3), Beside(2, 3)], ids="{0.rank} of {0.size}".format)
@pytest.mark.parametrize("batch", [6, 2])
def test_a_ranks_gradient_has_the_weight_of_its_targets(world: World, batch: int) -> None:
    task = Task("attention", batch=batch)
    packed, captured = (
        kind(task.training(CPU, cross_entropy=0, world=world), 0) for kind in (PackedPolicySteps, CapturedPolicySteps)
    )
    theirs, ours = (drawn(steps, 1) for steps in (packed, captured))
    is_idle = batch == 2 and world.rank == 2  # it repeats the photo of another rank
    assert ours[0][0] == pytest.approx(theirs[0][0], rel=1e-5)
    assert (ours[0][0].captions == 0) == is_idle
    for steps in (packed, captured):
        values = [value.grad for value in steps.training.decoder.parameters() if value.grad is not None]
        assert all((value == 0).all() for value in values) == is_idle
    pairs = zip(packed.training.decoder.parameters(), captured.training.decoder.parameters(), strict=True)
    for their, our in pairs:
        if their.grad is not None:
            assert our.grad is not None
            assert float((our.grad - their.grad).norm()) <= 1e-5 * float(their.grad.norm())


@decoders
def test_what_a_graph_replays_is_what_the_step_computes(decoder: str) -> None:
    """Held against a recorder on the CPU, with dropout: nothing of an earlier step is left in a replay."""
    task = Task(decoder, dropout=0.3)
    with as_on_a_gpu(policy_steps):
        replayed = CapturedPolicySteps(task.training(CPU), 0)
        found = drawn(replayed, 11)
        assert isinstance(replayed._graphs, RecordedGraphs)
        assert set(replayed._graphs.recorded) >= {"sample", ("references", 9), ("samples", 8)}
        assert None not in replayed._graphs.recorded.values()
    with as_on_a_gpu():
        assert found == drawn(CapturedPolicySteps(task.training(CPU), 0), 11)


@devices
def test_a_batch_that_is_not_full_is_learned_from_as_such(device: torch.device) -> None:
    task = Task("attention")
    theirs, ours = (
        drawn(kind(task.training(device, learning_rate=1e-9), 0), 99)
        for kind in (PackedPolicySteps, CapturedPolicySteps)
    )
    assert len(theirs) == len(ours) == 11
    assert [photos for _, photos, _ in ours] == [photos for _, photos, _ in theirs]
    assert ours[-1][0].captions == 3 * 4
    assert [one[0].captions for one in ours] == [one[0].captions for one in theirs]


def test_what_ranks_take_is_each_photo_once() -> None:
    task = Task("attention")
    epochs = [task.batches.padded(CPU).epoch(1, 2, World(rank, 3), photos=5) for rank in range(3)]
    for step, whole in enumerate(task.batches.photo_batches(5, 1, 2)):
        own = [epoch.photos[step] for epoch in epochs if epoch.targets[step]]
        assert sorted(chain(*own)) == sorted(whole.photos.tolist())
        assert sum(float(epoch.shares[step]) for epoch in epochs) == pytest.approx(1)
        for rank, epoch in enumerate(epochs):
            shard = list(task.batches.photo_batches(5, 1, 2, World(rank, 3)))[step]
            assert epoch.photos[step] == shard.photos.tolist()
            assert bool(epoch.targets[step]) == shard.is_own
            features = task.batches.padded(CPU).features[epoch.views[step, : len(shard.photos)]]
            torch.testing.assert_close(features.float(), shard.features)


@pytest.mark.slow
@devices
def test_rewards_grow_with_captured_steps_as_with_packed_ones(device: torch.device, tmp_path: Path) -> None:
    """Over three seeds; with other dropout masks, so with other captions."""

    def rewards(kind: type[PolicySteps], seed: int) -> list[float]:
        task = test_self_critical.Task(tmp_path / kind.__name__ / str(seed), cross_entropy=0.0)
        epochs = list(task.started(5, make_steps=kind, device=device, seed=seed))
        return [epoch.reward or 0.0 for epoch in epochs]

    packed, captured = (
        np.array([rewards(kind, seed) for seed in (1, 2, 3)]) for kind in (PackedPolicySteps, CapturedPolicySteps)
    )
    assert (captured[:, -1] > captured[:, 0] + 0.1).all()
    difference = abs(packed.mean(0) - captured.mean(0))  # of each epoch
    assert (difference <= 2 * np.maximum(packed.std(0), captured.std(0))).all()


@pytest.mark.slow
@devices
def test_an_optimizers_state_goes_from_steps_of_one_kind_to_the_other(device: torch.device) -> None:
    task = Task("attention")
    kinds = (PackedPolicySteps, CapturedPolicySteps)
    undisturbed = SelfCritical(task.training(device), 0, PackedPolicySteps)
    expected = [undisturbed.train_epoch(number).loss.per_token for number in (1, 2)]
    for first, second in (kinds, kinds[::-1]):
        before, after = (SelfCritical(task.training(device), 0, kind) for kind in (first, second))
        losses = [before.train_epoch(1).loss.per_token]
        after.load_state_dict(TrainingState(**before.state_dict(), history=[]))
        losses.append(after.train_epoch(2).loss.per_token)
        # A caption may be another one where two random numbers are all but equal.
        assert losses == pytest.approx(expected, rel=1e-2)


def test_steps_are_packed_on_a_cpu() -> None:
    assert isinstance(choose_policy_steps(Task("merge").training(CPU), 0), PackedPolicySteps)


def test_photos_of_very_different_numbers_of_captions_are_mostly_padding() -> None:
    texts = (*[("a dog",) * 2] * 50, ("a dog",) * 500)
    split = Split("train", Path(), tuple(map(str, range(51))), texts)
    vocabulary = build_vocabulary(("a dog",), VocabularyConfig(minimum_count=1))
    features = Features(np.zeros((51, 1, 512), np.float16), np.arange(51))
    batches = CaptionBatches(split, vocabulary, features, 32, "captions")
    assert batches.padding() < 2 < 5 < batches.padding(photos=25)


@pytest.mark.gpu
@decoders
def test_a_step_on_a_gpu_waits_for_samples_and_loss_only(decoder: str) -> None:
    objective = SelfCritical(Task(decoder).training(torch.device("cuda")), 0)
    assert isinstance(objective.steps, CapturedPolicySteps)
    for number in (1, 2):  # what is captured is waited for
        objective.train_epoch(number)
    told = waits_for_gpu(lambda: objective.train_epoch(3))
    assert len(told) <= 2 * objective.steps.count + 2, told
