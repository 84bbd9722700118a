"""Laws of training on the score itself."""

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CPU, checkpoints_in, identity, waits_for_gpu
from teacher_forcing import logits_of

from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import RecurrentDecoder
from capexp.captioning.decoding import sample_captions
from capexp.captioning.model import build_decoder
from capexp.data.batches import CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.distributed import ALONE, World
from capexp.errors import InputError
from capexp.metrics.cider import CiderReferences
from capexp.metrics.scores import score, tokenize
from capexp.settings import DecodingConfig, ModelConfig, Schedule, SelfCriticalConfig, SplitName, TrainingConfig
from capexp.training.checkpoints import Checkpoints, TrainingState
from capexp.training.loop import Epoch, Training, fit
from capexp.training.optimizer import AdamW
from capexp.training.policy_steps import PolicySteps, choose_policy_steps, policy_loss
from capexp.training.reward import Reward, advantages
from capexp.training.self_critical import SelfCritical, dev_cider

BEFORE = (Epoch(1, 2.0, 2.0, 0.001, 1.0, 1.0, True, 0),)
COLOURS, THINGS = ("red", "blue", "green", "black"), ("dog", "cat", "car", "ball", "bird")
WORDS = Vocabulary((*COLOURS, *THINGS), "standard", "token")


def small(positions: int = 4) -> RecurrentDecoder:
    torch.manual_seed(0)
    config = ModelConfig(decoder="attention", embedding_size=6, lstm_units=6, dropout=0.5)
    return build_decoder(config, (positions, 5), len(WORDS)).eval()


def data(name: SplitName, photos: int, seed: int) -> tuple[Split, Features]:
    """Photos whose features tell a colour and a thing, with captions that say them."""
    rng = np.random.default_rng(seed)
    colours, things = rng.integers(0, 4, photos), rng.integers(0, 5, photos)
    features = np.zeros((photos, 49, 512), np.float16)
    features[np.arange(photos), rng.integers(0, 49, photos), colours] = 1
    features[np.arange(photos), rng.integers(0, 49, photos), 4 + things] = 1
    texts = tuple((f"{COLOURS[c]} {THINGS[t]}",) for c, t in zip(colours, things, strict=True))
    return Split(name, Path(), tuple(map(str, range(photos))), texts), Features(features, np.arange(photos))


def test_the_reward_is_cider_of_captions_whose_end_is_a_word() -> None:
    references = [["a red dog runs", "the dog is red"], ["two cats sleep"], ["a ball lies on the grass", "a ball"]]
    said = ["a red dog", "two cats sleep", "a ball on the"]
    words = sorted({word for photo in references for caption in photo for word in caption.split()})
    vocabulary = Vocabulary(tuple(words), "standard", "token", "words")
    reward = Reward(references, vocabulary)

    def rewards(*captions: str) -> list[float]:
        photos = range(3) if len(captions) == 3 else [2]
        return reward.of(photos, [[*vocabulary.encode(caption), EOS, PAD] for caption in captions]).tolist()

    ended = score([f"{one} zzz" for one in said], [[f"{one} zzz" for one in photo] for photo in references])
    assert rewards(*said) == pytest.approx(ended.cider.tolist())
    assert rewards("a ball lies on the grass") > rewards("a ball lies on the")


def test_the_reward_of_any_entries_is_that_of_their_text() -> None:
    odd = ("cannot", "t-shirt", "'s", "no.", "3", "j.", "the", "<b", "x>", "y'", "all", "'t", "is", "ph.d", "--", "dog")
    photos = [["no. 3 is the dog 's", "y' all cannot", "j. the"], ["<b dog x>", "'t is the t-shirt"], [""]]
    for rule in ("words", "whitespace"):
        vocabulary = Vocabulary(odd, "standard", "token", rule)
        people = CiderReferences([[(*tokenize(caption, rule), "") for caption in photo] for photo in photos])
        captions = [
            [*np.random.default_rng(i).integers(vocabulary.first_word, len(vocabulary), i % 9).tolist(), EOS, PAD]
            for i in range(200)
        ]
        own = [i % 3 for i in range(200)]
        texts = [vocabulary.decode(caption) for caption in captions]
        ids = [people.token_ids((*tokenize(text, rule), "")) for text in texts]
        found = Reward(photos, vocabulary).of(own, captions)
        assert (found > 0).sum() > 50
        np.testing.assert_allclose(found, people.score(own, ids)[:, 0], rtol=1e-6)


def test_a_captions_baseline_is_the_mean_of_the_others_of_its_photo() -> None:
    found = advantages(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    torch.testing.assert_close(found, torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))


def test_what_is_drawn_is_words_then_the_end_then_padding() -> None:
    decoder = small()
    drawn = sample_captions(decoder, torch.rand(50, 4, 5), WORDS, 4, maximum_length=6)
    assert drawn.shape[0] == 200 and drawn.shape[1] <= 6
    for row in drawn.tolist():
        length = row.index(EOS) if EOS in row else len(row)
        assert all(entry >= WORDS.first_word for entry in row[:length])
        assert all(entry == PAD for entry in row[length + 1 :])
    assert len({tuple(row) for row in drawn.tolist()}) > 100


@pytest.mark.parametrize("fixed", [False, True])
def test_captions_are_those_that_torch_draws_with_no_caption_left_out(fixed: bool) -> None:
    decoder, photos, count, most = small(), torch.rand(30, 4, 5), 4, 8
    forbidden = torch.tensor(WORDS.never_emitted)
    torch.manual_seed(2)
    with torch.no_grad():
        state, words = decoder.start(photos).repeat(count), torch.full((30 * count,), BOS)
        columns: list[torch.Tensor] = []
        ended = torch.zeros(30 * count, dtype=torch.bool)
        while len(columns) < most and not ended.all():
            logits, state = decoder.step(state, words)
            words = logits.index_fill(1, forbidden, -torch.inf).softmax(1).multinomial(1).squeeze(1)
            words = words.where(~ended, PAD)
            columns.append(words)
            ended |= words == EOS
    following = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(sample_captions(decoder, photos, WORDS, count, most, fixed), torch.stack(columns, 1))
    if not fixed:
        assert torch.equal(torch.rand(3), following), "as many random numbers"


@pytest.mark.gpu
def test_sampling_on_a_gpu_waits_only_at_its_end() -> None:
    decoder, photos = small().cuda(), torch.rand(30, 4, 5).cuda()
    sample_captions(decoder, photos, WORDS, 4, 8)
    waits = waits_for_gpu(lambda: sample_captions(decoder, photos, WORDS, 4, 8))
    assert len(waits) <= 2, waits


@pytest.mark.parametrize("fixed", [False, True])
def test_logits_that_are_not_finite_are_told(fixed: bool) -> None:
    decoder = small()
    with torch.no_grad():
        decoder.get_parameter("vocabulary.bias")[WORDS.first_word] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_captions(decoder, torch.rand(2, 4, 5), WORDS, 4, 8, fixed)


def test_captions_are_drawn_as_often_as_they_are_probable() -> None:
    decoder = small()
    photo = torch.rand(1, 4, 5)
    torch.manual_seed(1)
    drawn = sample_captions(decoder, photo, WORDS, 20_000, maximum_length=1)[:, 0]
    with torch.no_grad():
        logits = logits_of(decoder, photo, torch.tensor([[BOS]]))[0, 0]
    logits[list(WORDS.never_emitted)] = -torch.inf
    expected = 20_000 * logits.softmax(0)
    assert ((drawn.bincount(minlength=len(WORDS)) - expected).abs() < 5 * expected.clamp(min=1).sqrt()).all()


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Over all captions of one word, weighed by their probabilities, against the expectation itself."""
    decoder = small()
    photo = torch.rand(1, 4, 5)
    entries = torch.tensor([EOS, *range(WORDS.first_word, len(WORDS))])
    worth = torch.rand(len(entries))
    logits = logits_of(decoder, photo, torch.tensor([[BOS]]))[0, 0]
    logits = logits.index_fill(0, torch.tensor(WORDS.never_emitted), -torch.inf)
    probabilities = logits.softmax(0)[entries]
    (exact,) = torch.autograd.grad((probabilities * worth).sum(), [decoder.get_parameter("vocabulary.weight")])
    weighed = (probabilities * worth).detach() * len(entries)  # the loss is a mean over targets
    targets = entries.unsqueeze(1)
    loss = policy_loss(decoder, photo, targets, weighed, WORDS)[1]
    (ours,) = torch.autograd.grad(loss, [decoder.get_parameter("vocabulary.weight")])
    torch.testing.assert_close(-ours, exact)


def test_loss_and_gradients_are_those_of_captions_taken_one_by_one() -> None:
    decoder, features, count = small(), torch.rand(6, 4, 5), 4
    torch.manual_seed(4)
    samples = sample_captions(decoder, features, WORDS, count, maximum_length=6)  # (B, T)
    assert len({int((caption != PAD).sum()) for caption in samples}) > 2, "of different lengths"
    advantage = torch.randn(len(samples))
    nats, loss = policy_loss(decoder, features, samples, advantage, WORDS)
    parameters = dict(decoder.named_parameters())
    ours = torch.autograd.grad(loss, list(parameters.values()))
    total, weighted, targets = torch.zeros(()), torch.zeros(()), 0
    for row, caption in enumerate(samples):
        entries = [int(entry) for entry in caption if entry != PAD]
        state, word = decoder.start(features[row // count, None]), BOS
        for entry in entries:
            logits, state = decoder.step(state, torch.tensor([word]))
            logits = logits.index_fill(1, torch.tensor(WORDS.never_emitted), -torch.inf)
            surprise = -logits.log_softmax(1)[0, entry]
            total, weighted, targets, word = total + surprise, weighted + surprise * advantage[row], targets + 1, entry
    torch.testing.assert_close(nats, (total / targets).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, weighted / targets, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(weighted / targets, list(parameters.values()))
    for name, own, their in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-5 * float(their.abs().max()), msg=name)


class Task:
    """A captioner that knows nothing yet, and what it is to say."""

    def __init__(self, folder: Path, cross_entropy: float = 0.0) -> None:
        self.cross_entropy = cross_entropy
        self.checkpoints = checkpoints_in(folder)
        config = ModelConfig(decoder="attention", embedding_size=16, lstm_units=16, dropout=0.2)
        self.captioner = Captioner.fresh(config, WORDS, identity("max2"), DecodingConfig(maximum_length=4), seed=1)
        self.captioner.record = TrainingRecord(epoch=1, train_loss=2.0, dev_loss=2.0, dev_digest="d")

    def started(
        self,
        epochs: int,
        before: tuple[Epoch, ...] = BEFORE,
        world: World = ALONE,
        learning_rate: float = 0.03,
        schedule: Schedule = "constant",
        make_steps: Callable[[Training, int], PolicySteps] = choose_policy_steps,
        device: torch.device = CPU,
        seed: int = 1,
    ) -> Generator[Epoch, None, None]:
        config = TrainingConfig(
            precision="float32",
            save_steps=2,
            self_critical=SelfCriticalConfig(
                epochs=epochs,
                photos=8,
                samples=8,
                learning_rate=learning_rate,
                cross_entropy=self.cross_entropy,
                schedule=schedule,
            ),
        )
        train, dev = (
            CaptionBatches(split, WORDS, features, 8, "photos")
            for split, features in (data("train", 64, 1), data("dev", 20, 2))
        )
        training = Training(self.captioner, train, dev, config, seed, device=device, world=world)
        objective = SelfCritical(training, len(before), make_steps)
        return fit(training, objective, self.checkpoints if world.is_main else None, before)


def told(epochs: Iterable[Epoch]) -> list[tuple[int, float | None, float | None, float, bool]]:
    return [(one.number, one.reward, one.dev_cider, one.dev_loss, one.improved) for one in epochs]


def test_rewards_grow_and_dev_captions_with_them(tmp_path: Path) -> None:
    task = Task(tmp_path)
    before = dev_cider(task.captioner, *data("dev", 20, 2))
    epochs = list(task.started(10))
    rewards, ciders = [one.reward or 0 for one in epochs], [one.dev_cider or 0 for one in epochs]
    assert rewards[-1] > rewards[0] + 0.5
    assert max(ciders) > 1.5 * before
    assert [one.number for one in epochs] == list(range(2, 12))
    # The captioner on disk is that of the best dev CIDEr, and says what it said then.
    best = task.checkpoints.best()
    assert best is not None and best.name.startswith(f"ep{2 + ciders.index(max(ciders)):03d}-")
    assert dev_cider(Captioner.load(best), *data("dev", 20, 2)) == max(ciders)


@pytest.mark.slow
def test_peoples_captions_hold_the_likelihood_that_the_score_alone_gives_away(tmp_path: Path) -> None:
    (alone, *_), (held, *_) = (list(Task(tmp_path / str(weight), weight).started(4))[::-1] for weight in (0.0, 0.5))
    assert held.dev_loss < 0.8 * alone.dev_loss
    assert (held.reward or 0) > 0.8 * (alone.reward or 0)


def test_where_nothing_is_better_the_first_phases_captioner_stays(tmp_path: Path) -> None:
    task = Task(tmp_path)
    digest = task.captioner.digest()
    (epoch,) = task.started(1)
    best = task.checkpoints.best()
    assert best is not None
    assert epoch.improved == (best.name[:5] == "ep002")
    if not epoch.improved:
        assert Captioner.load(best).digest() == digest


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 2])
def test_stopped_and_resumed_it_gives_the_epochs_of_the_undisturbed_training(tmp_path: Path, stop_after: int) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    undisturbed = told(Task(tmp_path / "whole", 0.1).started(3))
    assert torch.equal(torch.rand(2), expected), "torch's generator is left alone"
    running = Task(tmp_path / "parts", 0.1).started(3)
    for _ in range(stop_after):
        next(running)
    running.close()
    assert told(Task(tmp_path / "parts", 0.1).started(3)) == undisturbed


def test_the_learning_rate_falls_to_zero_over_this_phase_alone_stopped_or_not(tmp_path: Path) -> None:
    steps = len(data("train", 64, 1)[1]) // 8
    rates: list[float] = []

    def step(self: AdamW, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        plain(self, closure)

    plain = AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        epochs = list(Task(tmp_path / "whole").started(2, schedule="cosine"))
    assert rates == pytest.approx([0.03 * (1 + math.cos(math.pi * i / (2 * steps))) / 2 for i in range(2 * steps)])
    assert [one.learning_rate for one in epochs] == pytest.approx([0.03, 0.015])
    running = Task(tmp_path / "parts").started(2, schedule="cosine")
    next(running)
    running.close()
    assert told(Task(tmp_path / "parts").started(2, schedule="cosine")) == told(epochs)


def test_stopped_after_every_state_it_gives_the_epochs_of_the_undisturbed_training(tmp_path: Path) -> None:
    undisturbed = told(Task(tmp_path / "whole").started(2))

    class Stopped(Exception):
        """Raised when a state is on disk."""

    class Stopping(Checkpoints):
        """Saves one state and stops."""

        def save_state(self, state: TrainingState) -> None:
            super().save_state(state)
            raise Stopped

    sittings = 0
    epochs: list[Epoch] = []
    while not epochs:
        sittings += 1
        task = Task(tmp_path / "parts")
        task.checkpoints = Stopping(tmp_path / "parts", 1)
        with suppress(Stopped):
            epochs = list(task.started(2))
    assert told(epochs) == undisturbed
    assert sittings == 1 + 2 * 4 + 1, (
        "before the first, after steps 2, 4 and 6, at the end of each epoch, and a last one"
    )


def test_a_first_phase_that_has_gone_on_is_refused(tmp_path: Path) -> None:
    list(Task(tmp_path).started(1))
    with pytest.raises(InputError, match="after fewer epochs; delete the folder"):
        next(Task(tmp_path).started(2, (*BEFORE, replace(BEFORE[0], number=2))))


@pytest.mark.parametrize("learning_rate", [1e30, 3e38])
def test_a_training_that_diverges_ends_with_the_remedy_and_keeps_the_captioner(
    tmp_path: Path, learning_rate: float
) -> None:
    task = Task(tmp_path)
    digest = task.captioner.digest()
    with pytest.raises(InputError, match=r"in epoch 2; .* is kept: lower training\.self_critical\."):
        list(task.started(1, learning_rate=learning_rate))
    best = task.checkpoints.best()
    assert best is not None and Captioner.load(best).digest() == digest
