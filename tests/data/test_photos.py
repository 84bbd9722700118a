"""Photo files as pixels: every kind of picture gives the colours that one sees, every other file one line."""

import gc
import hashlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from capexp.data import photos
from capexp.data.photos import digest_photos, find_photos, read_photo, require_readable
from capexp.errors import InputError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def colours(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels (height, width, 3) of a photo, once it is an RGB image of the size."""
    photo = read_photo(path)
    assert (photo.mode, photo.size) == ("RGB", size)
    return np.asarray(photo)


@pytest.mark.parametrize("name", ["photo.jpg", "photo.tif"])
def test_cmyk_gives_its_colour(tmp_path: Path, name: str) -> None:
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / name)
    assert np.abs(colours(tmp_path / name, (16, 8)).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("name", ["photo.png", "photo.tif"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.array([[0, 255, 0x4000, 0x8000, 0xFFFF]], np.uint16)).save(tmp_path / name)
    assert colours(tmp_path / name, (5, 1))[0].tolist() == [[grey] * 3 for grey in (0, 0, 64, 128, 255)]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_wide_grey_keeps_its_order_up_to_white(tmp_path: Path, kind: type[np.int32 | np.float32]) -> None:
    Image.fromarray(np.array([[-5, 0, 1000, 4000]], kind)).save(tmp_path / "photo.tif")
    assert colours(tmp_path / "photo.tif", (4, 1))[0, :, 0].tolist() == [0, 0, 63, 255]


@pytest.mark.parametrize(("mode", "value", "seen"), [("L", 200, 200), ("1", 1, 255), ("LA", (0, 0), 255)])
def test_grey_fills_all_three_channels(tmp_path: Path, mode: str, value: int | tuple[int, int], seen: int) -> None:
    Image.new(mode, (3, 2), value).save(tmp_path / "photo.png")
    assert np.array_equal(colours(tmp_path / "photo.png", (3, 2)), np.full((2, 3, 3), seen))


def test_palette_with_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, 0, 255, 0])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "photo.png", transparency=1)
    assert colours(tmp_path / "photo.png", (3, 1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 255, 0]]


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (*RED, 51))
    image.save(tmp_path / "photo.png")
    assert colours(tmp_path / "photo.png", (3, 1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [255, 204, 204]]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    first.save(tmp_path / "photo.gif", save_all=True, append_images=[second])
    assert np.array_equal(colours(tmp_path / "photo.gif", (4, 4)), np.full((4, 4, 3), RED))


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_rotation_puts_the_photo_upright(tmp_path: Path, orientation: int, stored: Image.Transpose) -> None:
    upright = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(upright).transpose(stored).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(colours(tmp_path / "photo.png", (6, 4)), upright)


def test_bytes_are_read_as_their_file_is(tmp_path: Path) -> None:
    Image.fromarray(noise(30, 20)).save(tmp_path / "photo.jpg")
    from_bytes = read_photo((tmp_path / "photo.jpg").read_bytes())
    assert np.array_equal(np.asarray(from_bytes), colours(tmp_path / "photo.jpg", (30, 20)))


def encoded(suffix: str) -> bytes:
    """A whole picture file."""
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, {"jpg": "JPEG", "png": "PNG", "gif": "GIF"}[suffix])
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of 64x64 pixels whose header, checksum included, claims another size."""
    content = bytearray(encoded("png"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def refusal(path: Path) -> str:
    """The one line that refuses a file."""
    with pytest.raises(InputError) as caught:
        read_photo(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.jpg", encoded("jpg")[:2000], "truncated"),
        ("cut.png", encoded("png")[:2000], "truncated"),
        ("cut.gif", encoded("gif")[:2000], "truncated"),
        ("head.jpg", encoded("jpg")[:20], "cannot be read as a picture"),
        ("empty.jpg", b"", "not a picture"),
        ("text.jpg", b"no picture at all\n" * 100, "not a picture"),
        ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert reason in refusal(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_picture_that_claims_a_huge_size_is_refused_by_name(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "huge.png").write_bytes(png_that_claims(width, height))
    assert "100,000,000" in refusal(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content", [encoded("jpg")[:2000], png_that_claims(10_001, 10_000)], ids=["cut", "huge"])
def test_refused_file_is_closed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photo").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_photo(tmp_path / "photo")
    files = [file for file in gc.get_objects() if type(file) is io.BufferedReader and not file.closed]
    assert caught.value and str(tmp_path / "photo") not in {str(getattr(file, "name", "")) for file in files}


def test_missing_file_and_folder_are_refused_by_name(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.jpg")
    assert "no such file" in refusal(tmp_path)


def test_bytes_that_are_no_picture_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^the photo: [^\n]*not a picture[^\n]*$"):
        read_photo(b"nothing")


def test_digest_is_sha256_of_the_file(tmp_path: Path) -> None:
    contents = [b"", b"one", b"two" * 100_000, b"one"]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert digest_photos(paths) == [hashlib.sha256(content).digest() for content in contents]


def test_files_that_cannot_be_digested_are_counted(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(InputError, match=r"^4 photos cannot be read: .*/a, .*/b, .*/c and 1 more \(all of them "):
        digest_photos([tmp_path / name for name in ("a", "there", "b", "c", "d")])


def picture(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (200, 30, 30)).save(path, kind)
    return path


def test_a_folder_gives_its_pictures_and_tells_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(photos, "_with_heif", lambda: False)
    found = [picture(tmp_path / name) for name in ("a.JPG", "below/b.png", "below/deep/c.webp")]
    for name in (".hidden.jpg", ".thumbnails/d.jpg", "below/._b.png"):
        picture(tmp_path / name)
    for name in ("captions.txt", "plan.pdf", "phone.HEIC", "tablet.heif"):
        (tmp_path / name).write_bytes(b"x")
    assert find_photos([str(tmp_path)]) == sorted(found)
    heif, rest = caplog.messages
    assert heif == f"{tmp_path}: 2 photos left out: phone.HEIC, tablet.heif; pip install pillow-heif, which reads HEIC"
    assert rest == f"{tmp_path}: 2 files left out that are no pictures: captions.txt, plan.pdf"
    with pytest.raises(InputError, match=r"phone\.HEIC: HEIC, which Pillow alone cannot read; pip install pillow-heif"):
        read_photo(tmp_path / "phone.HEIC")


def test_a_named_hidden_file_is_a_photo(tmp_path: Path) -> None:
    hidden = picture(tmp_path / ".hidden.jpg")
    assert find_photos([str(hidden)]) == [hidden]


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    assert photos._with_heif()
    photo = picture(tmp_path / "phone.heic", "HEIF")
    code = f"from capexp.data.photos import find_photos; print(*find_photos([{str(tmp_path)!r}]))"
    root = Path(__file__).parents[2]  # in a process that has not registered HEIC yet
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(photo)]
    assert np.abs(np.asarray(read_photo(photo)).astype(int) - (200, 30, 30)).max() < 12


def test_all_photos_that_cannot_be_decoded_are_named_in_a_file(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.jpg")
    broken = [tmp_path / f"{number}.jpg" for number in range(5)]
    for path in broken:
        path.write_bytes(good.read_bytes()[:300])
    require_readable([good])
    with pytest.raises(
        InputError, match=r"^5 photos cannot be read as pictures: .*0\.jpg, .* and 2 more \(all"
    ) as caught:
        require_readable([*broken, good])
    file = Path(str(caught.value).partition("(all of them are in ")[2].partition(")")[0])
    assert file.read_text().splitlines() == [str(path) for path in broken]
