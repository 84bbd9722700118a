"""What a request may ask of the served model, and what it may not."""

import base64
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from capexp.data.photos import MAXIMUM_UPLOAD
from capexp.tracking.served_model import MAXIMUM_BEAM_WIDTH, MAXIMUM_BYTES, MAXIMUM_PHOTOS, ServedCaptioner

BUNDLE = Path(__file__).parents[1] / "captioning/golden-1/bundle"


@pytest.fixture(scope="module")
def model() -> ServedCaptioner:
    model = ServedCaptioner()
    model.load_context(SimpleNamespace(artifacts={"bundle": str(BUNDLE)}))
    return model


def ask(model: ServedCaptioner, photos: list[Any], **params: object) -> list[dict[str, Any]]:
    return model.predict(None, pd.DataFrame({"photo": photos}), params)


def test_a_path_or_an_address_is_no_base64_and_nothing_is_opened(
    model: ServedCaptioner, scenes: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.jpg"
    shutil.copy(min((scenes / "Scenes_Dataset").iterdir()), photo)
    # The last two are base64 by chance: four letters, all of its alphabet.
    sent = [str(photo), photo.as_uri(), "http://127.0.0.1:9/photo.jpg", "photo.jpg", "/etc/group"]
    sent += ["/dev/fd/0000", "/tmp"]
    ask(model, sent)  # what is imported with the first request, is by now
    happened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:  # an audit hook stays for good
        if watching and event.split(".")[0] in ("open", "socket", "os", "glob", "subprocess", "urllib"):
            happened.append(f"{event} {arguments}")

    sys.addaudithook(watch)
    try:
        photo.read_bytes()
        assert happened, "the hook sees what is opened"
        happened.clear()
        records = ask(model, sent)
    finally:
        watching = False
    assert not happened
    assert [record["caption"] for record in records] == [None] * len(sent)
    assert all("not base64" in record["error"] for record in records[:-2])
    assert all("cannot be read as a picture" in record["error"] for record in records[-2:])


def test_a_photo_over_the_bound_has_its_own_error(model: ServedCaptioner) -> None:
    over = bytes(MAXIMUM_UPLOAD + 1)
    small, as_bytes, as_text = ask(model, [b"no picture", over, base64.b64encode(over + b"..").decode()])
    assert "cannot be read as a picture" in small["error"]
    for record in (as_bytes, as_text):
        assert f"over {MAXIMUM_UPLOAD:,}" in record["error"]


@pytest.mark.parametrize(
    ("photos", "params", "says"),
    [
        (["AAAA"] * (MAXIMUM_PHOTOS + 1), {}, f"at most {MAXIMUM_PHOTOS}"),
        ([b"0" * (MAXIMUM_BYTES // 4)] * 5, {}, f"at most {MAXIMUM_BYTES:,}"),
        (["A" * (MAXIMUM_BYTES // 3)] * 5, {}, f"at most {MAXIMUM_BYTES:,}"),
        (["AAAA"], {"beam_width": MAXIMUM_BEAM_WIDTH + 1}, f"at most {MAXIMUM_BEAM_WIDTH}"),
        (["AAAA"], {"beam_width": 0}, "params.beam_width = 0"),
        (["AAAA"], {"method": "nucleus"}, "params.method = 'nucleus'"),
    ],
    ids=("photos", "bytes", "base64", "beam", "no beam", "method"),
)
def test_a_request_that_asks_for_too_much_is_refused_whole(
    model: ServedCaptioner, photos: list[Any], params: dict[str, Any], says: str
) -> None:
    with pytest.raises(MlflowException, match=says) as caught:
        ask(model, photos, **params)
    assert caught.value.get_http_status_code() == 400


def test_what_is_no_text_is_no_base64_either(model: ServedCaptioner) -> None:
    # "None" and "True" would be: four letters of its alphabet
    records = ask(model, [None, True, 3.5, {"path": "/tmp"}])
    assert all("not base64" in record["error"] for record in records)


def test_no_photo_gets_no_record(model: ServedCaptioner) -> None:
    assert ask(model, []) == []
