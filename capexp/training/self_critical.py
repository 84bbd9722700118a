"""Training on the score itself: captions are drawn, and made more or less probable by what they are worth.

Self-critical sequence training (Rennie et al., CVPR 2017), with CIDEr-D as the reward and, in place of a greedy
caption's, the mean reward of the photo's other captions as the baseline (Luo, 2020).

Shapes: N photos, K captions of each, B = N * K, T steps, M targets, V vocabulary.
"""

import math
import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.decoding import draw
from capexp.captioning.evaluation import Loss
from capexp.data.batches import Batch, CaptionBatches, photo_batches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vgg16 import use_bfloat16
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.distributed import ALONE, Ranks
from capexp.errors import InputError
from capexp.metrics.cider import CiderReferences
from capexp.metrics.scores import score, tokenize
from capexp.training.checkpoints import Checkpoints, Progress, TrainingState
from capexp.training.config import SelfCriticalConfig, TrainingConfig
from capexp.training.epoch import Epoch, Save, shared_cross_entropy
from capexp.training.fit import state_of_first
from capexp.training.steps import clip, learning_rate, seed_step

_END = ""  # where a caption ends is part of what is rewarded: otherwise it comes to end on "in a"
_PART = 512  # dev photos at a time


class Reward:
    """What captions of a split's photos are worth; the references' n-grams are counted once."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._people = CiderReferences([[(*tokenize(one), _END) for one in captions] for captions in references])

    def of(self, photo: int, caption: str) -> float:
        """CIDEr-D, times ten, of a caption of the photo in that place of the split."""
        return self._people.score(photo, (*tokenize(caption), _END))[0]

    def of_drawn(self, photos: list[int], drawn: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Of captions ``(B, T)``, as many of each photo: ``(B,)``."""
        samples = len(drawn) // len(photos)
        texts = [vocabulary.decode([entry for entry in row if entry not in (EOS, PAD)]) for row in drawn.tolist()]
        return torch.tensor([self.of(photos[i // samples], text) for i, text in enumerate(texts)])


def refine(
    captioner: Captioner,
    train: tuple[Split, Features],
    dev: tuple[Split, Features],
    train_batches: CaptionBatches,
    dev_batches: CaptionBatches,
    config: TrainingConfig,
    *,
    before: Sequence[Epoch],
    seed: int,
    device: torch.device,
    dev_digest: str,
    checkpoints: Checkpoints,
    ranks: Ranks = ALONE,
) -> Generator[Epoch, None, None]:
    """Goes on with the captioner of the best epoch ``before``; yields each new epoch when its checkpoint is on disk.

    Whether an epoch is an improvement is told by the CIDEr-D of the dev captions, decoded as the captioner decodes.
    ``checkpoints`` is a folder of this phase alone, which begins with that captioner; the first phase's stays as it is.
    A stopped and resumed training gives the same epochs as an undisturbed one, as that of :func:`fit` does. Of several
    processes each draws and rewards its share of every batch, from a generator of its own, so that what they come to
    depends on their number; the first alone decodes the dev captions.

    Raises:
        InputError: the loss or the logits are not finite any more, or the first phase has gone on since this one began.
    """
    settings = config.self_critical
    decoder = captioner.decoder.to(device)
    decoder.load_state_dict(ranks.from_first(decoder.state_dict))
    optimizer = torch.optim.Adam(
        [value for value in decoder.parameters() if value.requires_grad], lr=settings.learning_rate, fused=True
    )
    best = ranks.from_first(lambda: dev_cider(captioner, *dev))
    history, progress = list(before), Progress()

    def save(progress: Progress) -> None:
        if ranks.is_first:
            past = [vars(epoch) for epoch in history]
            checkpoints.save_state(TrainingState(decoder.state_dict(), optimizer.state_dict(), past, progress=progress))

    state = state_of_first(checkpoints, ranks)
    if state is None:
        if ranks.is_first:
            checkpoints.save_captioner(captioner)
        save(progress)
    else:
        decoder.load_state_dict(state.decoder)
        optimizer.load_state_dict(state.optimizer)
        history = [Epoch(**record) for record in state.history]
        progress = state.progress
        if ranks.is_first and history[: len(before)] != list(before):
            raise InputError(
                f"{checkpoints.folder}: self-critical training began after fewer epochs; delete the folder to do "
                "without what it did"
            )
        yield from history[len(before) :]
        best = max([best, *(epoch.dev_cider or 0 for epoch in history[len(before) :])])
    reward = Reward(train[0].references)
    while len(history) < len(before) + settings.epochs:
        number = len(history) + 1
        start = time.perf_counter() - progress.seconds
        drawn, mean = _train_epoch(
            captioner, optimizer, train[1], train_batches, reward, config, seed, number, len(before), device, ranks,
            progress, save,
        )  # fmt: skip
        middle = time.perf_counter()
        cider = ranks.from_first(lambda: dev_cider(captioner, *dev))
        epoch = Epoch(
            number=number,
            train_loss=drawn.per_token,
            dev_loss=shared_cross_entropy(decoder, dev_batches, ranks),
            learning_rate=learning_rate(settings, number - 1 - len(before)),
            seconds=time.perf_counter() - start,
            tokens_per_second=drawn.targets / (middle - start),
            improved=cider > best,
            ended_at=time.time_ns() // 1_000_000,
            reward=mean,
            dev_cider=cider,
        )
        history.append(epoch)
        if epoch.improved:
            best = cider
            captioner.training = TrainingRecord(
                epoch=number, train_loss=epoch.train_loss, dev_loss=epoch.dev_loss, dev_digest=dev_digest
            )
            if ranks.is_first:
                checkpoints.save_captioner(captioner)
        progress = Progress()
        save(progress)
        yield epoch


def dev_cider(captioner: Captioner, split: Split, features: Features) -> float:
    """CIDEr-D of a captioner's captions of a split, decoded as it says."""
    texts = [one.text for part in features.parts(_PART) for one in captioner.caption_features(part)]
    return score(texts, split.references).corpus()["cider"]


def _train_epoch(
    captioner: Captioner,
    optimizer: torch.optim.Optimizer,
    features: Features,
    batches: CaptionBatches,
    reward: Reward,
    config: TrainingConfig,
    seed: int,
    number: int,
    before: int,
    device: torch.device,
    ranks: Ranks,
    progress: Progress,
    save: Save,
) -> tuple[Loss, float]:
    """The loss over what was drawn, and its mean reward; ``progress`` and ``save`` are those of ``train_epoch``.

    There were so many epochs ``before`` this phase.
    """
    decoder, vocabulary, settings = captioner.decoder, captioner.vocabulary, config.self_critical
    assert isinstance(decoder, RecurrentDecoder), "an ensemble is not trained as one"
    start, steps = time.perf_counter() - progress.seconds, -(-len(features) // settings.photos)
    is_begun = progress.steps > 0 and ranks.is_first
    nats, targets, total, captions = progress.sums if is_begun else (0.0, 0.0, 0.0, 0.0)
    views = features.seen_in(seed, number)
    with torch.random.fork_rng():
        shares = photo_batches(features, settings.photos, seed, number, ranks.rank, ranks.count, progress.steps)
        for step, (photos, held, is_own) in enumerate(shares, start=progress.steps + 1):
            seed_step(seed, number, step, ranks.rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, number - 1 - before + (step - 1) / steps)
            seen = held.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device, config.precision)):
                decoder.eval()
                try:
                    drawn = draw(decoder, seen, vocabulary, settings.samples, captioner.decoding.maximum_length)
                except FloatingPointError as error:
                    raise _diverged(str(error), number, settings) from None
                rewards = reward.of_drawn(photos.tolist(), drawn, vocabulary)  # (B,)
                # Learnt with dropout, or the train photos' captions are soon known by heart; drawn without it, as
                # drawing by the very masks of the gradient has come to less.
                decoder.train()
                chosen = log_probabilities(decoder, seen, drawn, vocabulary)  # (M,)
                loss = policy_loss(chosen, drawn, advantages(rewards, settings.samples))
                said = batches.of_photos(photos, views).to(device) if settings.cross_entropy else None
                nats_said = _nats(decoder, said) if said is not None else loss.new_zeros(())
            own, own_said = (len(chosen), len(said.targets) if said is not None else 0) if is_own else (0, 0)
            whole, whole_said = ranks.add(own, own_said)
            loss = loss * (own / whole) + settings.cross_entropy * nats_said * (own_said / max(whole_said, 1))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            loss = ranks.add_gradients(decoder, loss)
            if ranks.is_first and not math.isfinite(loss.item()):
                raise _diverged(f"the loss is {loss.item()}", number, settings)
            clip(decoder, config.clip_norm)
            optimizer.step()
            if is_own:
                nats -= float(chosen.detach().sum())
                targets += len(chosen)
                total += float(rewards.sum())
                captions += len(rewards)
            if step % config.save_steps == 0 and step < steps:
                sums = tuple(ranks.add(nats, targets, total, captions))
                save(Progress(step, sums, time.perf_counter() - start))
    nats, all_targets, total, all_captions = ranks.add(nats, targets, total, captions)
    return Loss(nats, int(all_targets)), total / all_captions


def _nats(decoder: RecurrentDecoder, batch: Batch) -> Tensor:
    """The mean of what the targets of people's captions cost, to be minimised."""
    outputs = decoder.outputs(batch.features, batch.photos, batch.words, batch.counts)
    minimised: Tensor = decoder.vocabulary.cross_entropy(outputs, batch.targets)[1]
    return minimised


def _diverged(what: str, number: int, settings: SelfCriticalConfig) -> InputError:
    return InputError(
        f"{what} in epoch {number}; the best captioner before it is kept: "
        f"lower training.self_critical.learning_rate = {settings.learning_rate}"
    )


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """How much better than the photo's other captions each is, ``(B,)``; those of a photo sum to 0."""
    by_photo = rewards.view(-1, samples)  # (N, K)
    others = (by_photo.sum(1, keepdim=True) - by_photo) / (samples - 1)
    return (by_photo - others).flatten()


def log_probabilities(decoder: Decoder, features: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Of each target that is not PAD, ``(M,)``, among the entries that may be emitted."""
    photos = torch.arange(len(features), device=targets.device).repeat_interleave(len(targets) // len(features))
    inputs = torch.cat([torch.full_like(targets[:, :1], BOS), targets[:, :-1]], 1)
    inputs = inputs.where(inputs != EOS, PAD)
    real = targets != PAD  # (B, T)
    logits: Tensor = decoder(features, inputs, real, photos)  # (M, V)
    forbidden = torch.tensor(vocabulary.never_emitted, device=targets.device)
    values = logits.float().index_fill(1, forbidden, -torch.inf).log_softmax(1)
    return values.gather(1, targets[real].unsqueeze(1)).squeeze(1)


def policy_loss(chosen: Tensor, targets: Tensor, advantage: Tensor) -> Tensor:
    """Minus the log-probability of each target ``(M,)``, by its caption's advantage ``(B,)``, mean over targets.

    Its gradient is that of the expected reward, up to sign and scale (REINFORCE: Williams, 1992), as far as batches
    have as many targets as each other and are drawn as they are learnt. With dropout they are not quite: what is drawn
    for being probable, and worth little, may be made improbable without an end, so this is for a few epochs.
    """
    each = advantage.to(chosen.device).unsqueeze(1).expand_as(targets)[targets != PAD]  # (M,)
    return -(chosen * each).mean()
