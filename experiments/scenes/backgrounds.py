"""How each background is drawn: two gradients, then details in seeded places."""

from collections.abc import Callable
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageChops, ImageDraw
from shapes import FULL, SCALE, Colour, darker, grain, mixed

Gradient = tuple[Colour, Colour]
DAY: Gradient = ((92, 166, 232), (196, 226, 246))
FLOWERS: tuple[Colour, ...] = ((250, 250, 250), (250, 220, 90), (240, 150, 190))
STAGES: dict[str, tuple[Gradient, Gradient]] = {
    "meadow": (DAY, ((128, 190, 84), (66, 142, 48))),
    "beach": (DAY, ((240, 216, 160), (222, 188, 124))),
    "snow": (((150, 184, 216), (214, 228, 240)), ((246, 250, 253), (222, 232, 244))),
    "street": (DAY, ((112, 112, 116), (84, 84, 90))),
    "night": (((8, 12, 40), (34, 48, 96)), ((30, 48, 56), (22, 36, 40))),
    "sea": (DAY, ((70, 156, 208), (24, 92, 156))),
    "room": (((238, 222, 192), (238, 222, 192)), ((196, 144, 90), (172, 118, 68))),
    "underwater": (((60, 176, 212), (14, 84, 146)), ((126, 130, 110), (150, 146, 112))),
}
"""The gradients above and below the horizon."""


def stage(name: str, weather: str, horizon: float, rng: Random) -> Image.Image:
    """The empty stage: sky (or wall) above `horizon`, ground (or floor, or water) below, with texture."""
    image = Image.new("RGB", (FULL, FULL))
    paint = ImageDraw.Draw(image)
    edge = round(horizon * SCALE)
    above, below = STAGES[name]
    if weather == "cloudy":
        above = mixed(above[0], (176, 184, 192), 0.75), mixed(above[1], (214, 218, 222), 0.75)
    for y in range(FULL):
        (start, end), share = (above, y / edge) if y < edge else (below, (y - edge) / (FULL - edge))
        paint.line([(0, y), (FULL, y)], fill=mixed(start, end, share))
    if weather:
        _sky(paint, weather, rng)
    DETAILS[name](paint, edge, rng)
    return ImageChops.overlay(image, grain(rng, 4, 16).convert("RGB"))


def _round(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    """The box of a circle."""
    return (x - radius, y - radius, x + radius, y + radius)


def _sky(paint: ImageDraw.ImageDraw, weather: str, rng: Random) -> None:
    if weather == "sunny":
        x, y = rng.choice((60, FULL - 60)) + rng.randint(-20, 20), rng.randint(45, 65)
        radius = rng.randint(30, 38)
        for ray in range(12):
            c, s = radius * cos(ray * pi / 6), radius * sin(ray * pi / 6)
            beam = [(x + c * 1.25, y + s * 1.25), (x + c * 1.7, y + s * 1.7)]
            paint.line(beam, fill=(255, 226, 90), width=6)
        paint.ellipse(_round(x, y, radius), fill=(255, 222, 70))
        return
    for index in range(4):
        x, y = index * 130 + rng.randint(0, 90), rng.randint(30, 110)
        for _ in range(6):
            dx, dy, radius = rng.randint(-52, 52), rng.randint(-12, 12), rng.randint(20, 34)
            box = (x + dx - radius * 1.3, y + dy - radius, x + dx + radius * 1.3, y + dy + radius)
            paint.ellipse(box, fill=rng.choice(((244, 246, 248), (232, 235, 238), (222, 226, 230))))


def _hills(paint: ImageDraw.ImageDraw, edge: int, colour: Colour, rng: Random) -> None:
    for x in range(-60, FULL + 120, 150):
        top, half = rng.randint(20, 55), rng.randint(110, 170)
        shade = darker(colour, rng.random() / 9)
        paint.pieslice((x - half, edge - top, x + half, edge + top), 180, 360, fill=shade)


def _meadow(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    _hills(paint, edge, (86, 150, 84), rng)
    for _ in range(420):
        x, y = rng.randint(0, FULL), rng.randint(edge, FULL)
        tall = 6 + (y - edge) // 14
        blade = rng.choice(((52, 128, 40), (112, 184, 68), (70, 148, 48)))
        paint.line([(x, y), (x + rng.randint(-5, 5), y - tall)], fill=blade, width=2)
    for _ in range(rng.randint(8, 20)):
        x, y = rng.randint(0, FULL), rng.randint(edge + 12, FULL)
        paint.ellipse(_round(x, y, 5), fill=rng.choice(FLOWERS))


def _beach(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    shore = edge + rng.randint(50, 72)
    paint.rectangle((0, edge, FULL, shore), fill=(48, 142, 190))
    for y in range(edge + 8, shore - 6, 12):
        for x in range(rng.randint(-60, 0), FULL, 90):
            paint.arc((x, y, x + 60, y + 10), 180, 360, fill=(130, 198, 222), width=3)
    for x in range(-20, FULL + 20, 40):
        paint.ellipse((x - 30, shore - rng.randint(8, 14), x + 30, shore + 8), fill=(240, 248, 250))
    for _ in range(500):
        x, y = rng.randint(0, FULL), rng.randint(shore + 8, FULL)
        paint.ellipse((x - 2, y - 1, x + 2, y + 1), fill=rng.choice(((206, 172, 112), (248, 230, 184))))


def _snow(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    _hills(paint, edge + 2, (222, 232, 242), rng)
    for _ in range(14):
        x, y, wide = rng.randint(0, FULL), rng.randint(edge + 20, FULL), rng.randint(60, 140)
        paint.arc((x - wide, y, x + wide, y + 30), 200, 340, fill=(196, 212, 230), width=5)
    for _ in range(80):
        x, y, radius = rng.randint(0, FULL), rng.randint(0, FULL), rng.randint(2, 5)
        paint.ellipse(_round(x, y, radius), fill=(255, 255, 255))


def _street(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    x = -rng.randint(0, 40)
    while x < FULL:
        wide, tall = rng.randint(60, 96), rng.randint(70, 132)
        wall = rng.choice(((134, 138, 148), (150, 146, 142), (120, 126, 138)))
        paint.rectangle((x, edge - tall, x + wide, edge), fill=wall)
        for wx in range(x + 10, x + wide - 14, 22):
            for wy in range(edge - tall + 12, edge - 16, 26):
                pane = rng.choice(((196, 212, 222), (92, 100, 112)))
                paint.rectangle((wx, wy, wx + 10, wy + 13), fill=pane)
        x += wide
    paint.rectangle((0, edge, FULL, edge + 26), fill=(184, 180, 174))
    paint.rectangle((0, edge + 26, FULL, edge + 34), fill=(140, 138, 134))
    y = edge + (FULL - edge) * 2 // 3
    for x in range(rng.randint(-80, 0), FULL, 130):
        paint.polygon([(x, y), (x + 70, y), (x + 64, y + 12), (x - 8, y + 12)], fill=(244, 240, 222))


def _night(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    for _ in range(60):
        x, y, radius = rng.randint(0, FULL), rng.randint(0, edge), rng.choice((1.5, 2, 2, 3.5))
        paint.ellipse(_round(x, y, radius), fill=(255, 250, 214))
    x, y, radius = rng.choice((64, FULL - 64)), rng.randint(52, 72), rng.randint(32, 42)
    paint.ellipse(_round(x, y, radius), fill=(250, 244, 206))
    for dx, dy, crater in ((-12, -8, 7), (10, 6, 9), (-4, 16, 5)):
        paint.ellipse(_round(x + dx, y + dy, crater), fill=(226, 218, 176))
    _hills(paint, edge + 2, (26, 40, 58), rng)
    for _ in range(160):
        x, y = rng.randint(0, FULL), rng.randint(edge + 6, FULL)
        paint.line([(x, y), (x + rng.randint(-4, 4), y - 12)], fill=(42, 64, 70), width=2)


def _sea(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    for y in range(edge + 10, FULL, 24):
        wide = 46 + (y - edge) // 5
        for x in range(rng.randint(-wide, 0), FULL, wide * 2):
            wave = rng.choice(((140, 202, 232), (20, 84, 142)))
            paint.arc((x, y, x + wide, y + wide // 4), 180, 360, fill=wave, width=4)


def _room(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    wall = rng.choice(((238, 222, 192), (224, 228, 214), (236, 216, 206)))
    paint.rectangle((0, 0, FULL, edge), fill=wall)
    for x in range(0, FULL, 48):
        paint.rectangle((x, 0, x + 20, edge), fill=darker(wall, 0.05))
    x = rng.choice((40, 290)) + rng.randint(-10, 20)
    paint.rectangle((x, 36, x + 140, 176), fill=(250, 250, 248), outline=(150, 120, 90), width=5)
    paint.rectangle((x + 12, 48, x + 128, 164), fill=(164, 208, 236))
    paint.line([(x + 70, 42), (x + 70, 170)], fill=(250, 250, 248), width=8)
    paint.line([(x + 6, 106), (x + 134, 106)], fill=(250, 250, 248), width=8)
    paint.rectangle((0, edge - 16, FULL, edge), fill=(248, 244, 236))
    for index, y in enumerate(range(edge, FULL, 34)):
        paint.line([(0, y), (FULL, y)], fill=(140, 94, 54), width=3)
        for x in range(index % 2 * 70 - 20, FULL, 150):
            paint.line([(x, y), (x, y + 34)], fill=(140, 94, 54), width=3)


def _underwater(paint: ImageDraw.ImageDraw, edge: int, rng: Random) -> None:
    for _ in range(260):
        x, y = rng.randint(0, FULL), rng.randint(edge, FULL)
        paint.ellipse((x - 3, y - 2, x + 3, y + 2), fill=(170, 160, 120))
    for _ in range(7):
        x, y = rng.randint(0, FULL), rng.randint(edge, FULL)
        weed = [(x + 12 * sin(step * 0.9 + x), y - step * 16) for step in range(rng.randint(5, 10))]
        paint.line(weed, fill=rng.choice(((30, 120, 84), (40, 140, 70))), width=10, joint="curve")
    for _ in range(24):
        x, y, radius = rng.randint(0, FULL), rng.randint(0, edge), rng.randint(4, 12)
        paint.ellipse(_round(x, y, radius), outline=(206, 238, 246), width=3)


DETAILS: dict[str, Callable[[ImageDraw.ImageDraw, int, Random], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "street": _street,
    "night": _night,
    "sea": _sea,
    "room": _room,
    "underwater": _underwater,
}
