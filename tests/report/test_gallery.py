"""The gallery as a file, and as a person meets it: in a real Chromium, alone and inside MLflow."""

import base64
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms
from tracking_server import Server

from capexp.captioning.captioner import Caption
from capexp.captioning.evaluation import score_captions
from capexp.data.captions import Split
from capexp.report.gallery import GalleryCard, Heading, choose, make_cards, write_gallery
from capexp.tracking.run import tracked_run
from capexp.tracking.store import database_uri

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

HOSTILE = (
    "</script><script>document.title = 'run'</script>",
    "<!-- <script> --><img src=x onerror=\"document.title = 'run'\">",
    "\"' onload=\"document.title = 'run'\" x='",
    "</style></article></main><svg onload=\"document.title = 'run'\">",
    "$script ${script} {title} &lt;b&gt; &amp;",
    "]]> --> \\u003c/script\\u003e 犬 \u202eabc",
)
THINGS = ("dog", "cat", "house", "boat", "tree", "ball", "car", "bird", "fish", "kite", "horse", "lamp")


def write(
    folder: Path,
    hypotheses: list[str],
    references: Sequence[tuple[str, ...]],
    names: list[str],
    looked: Mapping[int, NDArray[np.float32]] | None = None,
    photo: bytes = b"",
) -> Path:
    """A gallery of photos that are all the same: of random noise, unless one is given."""
    noise = io.BytesIO()
    Image.effect_noise((240, 180), 60).convert("RGB").save(noise, "JPEG")
    for name in names:
        (folder / name).write_bytes(photo or noise.getvalue())
    split = Split("dev", folder, tuple(names), tuple(references))
    captions = [Caption(text, -1.0 - place) for place, text in enumerate(hypotheses)]
    scores = score_captions(captions, split, seed=1)
    cards = make_cards(captions, split, scores)
    heading = Heading("one & two", "the captioner of epoch 3", "dev", "greedy decoding", 1.25, 2.5, scores)
    return write_gallery(cards, choose(cards, 1), heading, 1, folder / "captions.html", looked or {})


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Twelve photos; the first is captioned best, each after it worse."""
    references = [(f"a big {thing} stands on the green grass", f"one {thing}") for thing in THINGS]
    words = ("a", "big", "thing", "stands", "on", "the", "green", "grass")
    hypotheses = []
    for place, thing in enumerate(THINGS):
        said = [thing if word == "thing" else word for word in words]
        hypotheses.append(" ".join(said[: 8 - place // 2] + ["near"] * place))
    return write(tmp_path, hypotheses, references, [f"{thing}.jpg" for thing in THINGS])


WORDS = ("a", "dog", "stands", "there")


def places(word: int) -> set[int]:
    """The places, of seven in a row and column, where the captioner looked as it said a word: a corner each."""
    return {place for place in range(49) if (place // 7 > 3, place % 7 > 3) == (word > 1, word % 2 == 1)}


def looked(side: int = 7) -> NDArray[np.float32]:
    coarse = np.array([[place in places(word) for place in range(49)] for word in range(4)], np.float32)
    maps = coarse.reshape(4, 7, 7).repeat(side // 7, 1).repeat(side // 7, 2)
    return np.asarray(maps / maps.sum((1, 2), keepdims=True), np.float32)


@pytest.fixture
def looking(tmp_path: Path) -> Path:
    """Two photos, of which the captioner tells where it looked, and one without words."""
    said = [" ".join(WORDS), "a cat stands there", ""]
    maps = {0: looked(), 1: looked(14), 2: np.empty((0, 7, 7), np.float32)}
    files = ["a.jpg", "b.jpg", "c.jpg"]
    (tmp_path / "looking").mkdir()
    page = write(tmp_path / "looking", said, [(text or "a bird", "one") for text in said], files, maps)
    return page.rename(page.with_name("looking.html"))


def lit(chromium: "Chrome", card: int = 0) -> set[int] | None:
    """The places of a card's photo that are lit; None where all of it is as it is."""
    alphas = chromium.execute_script(
        """const canvas = document.querySelectorAll('article')[arguments[0]].querySelector('canvas');
        if (canvas.hidden) return null;
        const context = canvas.getContext('2d'), found = [];
        for (let y = 0; y < 7; y++) for (let x = 0; x < 7; x++)
          found.push(context.getImageData((x + .5) * canvas.width / 7, (y + .5) * canvas.height / 7, 1, 1).data[3]);
        return found;""",
        card,
    )
    if alphas is None:
        return None
    assert max(alphas) > 200 and min(alphas) < 10
    return {place for place, alpha in enumerate(alphas) if alpha < 100}


def word(chromium: "Chrome", number: int, card: int = 0) -> "WebElement":
    return chromium.find_elements("css selector", "article")[card].find_elements("css selector", "h2 button")[number]


def show_all(chromium: "Chrome", page: Path) -> None:
    """All cards, in the order of their names."""
    from selenium.webdriver.support.select import Select

    chromium.get(page.as_uri())
    choose_view(chromium, "all")
    unfold(chromium)
    Select(chromium.find_element("id", "order")).select_by_visible_text("file name")


def test_where_it_looked_is_a_digit_a_place_and_large_grids_are_made_coarse(looking: Path, page: Path) -> None:
    data = re.findall(r'data-looked="([^"]*)"', looking.read_text(encoding="utf-8"))
    assert len(data) == 3 and data.count("") == 1
    assert {len(one) for one in data} == {0, 4 * 49}, "49 places of each of four words, whatever the grid"
    digits = "".join("/" if place in places(word) else "A" for word in range(4) for place in range(49))
    assert {*data} == {"", digits}
    assert 'data-looked="' not in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_word_pointed_at_lights_the_photo_where_it_was_looked_for(looking: Path, chromium: "Chrome") -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    show_all(chromium, looking)
    assert chromium.find_element("id", "hint").is_displayed()
    assert [len(card.find_elements("css selector", "h2 button")) for card in cards_of(chromium)] == [4, 4, 0]
    assert [card.find_element("tag name", "h2").text for card in cards_of(chromium)] == [
        "a dog stands there", "a cat stands there", "(no words)",
    ]  # fmt: skip
    assert lit(chromium) is None
    for number in (1, 3, 0):
        ActionChains(chromium).move_to_element(word(chromium, number)).perform()
        assert lit(chromium) == places(number)
        assert lit(chromium, 1) is None, "the other photo is left alone"
        assert word(chromium, number).get_attribute("aria-pressed") == "true"
    ActionChains(chromium).move_to_element(word(chromium, 2, card=1)).perform()
    assert (lit(chromium), lit(chromium, 1)) == (None, places(2))
    canvas, photo = (
        cards_of(chromium)[1].find_element("tag name", "canvas"),
        cards_of(chromium)[1].find_element("tag name", "img"),
    )
    assert canvas.rect == photo.rect, "the light lies over the photo"
    word(chromium, 1).click()
    ActionChains(chromium).move_to_element(chromium.find_element("tag name", "h1")).perform()
    assert lit(chromium) == places(1), "a word that was clicked stays"
    word(chromium, 1).click()
    ActionChains(chromium).move_to_element(chromium.find_element("tag name", "h1")).perform()
    assert lit(chromium) is None
    chromium.find_element("id", "search").send_keys("cat there")
    assert names(chromium) == ["b"]
    assert [said for said in complaints(chromium) if "getImageData" not in said] == [], "but for what the test reads"


@pytest.mark.slow
def test_by_keyboard_a_caption_is_one_stop_and_arrows_go_from_word_to_word(looking: Path, chromium: "Chrome") -> None:
    from selenium.webdriver.common.keys import Keys

    show_all(chromium, looking)
    chromium.find_element("id", "most").send_keys(Keys.TAB)
    reached = [chromium.switch_to.active_element.text]
    assert lit(chromium) == places(0)
    for key, number in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.END, 3),
        (Keys.ARROW_RIGHT, 3),
        (Keys.ARROW_LEFT, 2),
        (Keys.HOME, 0),
    ):
        chromium.switch_to.active_element.send_keys(key)
        assert chromium.switch_to.active_element.text == WORDS[number]
        assert lit(chromium) == places(number)
    chromium.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ESCAPE)
    assert lit(chromium) is None
    chromium.switch_to.active_element.send_keys(Keys.TAB)
    reached.append(chromium.switch_to.active_element.text)
    assert reached == ["a", "a"]
    assert (lit(chromium), lit(chromium, 1)) == (None, places(0)), "the next stop is the next caption"


@pytest.mark.slow
def test_on_a_phone_a_tap_lights_and_another_puts_out(looking: Path, chromium: "Chrome") -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    show_all(chromium, looking)

    def tap(number: int) -> None:
        script = "arguments[0].scrollIntoView({block: 'center'}); const r = arguments[0].getBoundingClientRect();"
        x, y = chromium.execute_script(
            f"{script} return [r.x + r.width / 2, r.y + r.height / 2]", word(chromium, number)
        )
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            chromium.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    for number, expected in ((1, places(1)), (2, places(2)), (2, None)):
        tap(number)
        assert lit(chromium) == expected
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_without_javascript_captions_are_text(looking: Path, chromium: "Chrome") -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    chromium.get(looking.as_uri())
    assert not chromium.find_elements("css selector", "h2 button")
    assert not chromium.find_element("id", "hint").is_displayed()
    assert "a dog stands there" in [card.find_element("tag name", "h2").text for card in cards_of(chromium)]


def cards_of(chromium: "Chrome") -> "list[WebElement]":
    return chromium.find_elements("tag name", "article")


def test_the_page_stands_alone_and_carries_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where the photographer lives"
    exif[0x0112] = 6  # turned by a quarter
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (900, 600), "red").save(
        tmp_path / "photo.jpg", exif=exif, comment=b"my telephone", icc_profile=profile, xmp=b"<x:xmpmeta/>"
    )
    split = Split("dev", tmp_path, ("photo.jpg",), (("A red wall .",),))
    captions = [Caption("a wall", -1.0)]
    scores = score_captions(captions, split, seed=1)
    cards = make_cards(captions, split, scores)
    heading = Heading("walls", "the captioner of epoch 3", "dev", "greedy decoding", 1.25, 2.5, scores)
    written = write_gallery(cards, choose(cards, 1), heading, 1, tmp_path / "captions.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|localStorage", written)
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', written)
    inlined = base64.b64decode(data)
    for secret in (b"photographer", b"telephone", b"xmpmeta", b"ICC_PROFILE", b"Exif"):
        assert secret in (tmp_path / "photo.jpg").read_bytes()
        assert secret not in inlined
    (tmp_path / "inlined.jpg").write_bytes(inlined)
    with Image.open(tmp_path / "inlined.jpg") as image:
        assert image.size == (149, 224)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_where_a_photo_was_taken_is_not_in_the_page(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where the photographer lives"
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 36.0)}  # GPS
    photo = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(photo, kind, exif=exif)
    with Image.open(io.BytesIO(photo.getvalue())) as image:
        assert image.getexif().get_ifd(0x8825)[2] == (52.0, 31.0, 12.0)
    page = write(tmp_path, ["a wall"], [("a red wall",)], ["photo"], photo=photo.getvalue()).read_text(encoding="utf-8")
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    content = base64.b64decode(data)
    assert b"photographer" not in content and b"Exif" not in content
    with Image.open(io.BytesIO(content)) as image:
        assert not image.getexif() and not image.getexif().get_ifd(0x8825)


@given(
    ciders=st.lists(st.floats(0, 10), min_size=1, max_size=400),
    seed=st.integers(0, 9),
)
def test_a_bounded_choice_holds_the_best_the_worst_and_an_even_draw(ciders: list[float], seed: int) -> None:
    cards = [GalleryCard(Path(), "", "", 0.0, ("",), cider=value, rouge_l=0.0) for value in ciders]
    choice = choose(cards, seed)
    shown = [ciders[place] for place in choice.shown]
    assert len(set(choice.shown)) == len(shown) <= 240
    assert len(shown) == len(cards) or len(cards) > 240
    assert {*choice.best, *choice.worst, *choice.random} <= set(choice.shown)
    assert shown == sorted(shown, reverse=True)
    assert [ciders[place] for place in choice.best] == sorted(ciders, reverse=True)[: len(choice.best)]
    assert [ciders[place] for place in choice.worst] == sorted(ciders)[: len(choice.worst)]
    assert len(set(choice.random)) == len(choice.random) == min(120, -(-len(cards) // 2))
    assert choice == choose(cards, seed)


def test_how_many_are_shown_of_how_many_is_told(tmp_path: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(300)]
    said = [f"a dog {number} on the grass" for number in range(300)]
    written = write(tmp_path, said, [(f"the dog {number % 7} sits",) for number in range(300)], names).read_text()
    shown = written.count("<article ")
    assert 180 < shown < 240
    assert f"{shown} of 300 photos are shown: by CIDEr the 60 best and the 60 worst, and 120 drawn" in written


def names(chromium: "Chrome") -> list[str]:
    """The file names of the cards that can be seen, in their order, without their endings."""
    found = chromium.execute_script(
        "return Array.from(document.querySelectorAll('article'))"
        ".filter((card) => card.offsetHeight > 0).map((card) => card.querySelector('p').textContent)"
    )
    return [name.removesuffix(".jpg") for name in found]


def choose_view(chromium: "Chrome", view: str) -> None:
    chromium.find_element("css selector", f"[name=view][value={view}]").click()


def clear(chromium: "Chrome") -> None:
    chromium.find_element("id", "clear").click()


def unfold(chromium: "Chrome") -> None:
    chromium.find_element("css selector", "#controls summary").click()


def complaints(chromium: "Chrome") -> list[str]:
    """What the browser has said to the page's author, such as of an address that its policy refuses."""
    return [entry["message"] for entry in chromium.get_log("browser")]  # type: ignore[no-untyped-call]


def count(chromium: "Chrome") -> str:
    return chromium.find_element("id", "count").text


@pytest.mark.slow
def test_views_search_filter_and_order(page: Path, chromium: "Chrome") -> None:
    from selenium.webdriver.support.select import Select

    chromium.get(page.as_uri())
    drawn = names(chromium)
    assert len(drawn) == 6 and drawn != sorted(drawn, key=THINGS.index)
    choose_view(chromium, "best")
    assert names(chromium) == list(THINGS[:3])
    choose_view(chromium, "worst")
    assert names(chromium) == list(THINGS[:-4:-1])
    choose_view(chromium, "all")
    assert names(chromium) == list(THINGS)
    assert count(chromium) == "12 of 12 photos"

    search = chromium.find_element("id", "search")
    found = {"BOAT": ["boat"], "bo": ["boat"], "oat": [], "one  cat": ["cat"], ".jpg lamp": ["lamp"], "<i>": []}
    for sought, expected in found.items():
        search.clear()
        search.send_keys(sought)
        assert names(chromium) == expected, sought
    assert count(chromium) == "0 of 12 photos"
    clear(chromium)
    assert names(chromium) == list(THINGS)

    unfold(chromium)
    ciders = [
        float(card.get_attribute("data-cider") or "nan") for card in chromium.find_elements("css selector", "article")
    ]
    assert ciders == sorted(ciders, reverse=True)
    chromium.find_element("id", "least").send_keys(str(ciders[7]))
    chromium.find_element("id", "most").send_keys(str(ciders[2]))
    assert names(chromium) == list(THINGS[2:8])
    clear(chromium)
    Select(chromium.find_element("id", "score")).select_by_visible_text("log-probability")
    chromium.find_element("id", "most").send_keys("-10.5")
    assert names(chromium) == list(THINGS[10:])
    clear(chromium)
    order = Select(chromium.find_element("id", "order"))
    order.select_by_visible_text("file name")
    assert names(chromium) == sorted(THINGS)
    order.select_by_visible_text("log-probability, lowest first")
    assert names(chromium) == list(THINGS[::-1])
    assert complaints(chromium) == []


@pytest.mark.slow
def test_the_keyboard_is_enough(page: Path, chromium: "Chrome") -> None:
    from selenium.webdriver.common.keys import Keys

    chromium.get(page.as_uri())
    reached = []
    for _ in range(9):
        chromium.switch_to.active_element.send_keys(Keys.TAB)
        focused = chromium.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.get_attribute("name") or focused.tag_name)
        if reached[-1] == "view":
            focused.send_keys(Keys.ARROW_RIGHT)
            assert names(chromium) == list(THINGS[:3])
        elif reached[-1] == "search":
            focused.send_keys("cat", Keys.ENTER)
            assert names(chromium) == ["cat"]
        elif reached[-1] == "clear":
            focused.send_keys(Keys.SPACE)
            assert names(chromium) == list(THINGS[:3])
            chromium.find_element("id", "clear").send_keys("")  # on from here; clearing goes back to the search
        elif reached[-1] == "summary":
            focused.send_keys(Keys.ENTER)
    assert reached == ["summary", "view", "search", "clear", "summary", "order", "score", "least", "most"]


@pytest.mark.slow
def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path: Path, chromium: "Chrome") -> None:
    long = "a" * 300
    page = write(tmp_path, [long, "b"], [(long, "a b"), ("b " * 200,)], [f"{'n' * 200}.jpg", "b.jpg"])
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    chromium.get(page.as_uri())
    choose_view(chromium, "all")
    assert len(names(chromium)) == 2
    assert chromium.execute_script("return window.innerWidth") == 390
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
    right = "return Math.max(...Array.from(document.querySelectorAll('*'), (e) => e.getBoundingClientRect().right))"
    assert chromium.execute_script(right) <= 390
    small = "return parseFloat(getComputedStyle(document.querySelector('article li')).fontSize)"
    assert chromium.execute_script(small) >= 12


@pytest.mark.slow
def test_the_dark_is_dark_and_words_stand_out_in_it(page: Path, chromium: "Chrome") -> None:
    def luminance(element: str, what: str) -> float:
        color = chromium.execute_script(f"return getComputedStyle(document.querySelector('{element}')).{what}")
        channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    for scheme, dark in (("dark", True), ("light", False)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.get(page.as_uri())
        behind = luminance("html", "backgroundColor")
        assert (behind < 0.05) is dark
        for element in ("h1", "h2", "li", "article p", "dt", "summary"):
            low, high = sorted((behind, luminance(element, "color")))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, element)  # WCAG 2.2, contrast AA


@pytest.mark.slow
def test_without_javascript_every_card_can_be_read(page: Path, chromium: "Chrome") -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    chromium.get(page.as_uri())
    cards = [card.text for card in chromium.find_elements("css selector", "article")]
    assert [thing in text for thing, text in zip(THINGS, cards, strict=True)] == [True] * 12
    assert not chromium.find_element("id", "controls").is_displayed()
    assert "need JavaScript" in chromium.find_element("tag name", "header").text


@pytest.mark.slow
def test_text_that_would_be_markup_is_shown_and_never_run(tmp_path: Path, chromium: "Chrome") -> None:
    files = [text.replace("/", "\N{FRACTION SLASH}") + ".jpg" for text in HOSTILE]
    page = write(tmp_path, list(HOSTILE), [(text, "a dog") for text in HOSTILE], files)
    chromium.get(page.as_uri())
    choose_view(chromium, "all")
    for selector, expected in (("h2", HOSTILE), ("li:first-child", HOSTILE), ("article > p", files)):
        found = [one.get_property("textContent") for one in chromium.find_elements("css selector", selector)]
        assert sorted(map(str, found)) == sorted(expected)
    assert [image.get_attribute("alt") for image in chromium.find_elements("tag name", "img")]
    assert chromium.title == "one & two: captions of dev photos"
    counts = "return ['script', 'style', 'img', 'svg'].map((tag) => document.querySelectorAll(tag).length)"
    assert chromium.execute_script(counts) == [1, 1, len(HOSTILE), 0]
    chromium.find_element("id", "search").send_keys("</script>")
    assert len(names(chromium)) == 1
    assert complaints(chromium) == []


@pytest.mark.slow
def test_the_pages_policy_lets_no_other_script_and_no_address_in(page: Path, chromium: "Chrome") -> None:
    foreign = "</main><script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png'>"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", foreign), encoding="utf-8")
    chromium.get(page.as_uri())
    assert len(names(chromium)) == 6
    assert chromium.title == "one & two: captions of dev photos"
    refused = complaints(chromium)
    assert len(refused) == 2 and all("Content Security Policy" in message for message in refused)


@pytest.mark.slow
def test_mlflows_artifact_view_shows_it_and_its_search_and_light_work_there(
    page: Path, looking: Path, chromium: "Chrome", monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    folder = page.parent
    monkeypatch.chdir(folder)
    monkeypatch.setattr(mlflow, "get_tracking_uri", mlflow.get_tracking_uri)
    mlflow.set_tracking_uri(database_uri(folder / "mlflow.db"))
    with tracked_run("gallery", "gallery", folder / "checkpoints", lock=lambda _: nullcontext()) as tracked:
        for one in (page, looking):
            tracked.log_artifact(Path(shutil.copy(one, tracked.folder)))
        experiment = mlflow.get_run(tracked.run_id).info.experiment_id
    server = Server(folder / "server", mlflow.get_tracking_uri())
    try:
        server.start()
        artifacts = f"{server.address}/#/experiments/{experiment}/runs/{tracked.run_id}/artifacts"
        chromium.get(f"{artifacts}/captions.html")
        wait = WebDriverWait(chromium, 90)
        frame = wait.until(lambda browser: browser.find_element("css selector", "iframe.mlflow-html-iframe"))
        assert frame.get_attribute("sandbox") == "allow-scripts"
        chromium.switch_to.frame(frame)
        wait.until(lambda browser: len(names(browser)) == 6)
        choose_view(chromium, "all")
        chromium.find_element("id", "search").send_keys("horse")
        assert names(chromium) == ["horse"]
        photo = chromium.find_element("css selector", "article:not([hidden]) img")
        wait.until(lambda _: photo.get_property("naturalWidth") == 224)
        assert "one & two" in chromium.find_element("tag name", "h1").text

        chromium.switch_to.default_content()
        chromium.get(f"{artifacts}/looking.html")
        chromium.refresh()
        frame = wait.until(lambda browser: browser.find_element("css selector", "iframe.mlflow-html-iframe"))
        chromium.switch_to.frame(frame)
        wait.until(lambda browser: browser.find_elements("css selector", "h2 button"))
        choose_view(chromium, "all")
        (first,) = [place for place, card in enumerate(cards_of(chromium)) if card.text.startswith("a dog")]
        word(chromium, 2, card=first).click()
        assert lit(chromium, first) == places(2)
    finally:
        server.stop()
