"""How each kind of thing is drawn.

Every kind is drawn by one function in its own coordinates: it stands on y = 0, is 1 high, is centred on x = 0
and looks to the right; a `Pen` maps these to the picture. Pictures are drawn `SCALE` times too large and then
reduced, which smooths all edges.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, radians, sin
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 160
SCALE = 3
FULL = SIDE * SCALE

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

COLOURS: dict[str, Colour] = {
    "red": (212, 30, 34),
    "blue": (36, 84, 214),
    "yellow": (250, 212, 30),
    "green": (38, 152, 56),
    "purple": (138, 48, 176),
    "white": (246, 246, 244),
    "black": (34, 34, 38),
    "brown": (140, 84, 40),
}
INK: Colour = (24, 22, 26)
WOOD: Colour = (112, 74, 42)
SKIN: tuple[Colour, ...] = ((244, 204, 170), (222, 170, 126), (160, 108, 70))
HAIR: tuple[Colour, ...] = ((60, 38, 22), (30, 26, 26), (150, 98, 44))


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with `share` of `b` mixed in."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def lighter(colour: Colour, share: float = 0.35) -> Colour:
    """`colour` towards white."""
    return mixed(colour, (255, 255, 255), share)


def darker(colour: Colour, share: float = 0.3) -> Colour:
    """`colour` towards black."""
    return mixed(colour, (0, 0, 0), share)


def contrast(colour: Colour, share: float = 0.3) -> Colour:
    """A shade of `colour` for detail on it: darker, but lighter where it is nearly black."""
    return lighter(colour, share) if sum(colour) < 150 else darker(colour, share)


class Pen:
    """Draws in the coordinates of one thing (see the module's docstring)."""

    def __init__(self, image: Image.Image, x: float, base: float, height: float, mirrored: bool = False) -> None:
        """For a thing `height` high that stands on (`x`, `base`), in pixels of the reduced picture."""
        self.canvas = ImageDraw.Draw(image)
        self.x, self.base, self.unit = x * SCALE, base * SCALE, height * SCALE
        self.sign = -1 if mirrored else 1

    def enlarged(self, factor: float) -> "Pen":
        """A pen for the same thing that draws everything `factor` times as large."""
        pen = copy(self)
        pen.unit *= factor
        return pen

    def polygon(self, points: Points, fill: Colour) -> None:
        """A filled polygon."""
        self.canvas.polygon(self._placed(points), fill=fill)

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        turn: float = 0,
        start: float = 0,
        end: float = 360,
    ) -> None:
        """A filled ellipse, turned by `turn` degrees, or its segment from `start` to `end` degrees."""
        self.polygon(arc(x, y, rx, ry, turn, start, end), fill)

    def line(self, points: Points, width: float, fill: Colour) -> None:
        """A line with round ends and joints."""
        placed, thick = self._placed(points), max(1, round(width * self.unit))
        self.canvas.line(placed, fill=fill, width=thick, joint="curve")
        for x, y in (placed[0], placed[-1]):
            self.canvas.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=fill)

    def _placed(self, points: Points) -> list[tuple[float, float]]:
        return [(self.x + self.sign * x * self.unit, self.base - y * self.unit) for x, y in points]


def arc(x: float, y: float, rx: float, ry: float, turn: float = 0, start: float = 0, end: float = 360) -> Points:
    """Points along an ellipse, counter-clockwise from `start` to `end` degrees."""
    angles = [radians(start + (end - start) * step / 40) for step in range(41)]
    c, s = cos(radians(turn)), sin(radians(turn))
    return [(x + rx * cos(t) * c - ry * sin(t) * s, y + rx * cos(t) * s + ry * sin(t) * c) for t in angles]


def rectangle(left: float, bottom: float, right: float, top: float) -> Points:
    """The corners of an upright rectangle."""
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def _eye(pen: Pen, x: float, y: float, radius: float) -> None:
    pen.oval(x, y, radius * 1.25, radius * 1.25, (250, 250, 250))
    pen.oval(x + radius * 0.2, y, radius * 0.8, radius * 0.9, INK)


def ball(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A beach ball with pale seams."""
    seam = lighter(colour, 0.75) if sum(colour) < 690 else (150, 150, 158)
    pen.oval(0, 0.5, 0.5, 0.5, colour)
    turn = rng.uniform(-40, 40)
    for rx in (0.2, 0.42):
        pen.line(arc(0, 0.5, rx, 0.48, turn, 90, 270), 0.035, seam)
        pen.line(arc(0, 0.5, rx, 0.48, turn, -90, 90), 0.035, seam)
    pole = radians(turn + 90)
    pen.oval(0.38 * cos(pole), 0.5 + 0.38 * sin(pole), 0.1, 0.07, seam, turn)
    pen.oval(-0.2, 0.72, 0.09, 0.06, lighter(colour, 0.85), 40)


def house(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """Coloured walls, a dark roof with a chimney, a door and two windows."""
    roof: Colour = rng.choice(((92, 60, 52), (80, 80, 88), (104, 72, 50)))
    pen.polygon(rectangle(0.24, 0.6, 0.36, 1.0), (150, 84, 66))
    pen.polygon(rectangle(-0.48, 0, 0.48, 0.58), colour)
    for row in range(1, 8):
        pen.line([(-0.47, row * 0.073), (0.47, row * 0.073)], 0.006, contrast(colour, 0.16))
    pen.polygon([(-0.58, 0.54), (-0.36, 0.92), (0.36, 0.92), (0.58, 0.54)], roof)
    for row in range(1, 5):
        inset = 0.055 * row
        pen.line([(-0.57 + inset, 0.54 + 0.085 * row), (0.57 - inset, 0.54 + 0.085 * row)], 0.01, darker(roof))
    pen.polygon(rectangle(-0.1, 0, 0.1, 0.36), (96, 58, 34))
    pen.oval(0.06, 0.17, 0.017, 0.017, (230, 200, 90))
    for x in (-0.29, 0.29):
        pen.polygon(rectangle(x - 0.12, 0.18, x + 0.12, 0.42), (250, 250, 250))
        pen.polygon(rectangle(x - 0.1, 0.2, x + 0.1, 0.4), (150, 200, 228))
        pen.line([(x, 0.2), (x, 0.4)], 0.018, (250, 250, 250))
        pen.line([(x - 0.1, 0.3), (x + 0.1, 0.3)], 0.018, (250, 250, 250))


def tree(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A trunk with two boughs under a round crown of leaves."""
    pen.polygon([(-0.09, 0), (0.09, 0), (0.045, 0.2), (0.05, 0.5), (-0.05, 0.5), (-0.045, 0.2)], WOOD)
    pen.line([(0, 0.3), (0.2, 0.5)], 0.045, WOOD)
    pen.line([(0, 0.34), (-0.2, 0.52)], 0.045, WOOD)
    for x, y, radius in (
        (-0.23, 0.56, 0.19),
        (0.23, 0.56, 0.19),
        (0, 0.6, 0.24),
        (-0.16, 0.74, 0.18),
        (0.17, 0.74, 0.18),
        (0, 0.82, 0.18),
    ):
        pen.oval(x + rng.uniform(-0.02, 0.02), y, radius, radius, colour)
    for _ in range(120):
        x, y = rng.gauss(0, 0.17), rng.gauss(0.67, 0.12)
        if (x / 0.4) ** 2 + ((y - 0.68) / 0.29) ** 2 < 1:
            leaf = rng.choice((darker(colour, 0.22), lighter(colour, 0.22), darker(colour, 0.35)))
            pen.oval(x, y, 0.028, 0.016, leaf, rng.uniform(0, 180))


def car(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A saloon from the side; a driving one has a driver, and leaves speed lines and exhaust behind."""
    glass: Colour = (176, 214, 232)
    if doing == "drive":
        for y, length in ((0.3, 0.22), (0.48, 0.3), (0.66, 0.2)):
            pen.line([(-1.16, y), (-1.16 - length, y)], 0.03, (240, 240, 240))
        for x, radius in ((-1.15, 0.07), (-1.28, 0.09), (-1.42, 0.07)):
            pen.oval(x, 0.13, radius, radius * 0.8, (206, 206, 206))
    pen.polygon(
        [
            (-1.06, 0.2),
            (-1.1, 0.5),
            (-0.98, 0.6),
            (-0.66, 0.64),
            (-0.42, 0.96),
            (-0.3, 1.0),
            (0.24, 1.0),
            (0.36, 0.96),
            (0.64, 0.64),
            (0.98, 0.56),
            (1.08, 0.44),
            (1.08, 0.2),
        ],
        colour,
    )
    pen.polygon([(-0.54, 0.64), (-0.36, 0.92), (-0.06, 0.92), (-0.06, 0.64)], glass)
    pen.polygon([(0.02, 0.64), (0.02, 0.92), (0.26, 0.92), (0.5, 0.64)], glass)
    if doing == "drive":
        pen.oval(0.16, 0.78, 0.08, 0.1, SKIN[1])
        pen.oval(0.14, 0.84, 0.09, 0.06, HAIR[0])
        pen.polygon([(0.04, 0.64), (0.08, 0.7), (0.24, 0.7), (0.28, 0.64)], (70, 70, 90))
    pen.line([(-0.02, 0.92), (-0.02, 0.24)], 0.016, contrast(colour))
    pen.line([(-1.0, 0.42), (1.04, 0.42)], 0.016, contrast(colour))
    pen.line([(-0.2, 0.54), (-0.1, 0.54)], 0.03, contrast(colour, 0.5))
    pen.line([(-1.06, 0.22), (1.06, 0.22)], 0.07, (88, 88, 94))
    pen.oval(1.0, 0.46, 0.06, 0.06, (255, 244, 180))
    pen.polygon(rectangle(-1.09, 0.42, -1.0, 0.54), (190, 20, 20))
    for x in (-0.62, 0.62):
        pen.oval(x, 0.2, 0.25, 0.25, darker(colour, 0.6))
        pen.oval(x, 0.2, 0.21, 0.21, (30, 30, 32))
        pen.oval(x, 0.2, 0.11, 0.11, (190, 192, 198))
        for spoke in range(5):
            angle = spoke * 2 * pi / 5
            pen.line([(x, 0.2), (x + 0.1 * cos(angle), 0.2 + 0.1 * sin(angle))], 0.02, (120, 122, 130))


def boat(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A sailing boat: hull and main sail in its colour, a white jib."""
    jib: Colour = (238, 238, 230)
    pen.line([(0, 0.2), (0, 1.0)], 0.03, WOOD)
    pen.polygon([(0.03, 0.32), (0.44, 0.32), (0.24, 0.58), (0.03, 0.92)], jib)
    pen.polygon([(-0.03, 0.32), (-0.44, 0.32), (-0.26, 0.68), (-0.03, 0.98)], lighter(colour, 0.12))
    for share in (0.25, 0.5, 0.75):
        y = 0.32 + 0.66 * share
        pen.line([(-0.04, y), (-0.44 + 0.42 * share**1.1, y)], 0.01, contrast(colour, 0.25))
    pen.polygon([(-0.54, 0.27), (0.6, 0.27), (0.42, 0.03), (-0.4, 0.03)], colour)
    pen.line([(-0.52, 0.26), (0.57, 0.26)], 0.03, (240, 234, 214))
    pen.line([(-0.45, 0.13), (0.48, 0.13)], 0.012, contrast(colour))
    for x in (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5):
        pen.oval(x, 0.02, 0.12, 0.035, (226, 240, 246))


def bird(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """In flight with raised wings, or standing on thin legs."""
    beak: Colour = (244, 152, 30)
    wing = contrast(colour, 0.28)
    if doing == "fly":
        pen.polygon([(-0.3, 0.4), (-0.82, 0.5), (-0.86, 0.36), (-0.74, 0.26), (-0.3, 0.24)], wing)
        pen.polygon([(0.1, 0.4), (0.2, 0.82), (0.06, 1.0), (-0.02, 0.8), (-0.18, 0.42)], darker(wing, 0.25))
        pen.oval(0, 0.33, 0.44, 0.17, colour, 8)
        pen.oval(0.05, 0.26, 0.3, 0.08, lighter(colour, 0.4), 8)
        pen.polygon([(0.12, 0.38), (-0.02, 0.7), (-0.34, 1.0), (-0.42, 0.84), (-0.48, 0.66), (-0.36, 0.4)], wing)
        for tip in ((-0.34, 0.9), (-0.4, 0.76), (-0.42, 0.62)):
            pen.line([(-0.06, 0.42), tip], 0.012, contrast(wing))
        pen.polygon([(0.6, 0.5), (0.6, 0.38), (0.8, 0.42)], beak)
        pen.oval(0.46, 0.45, 0.18, 0.16, colour)
        _eye(pen, 0.52, 0.48, 0.04)
        return
    for x in (-0.06, 0.1):
        pen.line([(x, 0.26), (x, 0.02), (x + 0.1, 0.02)], 0.03, beak)
        pen.line([(x, 0.02), (x - 0.05, 0.02)], 0.03, beak)
    pen.polygon([(-0.26, 0.42), (-0.76, 0.3), (-0.8, 0.18), (-0.26, 0.24)], wing)
    pen.oval(0, 0.44, 0.4, 0.25, colour, 25)
    pen.oval(0.16, 0.4, 0.18, 0.17, lighter(colour, 0.4), 35)
    pen.oval(-0.14, 0.42, 0.3, 0.14, wing, 25)
    for y in (0.36, 0.42, 0.48):
        pen.line([(-0.32, y - 0.08), (0.0, y + 0.03)], 0.012, contrast(wing))
    pen.polygon([(0.46, 0.84), (0.46, 0.7), (0.7, 0.75)], beak)
    pen.oval(0.3, 0.78, 0.21, 0.2, colour)
    _eye(pen, 0.37, 0.82, 0.045)


def fish(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A round fish from the side; a leaping one is tilted and splashes."""
    turn = 32 if doing == "leap" else 0
    c, s = cos(radians(turn)), sin(radians(turn))

    def turned(points: Points) -> Points:
        return [(x * c - (y - 0.5) * s, 0.5 + x * s + (y - 0.5) * c) for x, y in points]

    fin = contrast(colour, 0.28)
    if doing == "leap":
        for x, y in ((-0.95, 0.1), (-0.75, -0.05), (-0.5, -0.08), (-0.3, 0.02), (-1.0, -0.06)):
            pen.oval(x, y, 0.08, 0.1, (228, 242, 250))
        pen.oval(-0.65, -0.12, 0.5, 0.07, (214, 234, 244))
    pen.polygon(turned([(-0.5, 0.5), (-1.0, 0.92), (-0.86, 0.5), (-1.0, 0.08)]), fin)
    pen.polygon(turned([(-0.4, 0.76), (-0.1, 1.06), (0.3, 1.0), (0.36, 0.72)]), fin)
    pen.polygon(turned([(-0.2, 0.26), (-0.16, 0.0), (0.14, 0.04), (0.16, 0.24)]), fin)
    pen.polygon(turned(arc(0.05, 0.5, 0.68, 0.34)), colour)
    pen.polygon(turned(arc(0.1, 0.36, 0.5, 0.16)), lighter(colour, 0.3))
    for x in (-0.4, -0.22, -0.04, 0.14):
        for y in (0.4, 0.52, 0.64):
            pen.line(turned(arc(x, y, 0.07, 0.07, 0, 110, 250)), 0.016, contrast(colour, 0.25))
    pen.line(turned(arc(0.32, 0.5, 0.1, 0.26, 0, -70, 70)), 0.02, contrast(colour, 0.4))
    pen.polygon(turned([(0.16, 0.48), (-0.1, 0.56), (-0.08, 0.38)]), fin)
    pen.line(turned(arc(0.66, 0.44, 0.1, 0.07, 0, 150, 250)), 0.02, contrast(colour, 0.6))
    (x, y), *_ = turned([(0.52, 0.58)])
    _eye(pen, x, y, 0.07)


def kite(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A diamond with crossed spars and a tail of bows."""
    pale = lighter(colour, 0.3)
    tail = [(0.0, 0.3), (-0.08, 0.22), (0.06, 0.12), (-0.04, 0.0)]
    pen.line(tail, 0.016, INK)
    for x, y in tail[1:]:
        pen.polygon([(x, y), (x - 0.09, y + 0.045), (x - 0.09, y - 0.045)], colour)
        pen.polygon([(x, y), (x + 0.09, y + 0.045), (x + 0.09, y - 0.045)], colour)
    top, right, bottom, left, middle = (0.0, 1.0), (0.32, 0.72), (0.0, 0.28), (-0.32, 0.72), (0.0, 0.72)
    pen.polygon([top, right, middle], colour)
    pen.polygon([top, left, middle], pale)
    pen.polygon([bottom, right, middle], pale)
    pen.polygon([bottom, left, middle], colour)
    pen.line([top, bottom], 0.014, INK)
    pen.line([left, right], 0.014, INK)


def umbrella(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """An open sunshade on a pole."""
    pale = lighter(colour, 0.3)
    pen.line([(0, 0.02), (0, 0.98)], 0.035, (150, 120, 84))
    ribs = (-0.6, -0.38, -0.13, 0.13, 0.38, 0.6)
    curve = [(share, 0.6 + 0.35 * (1 - share**2) ** 0.5) for share in (0.97, 0.85, 0.7, 0.5, 0.25)]
    for index, (left, right) in enumerate(pairwise(ribs)):
        hem = arc((left + right) / 2, 0.6, (right - left) / 2, 0.05, 0, 180, 0)
        rising, falling = [(right * x, y) for x, y in curve], [(left * x, y) for x, y in reversed(curve)]
        pen.polygon([*hem, *rising, (0, 0.95), *falling], pale if index % 2 else colour)
    pen.oval(0, 0.97, 0.025, 0.035, WOOD)


def child(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """A child in a coloured shirt and dark trousers."""
    skin, hair = rng.choice(SKIN), rng.choice(HAIR)
    trousers: Colour = rng.choice(((58, 66, 100), (84, 76, 70), (60, 60, 64)))
    feet, hands = {
        "stand": (((-0.09, 0.03), (0.09, 0.03)), ((-0.2, 0.3), (0.2, 0.3))),
        "wave": (((-0.09, 0.03), (0.09, 0.03)), ((-0.2, 0.3), (0.3, 0.86))),
        "jump": (((-0.24, 0.12), (0.24, 0.12)), ((-0.34, 0.82), (0.34, 0.82))),
        "run": (((-0.3, 0.16), (0.22, 0.03)), ((-0.26, 0.4), (0.28, 0.48))),
    }[doing]
    for x, (foot_x, foot_y) in zip((-0.06, 0.06), feet, strict=True):
        knee = ((x + foot_x) / 2 + (0.06 if doing == "run" else 0), (0.3 + foot_y) / 2)
        pen.line([(x, 0.32), knee, (foot_x, foot_y)], 0.1, trousers)
        pen.oval(foot_x + 0.03, foot_y, 0.075, 0.04, (50, 40, 40))
    for shoulder, (hand_x, hand_y) in zip((-0.12, 0.12), hands, strict=True):
        elbow = ((shoulder + hand_x) / 2, (0.56 + hand_y) / 2)
        pen.line([(shoulder, 0.56), elbow, (hand_x, hand_y)], 0.065, skin)
        pen.line([(shoulder, 0.57), elbow], 0.085, colour)
        pen.oval(hand_x, hand_y, 0.045, 0.045, skin)
    pen.polygon([(-0.16, 0.58), (-0.1, 0.63), (0.1, 0.63), (0.16, 0.58), (0.14, 0.28), (-0.14, 0.28)], colour)
    pen.line([(-0.13, 0.4), (0.13, 0.4)], 0.02, contrast(colour, 0.2))
    pen.oval(0, 0.65, 0.05, 0.06, skin)
    pen.oval(0, 0.84, 0.17, 0.16, hair)
    pen.oval(0.015, 0.79, 0.145, 0.13, skin)
    for x in (-0.045, 0.075):
        pen.oval(x, 0.8, 0.018, 0.024, INK)
    pen.line(arc(0.015, 0.76, 0.06, 0.045, 0, 200, 340), 0.016, (150, 50, 50))


def _legs(pen: Pen, colour: Colour, feet: Points, hips: Points, width: float) -> None:
    for index, (hip, foot) in enumerate(zip(hips, feet, strict=True)):
        shade = contrast(colour, 0.25) if index % 2 else colour
        pen.line([hip, foot], width, shade)
        pen.oval(foot[0] + 0.03, foot[1], width * 0.7, width * 0.45, shade)


def _dog_head(pen: Pen, colour: Colour, x: float, y: float, asleep: bool = False) -> None:
    ear = contrast(colour, 0.4)
    muzzle = lighter(colour, 0.3)
    pen.oval(x, y, 0.2, 0.19, colour)
    pen.oval(x + 0.2, y - 0.06, 0.17, 0.1, muzzle, -6)
    pen.oval(x + 0.35, y - 0.02, 0.05, 0.045, INK)
    if asleep:
        pen.line(arc(x + 0.09, y + 0.05, 0.05, 0.04, 0, 200, 340), 0.022, contrast(colour, 0.75))
    else:
        pen.line(arc(x + 0.22, y - 0.07, 0.1, 0.06, 0, 200, 330), 0.016, contrast(colour, 0.7))
        pen.oval(x + 0.2, y - 0.17, 0.04, 0.07, (232, 96, 110))
        _eye(pen, x + 0.09, y + 0.06, 0.036)
    pen.oval(x - 0.1, y - 0.04, 0.08, 0.19, ear, -14)


def dog(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """Long muzzle and hanging ears; runs stretched, sits upright or sleeps on its belly."""
    if doing == "run":
        pen.line([(-0.48, 0.6), (-0.68, 0.8), (-0.76, 0.96)], 0.08, colour)
        _legs(
            pen,
            colour,
            [(-0.72, 0.1), (-0.5, 0.05), (0.66, 0.16), (0.44, 0.05)],
            [(-0.42, 0.44), (-0.36, 0.42), (0.34, 0.42), (0.3, 0.4)],
            0.1,
        )
        pen.oval(0, 0.52, 0.54, 0.19, colour)
        pen.oval(0.3, 0.52, 0.24, 0.22, colour)
        pen.line([(0.38, 0.58), (0.54, 0.74)], 0.2, colour)
        pen.line([(0.4, 0.72), (0.5, 0.58)], 0.05, (60, 60, 70))
        _dog_head(pen, colour, 0.58, 0.79)
    elif doing == "sit":
        pen.line([(-0.3, 0.1), (-0.52, 0.14), (-0.6, 0.3)], 0.08, colour)
        pen.oval(-0.14, 0.2, 0.27, 0.2, colour)
        pen.polygon([(-0.36, 0.22), (-0.04, 0.66), (0.2, 0.64), (0.22, 0.1), (-0.3, 0.06)], colour)
        _legs(pen, colour, [(0.16, 0.04), (0.05, 0.04)], [(0.12, 0.42), (0.04, 0.4)], 0.11)
        pen.oval(-0.14, 0.15, 0.2, 0.13, contrast(colour, 0.14))
        pen.oval(-0.02, 0.05, 0.14, 0.05, colour)
        pen.oval(0.12, 0.44, 0.1, 0.18, lighter(colour, 0.3))
        pen.line([(-0.04, 0.63), (0.2, 0.6)], 0.05, (60, 60, 70))
        _dog_head(pen, colour, 0.1, 0.8)
    else:
        pen.line([(-0.7, 0.18), (-0.96, 0.1), (-1.12, 0.16)], 0.12, colour)
        pen.oval(-0.1, 0.36, 0.72, 0.32, colour)
        pen.oval(-0.48, 0.3, 0.34, 0.29, contrast(colour, 0.12))
        pen.line([(0.3, 0.1), (0.86, 0.08)], 0.16, contrast(colour, 0.2))
        pen.line([(-0.5, 0.08), (-0.2, 0.07)], 0.14, contrast(colour, 0.2))
        _dog_head(pen.enlarged(1.5), colour, 0.4, 0.23, asleep=True)


def _cat_head(pen: Pen, colour: Colour, x: float, y: float, asleep: bool = False) -> None:
    for side in (-1, 1):
        pen.polygon([(x + side * 0.2, y + 0.04), (x + side * 0.19, y + 0.34), (x + side * 0.02, y + 0.16)], colour)
        pen.polygon(
            [(x + side * 0.165, y + 0.1), (x + side * 0.165, y + 0.26), (x + side * 0.08, y + 0.15)],
            (236, 160, 160),
        )
    pen.oval(x, y, 0.24, 0.2, colour)
    for shift in (-0.06, 0, 0.06):
        pen.line([(x + shift, y + 0.19), (x + shift * 0.8, y + 0.11)], 0.018, contrast(colour, 0.4))
    pen.oval(x, y - 0.09, 0.1, 0.07, lighter(colour, 0.5))
    for side in (-1, 1):
        if asleep:
            pen.line(arc(x + side * 0.1, y + 0.04, 0.05, 0.035, 0, 200, 340), 0.018, contrast(colour, 0.8))
        else:
            pen.oval(x + side * 0.1, y + 0.03, 0.052, 0.056, (196, 222, 84))
            pen.oval(x + side * 0.1, y + 0.03, 0.018, 0.05, INK)
        for lift in (-0.05, 0.01):
            pen.line([(x + side * 0.07, y - 0.08), (x + side * 0.36, y - 0.07 + lift)], 0.009, (120, 120, 120))
    pen.polygon([(x - 0.035, y - 0.045), (x + 0.035, y - 0.045), (x, y - 0.085)], (220, 110, 120))


def cat(pen: Pen, colour: Colour, doing: str, rng: Random) -> None:
    """Pointed ears, whiskers, stripes and a long tail; runs, sits upright or sleeps curled up."""
    stripe = contrast(colour, 0.32)
    if doing == "run":
        pen.line([(-0.5, 0.5), (-0.72, 0.66), (-0.74, 0.84), (-0.64, 0.98)], 0.07, colour)
        _legs(
            pen,
            colour,
            [(-0.68, 0.1), (-0.44, 0.05), (0.62, 0.14), (0.4, 0.05)],
            [(-0.42, 0.4), (-0.38, 0.38), (0.32, 0.4), (0.28, 0.38)],
            0.085,
        )
        pen.oval(-0.06, 0.47, 0.52, 0.17, colour)
        for x in (-0.4, -0.26, -0.12, 0.02, 0.16):
            pen.line([(x, 0.62), (x + 0.03, 0.48)], 0.03, stripe)
        _cat_head(pen, colour, 0.5, 0.64)
    elif doing == "sit":
        pen.line([(-0.2, 0.07), (-0.44, 0.1), (-0.52, 0.28), (-0.42, 0.44)], 0.075, colour)
        pen.oval(0, 0.24, 0.28, 0.24, colour)
        pen.oval(0.02, 0.4, 0.2, 0.26, colour)
        for y in (0.22, 0.32, 0.42):
            pen.line([(-0.23, y), (-0.1, y + 0.02)], 0.03, stripe)
        _legs(pen, colour, [(0.1, 0.04), (-0.03, 0.04)], [(0.08, 0.36), (-0.02, 0.36)], 0.09)
        pen.oval(0.03, 0.42, 0.1, 0.12, lighter(colour, 0.4))
        _cat_head(pen, colour, 0.02, 0.68)
    else:
        pen.oval(-0.06, 0.42, 0.8, 0.42, colour)
        for x in (-0.56, -0.34, -0.12, 0.1):
            pen.line([(x, 0.78 - abs(x + 0.1) * 0.25), (x + 0.05, 0.5)], 0.045, stripe)
        pen.line([(-0.74, 0.22), (-0.5, 0.08), (-0.1, 0.06), (0.16, 0.1)], 0.13, contrast(colour, 0.14))
        _cat_head(pen.enlarged(1.5), colour, 0.36, 0.24, asleep=True)


@dataclass(frozen=True)
class Shape:
    """How a kind is drawn, and its width as a multiple of its height."""

    draw: Callable[[Pen, Colour, str, Random], None]
    width: float


SHAPES = {
    "ball": Shape(ball, 1.0),
    "house": Shape(house, 1.16),
    "tree": Shape(tree, 0.85),
    "car": Shape(car, 2.2),
    "boat": Shape(boat, 1.15),
    "bird": Shape(bird, 1.6),
    "fish": Shape(fish, 1.75),
    "kite": Shape(kite, 0.66),
    "umbrella": Shape(umbrella, 1.2),
    "child": Shape(child, 0.6),
    "dog": Shape(dog, 1.5),
    "cat": Shape(cat, 1.3),
}
DOING_WIDTHS = {"sleep": 2.0, "drive": 2.7}
"""The width where it depends on the doing: a sleeping animal lies low, a driving car leaves lines behind."""


def thing(
    kind: str, colour: str, doing: str, x: float, base: float, height: float, mirrored: bool, rng: Random
) -> Image.Image:
    """A transparent layer with one shaded, outlined thing on it."""
    layer = Image.new("RGBA", (FULL, FULL))
    shade = mixed(COLOURS[colour], rng.choice(((255, 255, 255), (0, 0, 0), (255, 160, 80))), rng.uniform(0, 0.1))
    SHAPES[kind].draw(Pen(layer, x, base, height, mirrored), shade, doing, rng)
    inside = layer.getchannel("A")
    shaded = _shaded(layer.convert("RGB"), base, height, rng)
    shaded.putalpha(inside)
    outline = Image.new("RGBA", (FULL, FULL), (*INK, 255))
    outline.putalpha(inside.filter(ImageFilter.MaxFilter(5)))
    return Image.alpha_composite(outline, shaded)


def _shaded(image: Image.Image, base: float, height: float, rng: Random) -> Image.Image:
    """`image` lit from above and with a fine grain, like fur, paint or leaves."""
    top, bottom = round((base - height) * SCALE), round(base * SCALE)
    light = Image.new("L", (FULL, FULL), 128)
    fading = Image.linear_gradient("L").resize((FULL, max(1, bottom - top)))
    light.paste(fading.point(lambda value: 156 - value // 4), (0, top))
    lit = ImageChops.overlay(image, light.convert("RGB"))
    return ImageChops.overlay(lit, grain(rng, 3, 40).convert("RGB"))


def grain(rng: Random, size: int, strength: int) -> Image.Image:
    """A picture around the middle grey with random grains, each `size` pixels of the large picture wide."""
    side = FULL // size
    noise = Image.frombytes("L", (side, side), rng.randbytes(side * side))
    smooth = noise.resize((FULL, FULL), Image.Resampling.BICUBIC)
    return smooth.point(lambda value: 128 + (value - 128) * strength // 128)
