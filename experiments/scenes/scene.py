"""What a scene is: the tables of kinds, colours, doings and backgrounds, and how a scene is composed.

A scene is a short symbolic description. `shapes.py` turns it into a picture and `captions.py` into sentences,
so whatever a caption says is true of its picture by construction. The three `HELD_OUT_...` tables reserve
combinations for dev and test: a captioner that has only memorised whole phrases fails on them, one that has
learned the parts does not.
"""

from dataclasses import dataclass, replace
from random import Random

LAND = ("meadow", "beach", "snow", "street", "night")
SKY = (*LAND, "sea")
BACKGROUNDS = (*LAND, "meadow", "beach", "snow", "street", "sea", "sea", "room", "room", "underwater")
"""Backgrounds to choose from; one listed twice is twice as frequent."""
DAYLIGHT = ("meadow", "beach", "snow", "street", "sea")


@dataclass(frozen=True)
class Kind:
    """One kind of thing: its colours, and the backgrounds on which it can do each thing."""

    colours: tuple[str, ...]
    doings: dict[str, tuple[str, ...]]

    def doings_on(self, background: str) -> list[str]:
        """What this kind can do on `background`; empty if it does not belong there."""
        return [doing for doing, backgrounds in self.doings.items() if background in backgrounds]


ANIMAL = ("brown", "black", "white", "yellow", "red", "blue")
PAINTED = ("red", "blue", "yellow", "green", "white", "purple")
BRIGHT = ("red", "blue", "yellow", "green", "purple")
HOME = (*LAND, "room")

KINDS: dict[str, Kind] = {
    "dog": Kind(ANIMAL, {"run": HOME, "sit": HOME, "sleep": HOME}),
    "cat": Kind(ANIMAL, {"run": HOME, "sit": HOME, "sleep": HOME}),
    "child": Kind((*BRIGHT, "white"), {"stand": HOME, "wave": HOME, "jump": HOME, "run": HOME}),
    "ball": Kind((*BRIGHT, "white"), {"lie": HOME, "bounce": HOME}),
    "house": Kind(PAINTED, {"stand": ("meadow", "snow", "street", "night")}),
    "tree": Kind(("green", "yellow", "red"), {"stand": LAND}),
    "car": Kind(
        (*PAINTED, "black"),
        {"park": ("meadow", "snow", "street", "night"), "drive": ("meadow", "snow", "street", "night")},
    ),
    "bird": Kind(ANIMAL, {"fly": SKY, "perch": LAND}),
    "kite": Kind(BRIGHT, {"fly": ("meadow", "beach", "snow", "street")}),
    "umbrella": Kind(BRIGHT, {"open": ("beach", "meadow")}),
    "boat": Kind(PAINTED, {"sail": ("sea",)}),
    "fish": Kind(("red", "yellow", "green", "purple", "black", "white"), {"swim": ("underwater",), "leap": ("sea",)}),
}

FREQUENCY = {"tree": 0.6, "car": 2.0, "boat": 2.0}
"""The weight of a kind among those that fit, if not 1: evens out kinds that fit in few or in many places."""

CAMOUFLAGE = {
    ("meadow", "green"),
    ("beach", "yellow"),
    ("snow", "white"),
    ("night", "black"),
    ("sea", "blue"),
    ("street", "black"),
}
"""Backgrounds and colours that are hard to tell apart; only trees are given such a colour."""

MOVABLE = ("dog", "cat", "child", "ball", "bird")
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "beside": (
        (*MOVABLE, "car", "house", "tree", "boat"),
        (*MOVABLE, "car", "house", "tree", "umbrella", "fish"),
    ),
    "front": (MOVABLE, ("house", "tree", "car")),
    "above": (("bird", "kite"), tuple(kind for kind in KINDS if kind not in ("bird", "kite"))),
    "under": (MOVABLE, ("tree", "umbrella")),
}
"""Relation: kinds of the first group, kinds of the second ("first is beside / in front of ... second")."""

RULES = ("colour", "background", "relation")
HELD_OUT_COLOURS = {
    ("dog", "black"),
    ("cat", "white"),
    ("child", "yellow"),
    ("ball", "blue"),
    ("house", "red"),
    ("car", "yellow"),
    ("bird", "red"),
    ("kite", "purple"),
    ("boat", "green"),
    ("fish", "purple"),
}
HELD_OUT_BACKGROUNDS = {
    ("dog", "beach"),
    ("cat", "snow"),
    ("child", "night"),
    ("ball", "room"),
    ("car", "meadow"),
    ("bird", "street"),
}
HELD_OUT_RELATIONS = {
    ("child", "beside", "dog"),
    ("cat", "beside", "ball"),
    ("bird", "above", "car"),
    ("bird", "above", "boat"),
    ("kite", "above", "house"),
    ("cat", "front", "house"),
    ("child", "front", "car"),
    ("dog", "under", "tree"),
    ("child", "under", "umbrella"),
}


@dataclass(frozen=True)
class Group:
    """One, two or three things of a kind. `size` and `place` are empty if a viewer could not tell them."""

    kind: str
    colour: str
    number: int
    size: str
    place: str
    doing: str


@dataclass(frozen=True)
class Scene:
    """Everything captions may speak of; what varies beyond it (jitter, hues, clouds) is up to the drawing."""

    background: str
    weather: str
    first: Group
    relation: str = ""
    second: Group | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The one or two groups of the scene."""
        return (self.first,) if self.second is None else (self.first, self.second)


def held_out_by(scene: Scene) -> frozenset[str]:
    """Which of the rules "colour", "background" and "relation" reserve `scene` for dev and test."""
    rules = set()
    if any((group.kind, group.colour) in HELD_OUT_COLOURS for group in scene.groups):
        rules.add("colour")
    if any((group.kind, scene.background) in HELD_OUT_BACKGROUNDS for group in scene.groups):
        rules.add("background")
    if scene.second is not None:
        pair = (scene.first.kind, scene.relation, scene.second.kind)
        # "Beside" reads the same from either side, so both orders are reserved.
        mirrored = scene.relation == "beside" and pair[::-1] in HELD_OUT_RELATIONS
        if pair in HELD_OUT_RELATIONS or mirrored:
            rules.add("relation")
    return frozenset(rules)


def is_held_out(scene: Scene) -> bool:
    """Whether `scene` shows a combination that is reserved for dev and test."""
    return bool(held_out_by(scene))


def compose(rng: Random) -> Scene:
    """A random sensible scene, held out or not."""
    while True:
        background = rng.choice(BACKGROUNDS)
        weather = rng.choice(("sunny", "cloudy")) if background in DAYLIGHT else ""
        relation = rng.choice(("", "", "", *RELATIONS))
        firsts, seconds = RELATIONS.get(relation, (tuple(KINDS), ()))
        first = _group(rng, background, firsts, relation, leads=True)
        if first is None:
            continue
        if not relation:
            return Scene(background, weather, first)
        others = tuple(kind for kind in seconds if kind != first.kind)
        second = _group(rng, background, others, relation, leads=False)
        if second is not None:
            if relation == "beside":
                second = replace(second, place="left" if first.place == "right" else "right")
            return Scene(background, weather, first, relation, second)


def _group(rng: Random, background: str, kinds: tuple[str, ...], relation: str, *, leads: bool) -> Group | None:
    """A group of one of `kinds` that fits the background and the relation; None if there is none."""
    fitting = [kind for kind in kinds if _doings(kind, background, relation, leads)]
    if not fitting:
        return None
    kind = rng.choices(fitting, [FREQUENCY.get(kind, 1.0) for kind in fitting])[0]
    doing = rng.choice(_doings(kind, background, relation, leads))
    colours = [c for c in KINDS[kind].colours if kind == "tree" or (background, c) not in CAMOUFLAGE]
    if not relation:
        number = rng.choices((1, 2, 3), (5, 2, 2))[0]
    else:
        # There is room for two in the first group, if they are not too wide.
        number = rng.choices((1, 2), (4, leads and doing not in ("sleep", "drive")))[0]
    size = rng.choice(("large", "small")) if _is_sized(kind, doing, number, relation) else ""
    if relation == "beside":
        place = rng.choice(("left", "right"))
    else:
        place = rng.choice(("left", "middle", "right")) if number == 1 and not relation else ""
    return Group(kind, rng.choice(colours), number, size, place, doing)


def _doings(kind: str, background: str, relation: str, leads: bool) -> list[str]:
    """What `kind` can do on `background`: in a relation, only the first group of "above" flies."""
    doings = KINDS[kind].doings_on(background)
    if relation == "above" and leads:
        return [doing for doing in doings if doing == "fly"]
    if relation:
        grounded = [doing for doing in doings if doing != "fly"]
        # Under a tree or in front of a house a leap would hide what stands behind it.
        return [d for d in grounded if relation == "beside" or d not in ("jump", "bounce")]
    return doings


def _is_sized(kind: str, doing: str, number: int, relation: str) -> bool:
    """Whether there is room in the picture to draw a large one larger than a small one."""
    wide = kind == "car" or doing == "sleep"
    if relation == "beside":
        return number == 1 and not wide
    if relation == "above":
        return kind != "kite"
    return not relation and (number == 1 or (number == 2 and not wide))
