"""Captions files in all formats: each is recognised by its content and read correctly."""

import csv
import io
import json
import logging
import re
import unicodedata
from pathlib import Path

import pytest

from capexp.data.caption_files import CaptionsFile, read_captions, read_list
from capexp.data.captions import read_splits
from capexp.errors import InputError
from capexp.settings import CaptionsConfig, CaptionsFormat

TWO = {"a.jpg": ("A dog runs .", "Two dogs , one ball ."), "b c.jpg": ("A cat sits .", 'It says " hello " .')}
"""Captions of two photos: with a comma, with quotation marks, and a name with a blank."""
ROWS = [(name, text) for name, texts in TWO.items() for text in texts]


def table(rows: list[tuple[object, ...]], separator: str) -> str:
    content = io.StringIO(newline="")
    csv.writer(content, delimiter=separator).writerows(rows)
    return content.getvalue()


def json_lines(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


BARS = "image_name| comment_number| comment\n" + "".join(
    f"{name}| {index}| {text}\n" for name, texts in TWO.items() for index, text in enumerate(texts)
)
COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b c.jpg"}],
    "annotations": [
        {"image_id": 7 + list(TWO).index(name), "caption": text.replace(" dog", "\n dog")} for name, text in ROWS
    ],
}
KARPATHY = {
    "images": [{"filename": name, "sentences": [{"raw": text} for text in texts]} for name, texts in TWO.items()]
}
FORMS = {
    "flickr8k": "".join(f"{name}#{i}\t{text}\n" for name, texts in TWO.items() for i, text in enumerate(texts)),
    "flickr30k's bars": BARS,
    "comma": table([("image", "caption"), *ROWS], ","),
    "semicolon": table([("File Name", "Text"), *ROWS], ";"),
    "tab": table([("filename", "comment"), *ROWS], "\t"),
    "another column first": table([("width", "image_path", "captions"), *((9, *row) for row in ROWS)], ","),
    "several columns": table([("file_name", "caption_1", "caption-2"), *((k, *v) for k, v in TWO.items())], ","),
    "numbered rows": table([("", "id", "image", "caption"), *((i, 7, *row) for i, row in enumerate(ROWS))], ","),
    "a list in a cell": table([("raw", "filename"), *((json.dumps(v), k) for k, v in TWO.items())], ","),
    "JSON lines": json_lines(*({"file_name": name, "text": text} for name, text in ROWS)),
    "JSON lines of lists": json_lines(*({"image": name, "captions": texts, "w": 3} for name, texts in TWO.items())),
    "a JSON list": json.dumps([{"image": name, "caption": text} for name, text in ROWS], indent=1),
    "a JSON object": json.dumps(TWO, indent=1),
    "a JSON object on one line": json.dumps(TWO),
    "coco": json.dumps(COCO),
    "coco, written over lines": json.dumps(COCO, indent=1),
    "karpathy": json.dumps(KARPATHY),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dressed", [False, True])
def test_every_form_gives_the_same_captions(tmp_path: Path, form: str, dressed: bool) -> None:
    content = FORMS[form]
    if dressed:  # as Windows programs write it
        content = "\ufeff" + content.replace("\r\n", "\n").replace("\n", "\r\n")
    (tmp_path / "captions.x").write_bytes(content.encode())
    assert read_captions(tmp_path / "captions.x").captions == TWO


def test_the_tutorials_descriptions_are_read_with_names_that_lack_their_ending(tmp_path: Path) -> None:
    path = tmp_path / "descriptions.txt"
    path.write_text("1000_b child in pink\n1000_b girl goes in\n1001_a dog\n2_c.jpg Two dogs , one ball .")
    captions = {"1000_b": ("child in pink", "girl goes in"), "1001_a": ("dog",), "2_c.jpg": ("Two dogs , one ball .",)}
    assert read_captions(path).captions == captions
    path.write_text("1000_b A dog , running .")  # it might be anything
    with pytest.raises(InputError, match="begins no known format"):
        read_captions(path)
    assert read_captions(path, "descriptions").captions == {"1000_b": ("A dog , running .",)}


def test_the_row_of_flickr30k_that_lacks_a_bar_is_read_as_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "results.csv").write_text(BARS.replace("| 1| Two", "| 1   Two"))
    with caplog.at_level(logging.WARNING):
        assert read_captions(tmp_path / "results.csv").captions == TWO
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/results.csv, line 3: no pipe after the caption's number 1")


def test_names_and_captions_are_composed(tmp_path: Path) -> None:
    """Names and captions in NFC and in NFD (as macOS may store names) give the same photos and captions."""
    name, text = "Übung café.jpg", "Một con chó ở Đà Nẵng"
    for form in ("NFC", "NFD"):
        (tmp_path / "captions").write_text(unicodedata.normalize(form, f"{name}#0\t{text}\n"))
        assert read_captions(tmp_path / "captions").captions == {name: (text,)}
        (tmp_path / "list").write_text(unicodedata.normalize(form, name))
        assert read_list(tmp_path / "list") == (name,)


def test_splits_are_read_where_a_table_or_record_has_them(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    rows = [("raw", "split", "filename"), ("A dog", "train", "a.jpg"), ("A cat", "validation", "b.jpg")]
    expected = CaptionsFile({"a.jpg": ("A dog",), "b.jpg": ("A cat",)}, {"train": ("a.jpg",), "dev": ("b.jpg",)})
    path.write_text(table(rows, ","))  # type: ignore[arg-type]
    assert read_captions(path) == expected
    path.write_text(json_lines(*(dict(zip(rows[0], row, strict=True)) for row in rows[1:])))
    assert read_captions(path) == expected


def test_what_is_wrong_with_splits_matters_only_if_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    faults = {
        "image,caption,split\na.jpg,A,train\na.jpg,B,test\n": "line 3: split = 'test', but a.jpg is in train already",
        "image,caption,split\na.jpg,A,fold1\n": "line 2: split = 'fold1' of a.jpg is none of train",
        "image,caption,split\na.jpg,A,Train\nb.jpg,B,\n": "line 3: split = '' of b.jpg is none of",
        json_lines(
            {"image": "a.jpg", "text": "A", "split": "VAL"}, {"image": "b.jpg", "text": "B"}
        ): "1 photos have no",
    }
    for content, fault in faults.items():
        path.write_text(content)
        file = read_captions(path)
        assert file.captions and file.split_fault is not None and fault in file.split_fault
        config = CaptionsConfig(root=tmp_path, photos=Path(), captions=Path("captions"), splits="karpathy")
        with pytest.raises(InputError, match=re.escape(fault)):
            read_splits(config)


def test_lists_that_pandas_wrote_and_empty_values_are_read_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    path.write_text(
        table([("image", "captions"), ("a.jpg", "['A dog runs.', \"It's\"]"), ("b.jpg", "[sic] a cat")], ",")
    )
    assert read_captions(path).captions == {"a.jpg": ("A dog runs.", "It's"), "b.jpg": ("[sic] a cat",)}
    path.write_text('{"image": "a.jpg", "caption_1": null, "caption_2": "A dog"}\n')
    assert read_captions(path).captions == {"a.jpg": ("A dog",)}


@pytest.mark.parametrize("indent", [0, 1, None])
def test_coco_is_told_from_records_however_it_is_written(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "captions"
    path.write_text(json.dumps(COCO, indent=indent))
    assert read_captions(path).captions == TWO
    lines = ",\n".join(json.dumps(image) for image in COCO["images"])
    notes = ",\n".join(json.dumps(note) for note in COCO["annotations"])
    path.write_text(f'{{"images": [\n{lines}\n], "annotations": [\n{notes}\n]}}')
    assert read_captions(path).captions == TWO


@pytest.mark.parametrize("content", ["", "\n", "5", "null", '"abc"'])
@pytest.mark.parametrize("form", ["csv", "json", "descriptions", "flickr8k", "coco", "karpathy"])
def test_a_form_that_is_named_refuses_what_is_none(tmp_path: Path, form: CaptionsFormat, content: str) -> None:
    (tmp_path / "captions").write_text(content)
    with pytest.raises(InputError):
        read_captions(tmp_path / "captions", form)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("one\ntwo\n", ("line 1: 'one' begins no known format", "image,caption", "captions.format")),
        ("a.jpg,A dog runs\n", ("line 1:", "begins no known format")),
        ("image,size\na.jpg,7\n", ("line 1: none of image, size is a name for captions", "rename")),
        ("picture of,caption\na.jpg,A dog\n", ("line 1: none of picture of, caption is a name for a photo's name",)),
        ("image,caption,caption\na.jpg,A,B\n", ("line 1: two columns have the name 'caption'",)),
        ("image,caption\na.jpg,A dog, and a cat\n", ("line 2: 3 fields, where the header has 2; quote", "comma")),
        ("image;caption\n\na.jpg\n", ("line 3: 1 fields, where the header has 2; quote", "semicolon")),
        ('image,caption\nb.jpg,A dog\na.jpg,"A dog\nb.jpg,A cat\n', ("line 3: not a valid row",)),
        ('image,caption\na.jpg,"A" dog\nb.jpg,A cat\n', ("line 2: not a valid row", "quotation marks")),
        (f"image,caption\na.jpg,{'dog ' * 50_000}\n", ("line 2: not a valid row", "field limit")),
        ("image,caption\na.jpg,\n", ("line 2: a.jpg has an empty caption",)),
        ("image,caption\n../a.jpg,A dog\n", ("line 2: '../a.jpg' is empty or leaves",)),
        ("image,caption\nimages\\a.jpg,A dog\n", ("line 2: 'images\\\\a.jpg' is a Windows path",)),
        ("a.jpg\t0\tA dog runs\n", ("line 1:", "begins no known format")),
        ("image,caption\n", ("no captions in it",)),
        ('{"file_name": "a.jpg", "text": "A"}\n{"file_name": "b.jpg", "te\n', ("line 2: read as JSON records",)),
        ('{"file_name": "a.jpg", "te\n{"file_name": "b.jpg", "text": "A"}\n', ("line 1: read as JSON records",)),
        ('{"file_name": "a.jpg", "text": 3}\n', ("line 1: a caption has the type int; give a string, or a list",)),
        ('{"file_name": "a.jpg", "text": []}\n', ("line 1: a.jpg has an empty caption",)),
        ('{"file_name": "a.jpg", "text": ["A", ""]}\n', ("line 1: a.jpg has an empty caption",)),
        ('{"file_name": ["a.jpg"], "text": "A"}\n', ("line 1: file_name", "must be a string")),
        ('{"size": 1, "text": "A"}\n{"text": "B"}\n', ("line 1: none of size, text is a name for a photo's",)),
        ('[{"image": "a.jpg", "caption": "A"}, 7]', ("entry 1: a int, where a record",)),
        ("[" * 1000, ("the list: read as JSON records", "recursion")),
        ('[{"image": "a.jpg"', ("the list: read as JSON records", "EOF")),
        ('{"a.jpg": {"b": 1}}', ("'a.jpg': a caption has the type dict",)),
    ],
)
def test_a_fault_names_form_line_and_remedy(tmp_path: Path, content: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "captions"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_captions(path)
    line = str(caught.value)
    assert line.startswith(f"{path}") and len(line.splitlines()) == 1 and len(line) < 600
    assert "delete the line" not in line
    for part in parts:
        assert part in line
