"""Steps come to the same, however they are taken: from packed batches, from padded ones, from a GPU's graphs."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import combined
from recorded import RecordedGraphs, as_on_a_gpu
from small import CPU, Noise, waits_for_gpu

from capexp.data.batches import CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import build_vocabulary
from capexp.distributed import ALONE, World
from capexp.settings import Order, TrainingConfig, VocabularyConfig
from capexp.training import steps
from capexp.training.checkpoints import TrainingState
from capexp.training.loop import Training
from capexp.training.steps import CapturedSteps, PackedSteps, choose_steps, rounded_length
from capexp.training.teacher_forcing import CrossEntropy

devices = pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
kinds = pytest.mark.parametrize(
    ("decoder", "order"),
    [("merge", "captions"), ("merge", "photos"), ("attention", "captions"), ("attention", "photos")],
)
CONFIG = TrainingConfig(
    epochs=3, batch_size=16, learning_rate=0.01, schedule="cosine", label_smoothing=0.1, weight_decay=0.01, clip_norm=1,
    precision="float32",
)  # fmt: skip


class Task:
    """Photos of one to five captions each, of one to 19 words."""

    def __init__(self, decoder: str, order: Order, dropout: float = 0.0) -> None:
        noise = Noise(decoder, 50, captions=5, words=19, entries=40, dropout=dropout)
        self.split, self.vocabulary, self.features = noise.split, noise.vocabulary, noise.features
        self.batches = CaptionBatches(self.split, self.vocabulary, self.features, CONFIG.batch_size, order)
        self.captioner = noise.captioner()

    def training(
        self, device: torch.device, config: TrainingConfig = CONFIG, world: World = ALONE, seed: int = 1
    ) -> Training:
        """With a copy of the captioner on the device."""
        captioner = copy.deepcopy(self.captioner)
        return Training(captioner, self.batches, self.batches, config, seed, device, world)

    def packed(self, device: torch.device) -> CrossEntropy:
        return CrossEntropy(self.training(device), PackedSteps)

    def captured(self, device: torch.device, config: TrainingConfig = CONFIG, seed: int = 1) -> CrossEntropy:
        return CrossEntropy(self.training(device, config, seed=seed), CapturedSteps)


def per_token(objective: CrossEntropy, epochs: int = 3) -> list[float]:
    return [objective.train_epoch(number).loss.per_token for number in range(1, epochs + 1)]


@devices
@kinds
def test_captured_steps_come_to_what_packed_ones_do(device: torch.device, decoder: str, order: Order) -> None:
    task = Task(decoder, order)
    packed, captured = task.packed(device), task.captured(device)
    expected = per_token(packed)
    assert expected[-1] < expected[0]
    assert per_token(captured) == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(captured.steps.decoder.parameters(), packed.steps.decoder.parameters(), strict=True):
        assert float((ours - theirs).detach().norm()) <= 1e-2 * float(theirs.detach().norm()) + 1e-3


@devices
@pytest.mark.parametrize("world", [ALONE, World(0, 3), World(2, 3), World(19, 20)], ids="{0.rank} of {0.size}".format)
@kinds
def test_captured_steps_read_the_very_captions_and_photos(
    device: torch.device, decoder: str, order: Order, world: World
) -> None:
    task = Task(decoder, order)
    padded = task.batches.padded(device)
    epoch, whole = padded.epoch(1, 2, world), padded.epoch(1, 2)
    batches = list(task.batches.epoch(1, 2, world))
    assert epoch.targets == [len(batch.targets) if batch.share else 0 for batch in batches]
    assert epoch.shares.tolist() == pytest.approx([batch.share for batch in batches])
    assert (0 in epoch.targets) == (world.size == 20), "a batch of fewer units than ranks"
    assert epoch.lengths == whole.lengths, "the same on all ranks"
    assert epoch.views.shape[1] == -(-whole.views.shape[1] // world.size)
    for number, batch in enumerate(batches):
        views, captions, length = epoch.views[number], epoch.captions[number], epoch.lengths[number] + 2
        features, *each = padded.gather(views, captions, length)
        words, targets, real = (one.cpu() for one in each)
        rows = torch.arange(len(captions)).repeat(length) // (len(captions) // len(features))
        seen = features[:, 0, 0].cpu()[rows]
        found = zip(*(one[real].tolist() for one in (seen, words, targets)), strict=True)
        rows = batch.photos[torch.cat([torch.arange(count) for count in batch.counts])]
        expected = zip(
            batch.features[:, 0, 0].float()[rows].tolist(), batch.words.tolist(), batch.targets.tolist(), strict=True
        )
        assert sorted(found) == sorted(expected)


@devices
def test_an_optimizers_state_goes_from_steps_of_one_kind_to_the_other(device: torch.device) -> None:
    task = Task("merge", "captions")
    undisturbed = per_token(task.packed(device))
    for first, second in ((task.packed, task.captured), (task.captured, task.packed)):
        before, after = first(device), second(device)
        losses = per_token(before, 1)
        after.load_state_dict(TrainingState(**before.state_dict(), history=[]))
        losses += [after.train_epoch(number).loss.per_token for number in (2, 3)]
        assert losses == pytest.approx(undisturbed, rel=1e-4)


@devices
def test_captured_steps_are_the_same_when_taken_again(device: torch.device) -> None:
    """Dropout's masks too, in graphs or without."""
    config = TrainingConfig.model_validate(CONFIG.model_dump() | {"learning_rate": 1e-9, "weight_decay": 0})
    task = Task("merge", "captions", dropout=0.5)
    steps, others = task.captured(device, config).steps, task.captured(device, config, seed=2).steps
    once, again = ([step.loss.item() for step in steps.of_epoch(1)] for _ in range(2))
    assert once == pytest.approx(again, rel=1e-4)
    assert once != pytest.approx([step.loss.item() for step in others.of_epoch(1)], rel=1e-4)


@pytest.mark.parametrize(("decoder", "order"), combined(["merge", "attention"], ["captions", "photos"]))
def test_what_a_graph_replays_is_what_the_step_computes(decoder: str, order: Order) -> None:
    """Held against a recorder on the CPU, with dropout: nothing of an earlier step is left in a replay."""
    task = Task(decoder, order, dropout=0.3)
    with as_on_a_gpu(steps):
        replayed = task.captured(CPU)
        found = per_token(replayed, 2)
        assert isinstance(replayed.steps, CapturedSteps)
        assert isinstance(replayed.steps._graphs, RecordedGraphs)
        assert any(replayed.steps._graphs.recorded.values())
    with as_on_a_gpu():
        assert found == per_token(task.captured(CPU), 2)


def test_steps_are_packed_on_a_cpu_and_on_a_gpu_without_room_for_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capexp.data.batches._free_memory", lambda device: 1000)
    for device in (CPU, torch.device("cuda")):
        training = replace(Task("merge", "captions").training(CPU), device=device)
        assert isinstance(choose_steps(training, training.decoder), PackedSteps)


@pytest.mark.parametrize(
    ("texts", "order"),
    [
        ([["a dog runs"]] * 100 + [["word " * 2000]], "captions"),
        ([["a dog"] * 5] * 50 + [["a dog"] * 500], "photos"),
    ],
    ids=["one long caption", "one photo of many captions"],
)
def test_what_would_be_padding_for_the_most_part_is_packed(
    texts: list[list[str]], order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split("train", Path(), tuple(map(str, range(len(texts)))), tuple(map(tuple, texts)))
    vocabulary = build_vocabulary((one for photo in texts for one in photo), VocabularyConfig(minimum_count=1))
    features = Features(np.zeros((len(texts), 1, 512), np.float16), np.arange(len(texts)))
    batches = CaptionBatches(split, vocabulary, features, 32, order)
    training = replace(Task("merge", "captions").training(torch.device("cuda")), train=batches)
    monkeypatch.setattr(CaptionBatches, "preload", lambda batches, device: True)
    assert batches.padding() > 5
    assert isinstance(choose_steps(training, training.decoder), PackedSteps)


def test_a_batch_is_no_larger_than_all_captions_are() -> None:
    task = Task("merge", "captions")
    whole = CaptionBatches(task.split, task.vocabulary, task.features, 100_000, "captions")
    epoch = whole.padded(CPU).epoch(1, 1)
    assert epoch.views.shape == epoch.captions.shape == (1, sum(len(texts) for texts in task.split.references))
    assert whole.padding() < 3


def test_there_are_few_lengths_and_none_is_beyond_the_longest() -> None:
    for longest in (1, 2, 7, 30, 1000):
        rounded = [rounded_length(length, longest) for length in range(1, longest + 1)]
        assert all(length <= one <= min(longest, 1.5 * length + 1) for length, one in enumerate(rounded, 1))
        assert len(set(rounded)) <= 4 * longest.bit_length()


@pytest.mark.gpu
@kinds
def test_an_epoch_on_a_gpu_waits_for_it_at_its_looks_at_the_loss_only(decoder: str, order: Order) -> None:
    task, device = Task(decoder, order), torch.device("cuda")
    objective = CrossEntropy(task.training(device))
    assert isinstance(objective.steps, CapturedSteps)
    per_token(objective, 2)  # what is captured is waited for
    told = waits_for_gpu(lambda: objective.train_epoch(3))
    assert len(told) <= 2, told


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_cross_entropy_is_the_cpus(smoothing: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Task("merge", "captions").training(CPU).decoder.vocabulary
    outputs, targets = torch.randn(70, layer.in_features), torch.randint(len(layer.weight), (70,))
    real = torch.rand(70) < 0.7
    found = []
    for device in ("cpu", "cuda"):
        there, read = copy.deepcopy(layer).to(device), outputs.to(device, copy=True).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            nats, loss = there.cross_entropy(read, targets.to(device), smoothing, real.to(device))
        torch.autograd.backward(loss)
        assert read.grad is not None and there.weight.grad is not None and there.bias.grad is not None
        found.append([one.detach().cpu() for one in (nats, loss, read.grad, there.weight.grad, there.bias.grad)])
    for cpu, gpu in zip(*found, strict=True):
        assert float((cpu - gpu).norm()) <= (1e-5 if dtype == torch.float32 else 2e-2) * float(cpu.norm())
