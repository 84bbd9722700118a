"""Teacher-forced batches: every caption once, each with its own photo, targets one step ahead of inputs."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from capexp.data.batches import Batch, CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import BOS, EOS, Vocabulary, build_vocabulary
from capexp.distributed import World
from capexp.settings import VocabularyConfig

PHOTOS, BATCH_SIZE = 110, 2  # more captions than are sorted by length together


def _split() -> Split:
    """Photos of one to five captions, of one to nine words; the first word tells the photo."""
    rng = np.random.default_rng(7)
    references = tuple(
        tuple(f"photo{photo} caption{i}" + " word" * int(rng.integers(8)) for i in range(rng.integers(1, 6)))
        for photo in range(PHOTOS)
    )
    return Split("train", Path("photos"), tuple(f"{photo}.jpg" for photo in range(PHOTOS)), references)


SPLIT = _split()
CAPTIONS = [caption for captions in SPLIT.references for caption in captions]
VOCABULARY = build_vocabulary(CAPTIONS, VocabularyConfig(minimum_count=1))
# Photo i's features are i, in another order on disk than in the split.
ROWS = np.random.default_rng(8).permutation(PHOTOS)
RECORDS = np.empty((PHOTOS, 3, 2), np.float16)
RECORDS[ROWS] = np.arange(PHOTOS)[:, None, None]


@pytest.fixture(params=["captions", "photos"])
def batches(request: pytest.FixtureRequest) -> CaptionBatches:
    return CaptionBatches(SPLIT, VOCABULARY, Features(RECORDS, ROWS), BATCH_SIZE, request.param)


def read(batches: Iterable[Batch]) -> Iterator[tuple[str, int]]:
    """Each caption, as its targets spell it, with the photo that it sees."""
    for batch in batches:
        for (_, targets), row in zip(unpacked(batch), batch.photos, strict=True):
            (photo,) = set(batch.features[row].flatten().tolist())
            yield VOCABULARY.decode(targets), int(photo)


def unpacked(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Words and targets of each caption."""
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in batch.photos]
    pairs = zip(batch.words.tolist(), batch.targets.tolist(), strict=True)
    for count in batch.counts:
        for caption, (word, target) in zip(found[:count], pairs, strict=False):
            caption[0].append(word)
            caption[1].append(target)
    assert not list(pairs)
    return found


def photo_of(caption: str) -> int:
    return int(caption.split()[0].removeprefix("photo"))


def test_every_caption_comes_once_an_epoch(batches: CaptionBatches) -> None:
    assert len(CAPTIONS) > 64 * BATCH_SIZE
    for made in (batches.epoch(seed=1, number=1), batches.epoch(seed=1, number=2), batches.in_order()):
        assert Counter(caption for caption, _ in read(made)) == Counter(CAPTIONS)


def test_features_belong_to_the_captions_photos(batches: CaptionBatches) -> None:
    for made in (batches.epoch(seed=1, number=1), batches.in_order()):
        assert all(photo == photo_of(caption) for caption, photo in read(made))


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_each_batch_and_their_shares_make_one(batches: CaptionBatches, ranks: int) -> None:
    whole = list(batches.epoch(seed=1, number=1))
    shares = [list(batches.epoch(1, 1, World(rank, ranks))) for rank in range(ranks)]
    assert {len(one) for one in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        own = [part for part in parts if part.share]
        assert sorted(read([batch])) == sorted(read(own))
        assert [part.share for part in own] == pytest.approx([len(p.targets) / len(batch.targets) for p in own])
        assert sum(part.share for part in parts) == pytest.approx(1)
    assert any(part.share == 0 for part in shares[-1]), "a batch of fewer captions than processes"
    dev = [caption for rank in range(ranks) for caption, _ in read(batches.in_order(world=World(rank, ranks)))]
    assert Counter(dev) == Counter(CAPTIONS)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(batches: CaptionBatches) -> None:
    def order(seed: int, number: int) -> list[tuple[str, int]]:
        return list(read(batches.epoch(seed, number)))

    first = order(1, 1)
    assert first == order(1, 1)
    assert first != order(1, 2)
    assert first != order(2, 1)
    assert order(1, 2) != order(2, 1)


def test_batches_are_full_but_the_last_and_as_many_as_announced(batches: CaptionBatches) -> None:
    sizes = [len(batch.photos) for batch in batches.epoch(seed=1, number=1)]
    assert len(sizes) == len(batches)
    assert sum(sizes) == len(CAPTIONS)
    if batches.order == "captions":
        assert sum(size != BATCH_SIZE for size in sizes) <= 1


def test_in_the_order_of_photos_each_comes_once_with_all_its_captions() -> None:
    batches = CaptionBatches(SPLIT, VOCABULARY, Features(RECORDS, ROWS), 30, "photos")
    for made in (batches.epoch(seed=1, number=1), batches.in_order()):
        seen = []
        for batch in made:
            photos = batch.features[:, 0, 0].int().tolist()
            assert len(set(photos)) == len(photos)
            assert batch.photos.bincount().tolist() == [len(SPLIT.references[photo]) for photo in photos]
            seen += photos
        assert sorted(seen) == list(range(PHOTOS))
    assert len(CAPTIONS) / len(batches) == pytest.approx(30, rel=0.1)


def test_targets_are_words_one_step_ahead_and_nothing_is_padding(batches: CaptionBatches) -> None:
    for batch in batches.epoch(seed=1, number=1):
        assert len(batch.words) == len(batch.targets) == sum(batch.counts)
        assert batch.counts[0] == len(batch.photos)
        assert list(batch.counts) == sorted(batch.counts, reverse=True)
        for words, targets in unpacked(batch):
            assert words[0] == BOS and targets[-1] == EOS
            assert words[1:] == targets[:-1]
            assert all(word >= VOCABULARY.first_word for word in words[1:])


def test_announced_targets_are_those_of_an_epoch(batches: CaptionBatches) -> None:
    made = list(batches.epoch(seed=1, number=1))
    assert batches.targets == sum(len(batch.targets) for batch in made)
    assert batches.targets == sum(len(caption.split()) + 1 for caption in CAPTIONS)
    assert batches.longest == max(len(batch.counts) for batch in made) + 1


@pytest.mark.parametrize("batch_size", [1, 3, 10_000])
def test_targets_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    made = CaptionBatches(SPLIT, VOCABULARY, Features(RECORDS, ROWS), batch_size)
    assert sorted(read(made.epoch(seed=1, number=1))) == sorted((text, photo_of(text)) for text in CAPTIONS)


def test_shuffled_photos_give_each_caption_the_photo_named(batches: CaptionBatches) -> None:
    others: NDArray[np.int64] = np.roll(np.arange(PHOTOS), 1)
    seen = list(read(batches.in_order(others)))
    assert Counter(caption for caption, _ in seen) == Counter(CAPTIONS)
    assert all(photo == others[photo_of(caption)] != photo_of(caption) for caption, photo in seen)


def test_caption_without_a_known_word_has_one_target() -> None:
    vocabulary = Vocabulary(("dog",), "standard", "drop")
    split = Split("dev", Path("photos"), ("a.jpg",), (("A zebra .", "a dog"),))
    made = CaptionBatches(split, vocabulary, Features(RECORDS, ROWS[:1]), batch_size=2)
    (batch,) = made.in_order()
    assert unpacked(batch) == [([BOS, 3], [3, EOS]), ([BOS], [EOS])]
    assert (made.targets, made.longest) == (3, 3)


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("preloaded", [False, True])
def test_an_epoch_sees_each_photo_in_one_of_its_views_by_chance_and_measuring_in_none_but_itself(
    batches: CaptionBatches, preloaded: bool, others: int
) -> None:
    features = Features(RECORDS, ROWS)
    for other in range(1, others + 1):
        features = features.with_view(Features(RECORDS - 500 * other, ROWS))  # as view k photo i has features i - 500 k
    made = CaptionBatches(SPLIT, VOCABULARY, features, BATCH_SIZE, batches.order)
    if preloaded:
        made.preload(torch.device("cpu"))
    epochs = []
    for number in (1, 2):
        seen = list(read(made.epoch(seed=1, number=number)))
        assert Counter(caption for caption, _ in seen) == Counter(CAPTIONS)
        views = {photo_of(caption): photo for caption, photo in seen}
        assert all(views[photo_of(caption)] == photo for caption, photo in seen), "one view of a photo in an epoch"
        kinds = Counter((photo - view) / 500 for photo, view in views.items())
        assert sorted(kinds) == list(range(others + 1))
        assert all(count == pytest.approx(PHOTOS / (others + 1), rel=0.5) for count in kinds.values())
        shares = [batch for rank in (0, 1) for batch in made.epoch(1, number, World(rank, 2)) if batch.share]
        assert sorted(seen) == sorted(read(shares))
        epochs.append(views)
        drawn = [(photos, features) for photos, features, _ in made.photo_batches(7, seed=1, number=number)]
        assert {p: int(f[0, 0]) for photos, features in drawn for p, f in zip(photos, features, strict=True)} == views
    assert epochs[0] != epochs[1]
    assert all(photo == photo_of(caption) for caption, photo in read(made.in_order()))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_resumed_training_with_mirror_images_goes_on_with_the_views_that_an_earlier_version_drew(seed: int) -> None:
    features = Features(RECORDS, ROWS).with_view(Features(-RECORDS, ROWS))
    is_mirrored = np.random.default_rng([seed, 3, 7]).random(PHOTOS) < 0.5
    np.testing.assert_array_equal(features.draw_views(seed, 3), np.arange(PHOTOS) + PHOTOS * is_mirrored)


def test_all_captions_of_some_photos(batches: CaptionBatches) -> None:
    photos = [17, 3, PHOTOS - 1]
    found = sorted(read([batches.captions_of(np.array(photos), seed=1, number=1)]))
    assert found == sorted((caption, photo) for photo in photos for caption in SPLIT.references[photo])


def test_batches_of_preloaded_features_are_the_same(batches: CaptionBatches) -> None:
    before = [batch.to(torch.device("cpu")) for batch in batches.epoch(seed=1, number=1)]
    batches.preload(torch.device("cpu"))
    after = [batch.to(torch.device("cpu")) for batch in batches.epoch(seed=1, number=1)]
    for one, other in zip(before, after, strict=True):
        assert one.features.dtype == torch.float32
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.words, other.words) and torch.equal(one.photos, other.photos)
