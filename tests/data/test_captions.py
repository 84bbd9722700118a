"""Captions in Flickr8k's format: what is read, and what is refused in one line that says where to look."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from capexp.data.batches import CaptionBatches
from capexp.data.caption_files import read_captions, read_list
from capexp.data.captions import Split, read_splits, read_texts
from capexp.data.features import Features
from capexp.data.vocabulary import Vocabulary, build_vocabulary
from capexp.errors import InputError
from capexp.settings import CaptionsConfig, VocabularyConfig

PHOTOS, TOKENS = "Flicker8k_Dataset", "Flickr8k.token.txt"
TRAIN, DEV, TEST = (f"Flickr_8k.{split}Images.txt" for split in ("train", "dev", "test"))


@pytest.fixture
def data(tmp_path: Path) -> CaptionsConfig:
    """A whole data set of three photos, two captions each, without a test list."""
    root = tmp_path / "data"
    (root / PHOTOS).mkdir(parents=True)
    names = ("one.jpg", "two.jpg", "three.jpg")
    for name in names:
        (root / PHOTOS / name).touch()
    lines = [f"{name}#{index}\t{name[:-4]} dog runs {index} .\n" for index in range(2) for name in names]
    (root / TOKENS).write_text("".join(lines))
    (root / TRAIN).write_text("two.jpg\none.jpg\n")
    (root / DEV).write_text("three.jpg\n")
    return CaptionsConfig(root=root)


def test_split_keeps_the_order_of_its_list_and_the_captions_of_each_photo(data: CaptionsConfig) -> None:
    splits = read_splits(data, ("train", "dev"))
    assert splits["train"].photos == ("two.jpg", "one.jpg")
    assert splits["train"].references[0] == ("two dog runs 0 .", "two dog runs 1 .")
    assert splits["dev"].paths() == [data.root / PHOTOS / "three.jpg"]


def test_list_that_nobody_asks_for_may_be_missing(data: CaptionsConfig) -> None:
    assert set(read_splits(data, ("train",))) == {"train"}
    (data.root / DEV).unlink()
    assert set(read_splits(data, ("train",))) == {"train"}


def test_byte_order_mark_line_ends_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    plain, dressed = tmp_path / "plain", tmp_path / "dressed"
    plain.write_bytes(b"a.jpg#0\tA caf\xc3\xa9 .\na.jpg#1\tTwo dogs .\n")
    dressed.write_bytes(b"\xef\xbb\xbfa.jpg#0\tA caf\xc3\xa9 .\r\n\r\na.jpg#1\tTwo dogs . ")
    assert read_captions(plain).captions == read_captions(dressed).captions == {"a.jpg": ("A café .", "Two dogs .")}


def test_key_is_cut_at_its_last_sign_and_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    path.write_text("x_1.jpg#0\tA dog .\nx_1.jpg.1#0\tA cat .\na#b.jpg#12\tA cow .\n")
    assert read_captions(path).captions == {"x_1.jpg": ("A dog .",), "x_1.jpg.1": ("A cat .",), "a#b.jpg": ("A cow .",)}


def test_names_may_lie_in_folders_below(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("2014/a..b.jpg\n  c d.jpg  \n")
    assert read_list(path) == ("2014/a..b.jpg", "c d.jpg")


def test_digest_depends_on_photos_captions_and_order(data: CaptionsConfig) -> None:
    split = read_splits(data, ("train",))["train"]
    others = (
        Split(split.name, split.folder, split.photos[::-1], split.references),
        Split(split.name, split.folder, split.photos, (split.references[0], ("another",))),
    )
    assert split.digest() == Split("dev", Path("elsewhere"), split.photos, split.references).digest()
    assert len({split.digest(), *(other.digest() for other in others)}) == 3


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        (".", None, ("data: no such folder", "captions.root")),
        (PHOTOS, None, (f"{PHOTOS}: no such folder", "captions.photos")),
        (TOKENS, None, (f"{TOKENS}: no such captions file",)),
        (DEV, None, (f"{DEV}: no such list",)),
        (TOKENS, "", (f"{TOKENS}: no captions",)),
        (TOKENS, "one.jpg#0\tA dog .\n\none.jpg A dog .\n", (f"{TOKENS}, line 3:", "'one.jpg A dog .'")),
        (TOKENS, "one.jpg#0 A dog .\n", (f"{TOKENS}, line 1:", "'one.jpg#0 A dog .'")),
        (TOKENS, "one.jpg\tA dog .\none.jpg#1\tA dog .\n", (f"{TOKENS}, line 1:", "photo.jpg#0<TAB>caption")),
        (TOKENS, "one.jpg#\tA dog .\n", (f"{TOKENS}, line 1:",)),
        (TOKENS, "one.jpg#x\tA dog .\n", (f"{TOKENS}, line 1:",)),
        (TOKENS, "#0\tA dog .\n", (f"{TOKENS}, line 1:",)),
        (TOKENS, "one.jpg#0\t \n", (f"{TOKENS}, line 1:",)),
        (TOKENS, "one.jpg#0\tA dog .\none.jpg#1\tA caf\udce9 .\n", (f"{TOKENS}, line 2:", "0xe9", "UTF-8")),
        (TRAIN, "one.jpg\n\udcff\n", (f"{TRAIN}, line 2:", "0xff", "UTF-8")),
        (TRAIN, "", (f"{TRAIN}: the list is empty",)),
        (TRAIN, "\n  \n", (f"{TRAIN}: the list is empty",)),
        (TRAIN, "one.jpg\ntwo.jpg\none.jpg\n", (f"{TRAIN}, line 3:", "'one.jpg'", "line 1")),
        (TRAIN, "one.jpg\n../x.jpg\n", (f"{TRAIN}, line 2:", "'../x.jpg' is empty or leaves")),
        (TRAIN, "a/../../x.jpg\n", (f"{TRAIN}, line 1:", "'a/../../x.jpg' is empty or leaves")),
        (TRAIN, "/x.jpg\n", (f"{TRAIN}, line 1:", "'/x.jpg' is empty or leaves")),
        (TRAIN, "photos\\x.jpg\n", (f"{TRAIN}, line 1:", "is a Windows path; write 'photos/x.jpg'")),
        (TRAIN, "x\0.jpg\n", (f"{TRAIN}, line 1:", "x\\x00.jpg' is empty or leaves")),
        (DEV, "three.jpg\none.jpg\n", (TRAIN, DEV, "share 1 photos", "one.jpg")),
        (TEST, "one.jpg\ntwo.jpg\n", (TRAIN, TEST, "share 2 photos", "one.jpg, two.jpg")),
        (TOKENS, "one.jpg#0\tA dog .\nthree.jpg#0\tA dog .\n", (f"{TRAIN}: 1 of", "no captions", TOKENS, "two.jpg")),
        (DEV, "a\nb\nc\nd\ne\n", (f"{DEV}: 5 of", "no captions", "a, b, c and 2 more")),
        (f"{PHOTOS}/two.jpg", None, (f"{TRAIN}: 1 of", f"not in {{root}}/{PHOTOS}", "two.jpg")),
    ],
)
def test_fault_is_refused_in_one_line_that_names_the_place(
    data: CaptionsConfig, file: str, content: str | None, parts: tuple[str, ...]
) -> None:
    path = data.root / file
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(InputError) as caught:
        read_splits(data, ("train", "dev"))
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    for part in parts:
        assert part.format(root=data.root) in line


def test_all_that_is_missing_in_all_splits_is_told_at_once(data: CaptionsConfig) -> None:
    (data.root / PHOTOS / "two.jpg").unlink()
    with (data.root / DEV).open("a") as file:
        file.write("new.jpg\n")
    with pytest.raises(InputError) as caught:
        read_splits(data, ("train", "dev"))
    for part in (
        f"{TRAIN}: 1 of its train photos are not in",
        "two.jpg",
        f"{DEV}: 1 of its dev photos have no captions",
    ):
        assert part in str(caught.value)


def test_missing_photos_are_counted_and_the_first_few_named(data: CaptionsConfig) -> None:
    names = [f"{number}.jpg" for number in range(10)]
    with (data.root / TOKENS).open("a") as file:
        file.writelines(f"{name}#0\tA dog .\n" for name in names)
    (data.root / DEV).write_text("\n".join(names))
    with pytest.raises(
        InputError, match=r"10 of its dev photos are not in .*: 0\.jpg, 1\.jpg, 2\.jpg and 7 more"
    ) as caught:
        read_splits(data, ("dev",))
    named = re.search(r"\(all of them are in (\S+)\)", str(caught.value))
    assert named is not None
    assert Path(named[1]).read_text().splitlines() == names


COCO = {
    "images": [
        {"id": 1, "file_name": "one.jpg"},
        {"id": 2, "file_name": "two.jpg"},
        {"id": 3, "file_name": "three.jpg"},
    ],
    "annotations": [{"image_id": number, "caption": f" A dog\nruns {number} ."} for number in (3, 1, 2, 1)],
}
KARPATHY = {
    "dataset": "ours",
    "images": [
        {"filename": "one.jpg", "split": "train", "sentences": [{"raw": "A dog .", "tokens": ["a", "dog"]}]},
        {"filepath": ".", "filename": "three.jpg", "split": "val", "sentences": [{"raw": "A cat ."}]},
        {"filename": "two.jpg", "split": "restval", "sentences": [{"raw": "A cow ."}, {"raw": "Cows ."}]},
    ],
}


def as_json(data: CaptionsConfig, content: object, splits: str) -> CaptionsConfig:
    (data.root / "captions.json").write_text(json.dumps(content))
    return CaptionsConfig.model_validate(data.model_dump() | {"captions": Path("captions.json"), "splits": splits})


def test_cocos_annotations_go_with_lists(data: CaptionsConfig) -> None:
    splits = read_splits(as_json(data, COCO, "lists"))
    assert splits["train"].photos == ("two.jpg", "one.jpg")
    assert splits["train"].references == (("A dog runs 2 .",), ("A dog runs 1 .", "A dog runs 1 ."))
    assert splits["dev"].references == (("A dog runs 3 .",),)


def test_karpathys_file_tells_the_splits_itself(data: CaptionsConfig) -> None:
    for split in (TRAIN, DEV):
        (data.root / split).unlink()
    splits = read_splits(as_json(data, KARPATHY, "karpathy"), ("train", "dev"))
    assert splits["train"].photos == ("one.jpg", "two.jpg")
    assert splits["train"].references == (("A dog .",), ("A cow .", "Cows ."))
    assert splits["dev"].paths()[0].samefile(data.root / PHOTOS / "three.jpg")


def test_both_formats_of_the_same_captions_have_one_digest(data: CaptionsConfig) -> None:
    plain = read_splits(data, ("dev",))["dev"]
    sentences = [{"raw": caption} for caption in plain.references[0]]
    images = [{"filename": "three.jpg", "split": "val", "sentences": sentences}]
    assert read_splits(as_json(data, {"images": images}, "karpathy"), ("dev",))["dev"].digest() == plain.digest()


def image(**changes: object) -> dict[str, object]:
    return {"filename": "one.jpg", "split": "train", "sentences": [{"raw": "A dog ."}]} | changes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([], ("no captions in it", "Karpathy")),
        ({"images": [{"filename": "one.jpg", "sentences": [{}]}]}, ("images.0.sentences.0.raw: field required",)),
        ({"images": [image(), image(filename="../x.jpg")]}, ("images.1: '../x.jpg' is empty or leaves",)),
        ({"images": [image(filename=None)]}, ("images.0: has no file_name",)),
        ({"images": [image(), image()]}, ("images.1: 'one.jpg' is there already",)),
        ({"images": [image(split="held")]}, ("images.0: split = 'held' of one.jpg", "train, restval, val, dev")),
        ({"images": [image(), image(filename="two.jpg", split=None)]}, ("1 photos have no split", "two.jpg")),
        ({"images": [image(sentences=[{"raw": " "}])]}, ("one.jpg has an empty caption",)),
        ({"images": [image(sentences=[])]}, ("no captions in it",)),
        ({"images": [image()]}, ("no photo of it has the split dev", "captions.splits")),
        (COCO, ("no photo of it has the split train",)),
        ({"images": [image(id=1)], "annotations": [{"image_id": 7, "caption": "A dog ."}]}, ("no image has the id 7",)),
    ],
)
def test_fault_in_json_is_refused_in_one_line(data: CaptionsConfig, content: object, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        read_splits(as_json(data, content, "karpathy"), ("train", "dev"))
    line = str(caught.value)
    assert line.startswith(f"{data.root}/captions.json")
    assert len(line.splitlines()) == 1
    for part in parts:
        assert part in line


def test_json_that_is_cut_short_is_refused(data: CaptionsConfig) -> None:
    config = as_json(data, COCO, "lists")
    content = (data.root / "captions.json").read_bytes()
    (data.root / "captions.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"captions\.json: the file: invalid JSON: EOF"):
        read_splits(config, ("train",))


def changed(config: CaptionsConfig, **settings: object) -> CaptionsConfig:
    return CaptionsConfig.model_validate(config.model_dump() | settings)


def test_lists_may_lack_the_endings_of_the_photos(data: CaptionsConfig) -> None:
    with_endings = read_splits(data)
    (data.root / TRAIN).write_text("two\none\n")
    assert read_splits(data) == with_endings
    (data.root / TOKENS).write_text((data.root / TOKENS).read_text().replace(".jpg", ""))
    assert read_splits(data) == with_endings
    (data.root / TRAIN).write_text("two.jpg\none.jpg\n")
    assert read_splits(data) == with_endings
    (data.root / TRAIN).write_text("two.png\none.jpg\n")
    with pytest.raises(InputError, match=r"1 of its train photos are not in .*: two\.png;"):
        read_splits(data)


@pytest.mark.parametrize(
    ("train", "dev", "told"),
    [
        ("one\none.jpg\n", "three.jpg\n", "'one.jpg' and 'one' are the same photo; delete one"),
        ("one\n", "one.jpg\n", "share 1 photos: one.jpg"),
        ("two\n", "three.jpg\n", "'two' may be two.jpg or two.png; write the ending"),
    ],
)
def test_names_without_endings_hide_no_double(data: CaptionsConfig, train: str, dev: str, told: str) -> None:
    (data.root / PHOTOS / "two.png").touch()
    with (data.root / TOKENS).open("a") as file:
        file.write("two.png#0\tA cat .\n")
    (data.root / TRAIN).write_text(train)
    (data.root / DEV).write_text(dev)
    with pytest.raises(InputError, match=re.escape(told)):
        read_splits(data)


def test_a_photo_is_found_in_whichever_unicode_form_its_name_is_on_disk(data: CaptionsConfig) -> None:
    names = ("Übung strand.jpg", "mon café.jpg", "below/Đà Nẵng.jpg")
    (data.root / PHOTOS / "below").mkdir()
    for name in names:
        (data.root / PHOTOS / unicodedata.normalize("NFD", name)).touch()
    (data.root / TOKENS).write_text("".join(f"{name}#0\tA dog .\n" for name in names))
    (data.root / TRAIN).write_text("\n".join(name.removesuffix(".jpg") for name in names[:2]))
    (data.root / DEV).write_text(unicodedata.normalize("NFD", names[2]))
    splits = read_splits(data)
    assert splits["train"].photos + splits["dev"].photos == names
    assert all(path.is_file() for split in splits.values() for path in split.paths())


def random_splits(root: Path, photos: int, reverse: bool = False, **settings: object) -> dict[str, tuple[str, ...]]:
    names = [f"{number}.jpg" for number in range(photos)]
    (root / PHOTOS).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / PHOTOS / name).touch()
    (root / TOKENS).write_text("".join(f"{name}#0\tA dog .\n" for name in (names[::-1] if reverse else names)))
    config = changed(CaptionsConfig(root=root), splits="random", **settings)
    return {name: split.photos for name, split in read_splits(config).items()}


def test_random_splits_hold_each_photo_once_and_depend_on_seed_and_names_alone(tmp_path: Path) -> None:
    drawn = random_splits(tmp_path / "one", 40)
    assert {name: len(photos) for name, photos in drawn.items()} == {"train": 32, "dev": 4, "test": 4}
    assert sorted(photo for photos in drawn.values() for photo in photos) == sorted(f"{i}.jpg" for i in range(40))
    assert random_splits(tmp_path / "two", 40, reverse=True) == drawn
    assert drawn["dev"] == ("22.jpg", "35.jpg", "27.jpg", "3.jpg"), "the same on every machine"
    assert random_splits(tmp_path / "one", 40, split_seed=2) != drawn
    few = random_splits(tmp_path / "few", 3, test_fraction=0.0)
    assert {name: len(photos) for name, photos in few.items()} == {"train": 2, "dev": 1}
    with pytest.raises(InputError, match="2 photos are too few"):
        random_splits(tmp_path / "none", 2)


def test_recorded_photos_replace_a_new_draw(tmp_path: Path) -> None:
    drawn = random_splits(tmp_path, 40)
    random_splits(tmp_path, 50)  # ten photos more
    config = changed(CaptionsConfig(root=tmp_path), splits="random")
    assert read_splits(config)["dev"].photos != drawn["dev"]
    recorded = {name: split.photos for name, split in read_splits(config, None, drawn).items()}  # type: ignore[arg-type]
    assert recorded == drawn
    assert read_texts(config, "dev", drawn) == ["A dog ."] * 4  # type: ignore[arg-type]


def test_fractions_must_leave_train_photos(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"dev_fraction = 0\.5 and captions\.test_fraction = 0\.5 leave no train photos"
    ):
        CaptionsConfig(root=tmp_path, dev_fraction=0.5, test_fraction=0.5)


def test_each_split_may_have_its_own_captions_file_and_photo_folder(data: CaptionsConfig) -> None:
    """The same names in two folders are two photos."""
    for folder in ("train2017", "val2017"):
        (data.root / folder).mkdir()
        (data.root / folder / "1.jpg").touch()
        (data.root / folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": f"of {folder}"}))
    (data.root / "notes").mkdir()
    (data.root / "notes" / "train.json").write_text((data.root / "train2017" / "metadata.jsonl").read_text())
    own = changed(data, splits="files", train="train2017/metadata.jsonl", dev="val2017/metadata.jsonl")
    for config in (own, changed(own, train="notes/train.json", train_photos="train2017")):
        splits = read_splits(config)
        assert list(splits) == ["train", "dev"]
        assert splits["train"].references == (("of train2017",),)
        assert splits["dev"].paths() == [data.root / "val2017" / "1.jpg"]
        assert read_texts(config, "train") == ["of train2017"] and read_texts(config, "test") is None
    with pytest.raises(InputError, match=r"share 1 photos: 1\.jpg"):
        read_splits(changed(own, dev="notes/train.json", dev_photos="train2017"))
    with pytest.raises(InputError, match=r"no such folder of photos; set captions\.root or captions\.dev_photos"):
        read_splits(changed(own, dev_photos="nowhere"))


@pytest.mark.parametrize("splits", ["random", "karpathy"])
def test_a_photo_under_two_spellings_is_refused(data: CaptionsConfig, splits: str) -> None:
    rows = [
        "image,caption,split",
        "one.jpg,A dog,train",
        "one,A cat,val",
        "two.jpg,A cow,test",
        "three.jpg,A fox,train",
    ]
    (data.root / "captions.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"share 1 photos: one|'one' and 'one\.jpg' are the same photo"):
        read_splits(changed(data, captions="captions.csv", splits=splits))


def test_folders_that_are_spelled_differently_hide_no_double(data: CaptionsConfig) -> None:
    (data.root / "train.csv").write_text("image,caption\none.jpg,A dog\n")
    (data.root / "link").symlink_to(data.root / PHOTOS)
    config = changed(data, splits="files", train="train.csv", dev="dev.csv", train_photos=PHOTOS)
    for name, folder in (("one.jpg", f"{PHOTOS}/../{PHOTOS}"), ("one", "link"), (f"{PHOTOS}/one.jpg", "link/..")):
        (data.root / "dev.csv").write_text(f"image,caption\n{name},A cat\n")
        with pytest.raises(InputError, match="share 1 photos"):
            read_splits(changed(config, dev_photos=folder))


def test_captions_of_a_split_that_the_file_lacks_are_none(data: CaptionsConfig) -> None:
    images = [{"filename": "three.jpg", "split": "val", "sentences": [{"raw": "A fox ."}]}]
    config = as_json(data, {"images": images}, "karpathy")
    assert read_texts(config, "train") is None and read_texts(config, "dev") == ["A fox ."]


def test_a_name_too_long_for_a_file_is_a_missing_photo(data: CaptionsConfig) -> None:
    long = f"{'x' * 300}.jpg"
    with (data.root / TOKENS).open("a") as file:
        file.write(f"{long}#0\tA dog .\n")
    (data.root / DEV).write_text(f"{long}\n")
    with pytest.raises(InputError, match="1 of its dev photos are not in"):
        read_splits(data, ("dev",))


def train_and_dev(root: Path) -> tuple[Split, Split]:
    splits = read_splits(CaptionsConfig(root=root), ("train", "dev"))
    return splits["train"], splits["dev"]


def batches(split: Split, vocabulary: Vocabulary) -> CaptionBatches:
    one = Features(np.zeros((1, 1, 1), np.float16), np.zeros(len(split.photos), np.int64))
    return CaptionBatches(split, vocabulary, one, batch_size=64)


def words_of(split: Split, config: VocabularyConfig) -> Vocabulary:
    return build_vocabulary((text for texts in split.references for text in texts), config)


def test_flickr8k_has_6000_train_and_1000_dev_photos_and_none_in_both(flickr8k: Path) -> None:
    train, dev = train_and_dev(flickr8k)
    assert (len(set(train.photos)), len(set(dev.photos))) == (6000, 1000)
    assert not set(train.photos) & set(dev.photos)
    assert {len(texts) for texts in train.references + dev.references} == {5}


def test_flickr8k_odd_key_is_a_photo_of_its_own_in_no_split(flickr8k: Path) -> None:
    captions = read_captions(flickr8k / TOKENS).captions
    odd, plain = "2258277193_586949ec62.jpg.1", "2258277193_586949ec62.jpg"
    assert captions[odd] == ("people waiting for the subway",)
    assert len(captions[plain]) == 4 and captions[odd][0] not in captions[plain]
    assert all(not {odd, plain} & set(split.photos) for split in train_and_dev(flickr8k))


def test_flickr8k_with_the_tutorials_cleaning_has_the_tutorials_numbers(flickr8k: Path) -> None:
    train, dev = train_and_dev(flickr8k)
    vocabulary = words_of(train, VocabularyConfig(cleaning="tutorial", minimum_count=1, unknown="drop"))
    # The tutorial counts PAD and takes its BOS and EOS ("startseq", "endseq") for words: as many entries as here.
    assert len(vocabulary) == 7579
    assert batches(train, vocabulary).longest == 34
    assert batches(train, vocabulary).targets == 306_404
    assert batches(dev, vocabulary).targets == 50_903


def test_flickr8k_with_standard_cleaning_has_2540_entries_and_59504_dev_targets(flickr8k: Path) -> None:
    train, dev = train_and_dev(flickr8k)
    vocabulary = words_of(train, VocabularyConfig(cleaning="standard", minimum_count=5, unknown="token"))
    assert len(vocabulary) == 2540
    assert batches(dev, vocabulary).targets == 59_504
