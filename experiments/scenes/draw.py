"""Draws the `scenes` data set: 800 small pictures with five captions each, in Flickr8k's on-disk format.

Flickr8k may not be handed on, so the project carries this data of its own: small enough to commit, and with
compositions in dev and test that train never shows. The same seed gives the same bytes with the same Pillow.

    python experiments/scenes/draw.py [--output FOLDER] [--seed N]
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from backgrounds import stage
from captions import describe
from PIL import Image, ImageDraw, ImageFilter
from scene import RULES, Group, Scene, compose, held_out_by, is_held_out
from shapes import DOING_WIDTHS, FULL, SCALE, SHAPES, SIDE, thing

__all__ = [
    "SPLITS",
    "Example",
    "Group",
    "Scene",
    "compose",
    "describe",
    "draw",
    "is_held_out",
    "scenes",
    "write",
]

SEED = 8
SPLITS = {"train": (600, 0), "dev": (50, 50), "test": (50, 50)}
"""Pictures of each split: how many like those of train, how many with a reserved composition."""
QUALITY = 72


@dataclass(frozen=True)
class Example:
    """One picture of the data set, before it is drawn."""

    name: str
    split: str
    scene: Scene
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Spot:
    """Where one thing goes: the middle of its foot, its height, and how far off the ground it is."""

    group: Group
    x: float
    base: float
    height: float
    lift: float = 0


def scenes(seed: int = SEED) -> Iterator[Example]:
    """The whole data set in the order of its file names; no scene occurs twice, whatever the splits."""
    rng = Random(f"{seed} scenes")
    wanted: list[tuple[str, str]] = []
    for split, (ordinary, reserved) in SPLITS.items():
        # The three rules take turns, or the rarest of them would hardly be seen.
        wanted += [(split, "")] * ordinary + [(split, RULES[index % len(RULES)]) for index in range(reserved)]
    rng.shuffle(wanted)
    seen: set[Scene] = set()
    for number, (split, rule) in enumerate(wanted):
        scene = compose(rng)
        while scene in seen or (rule not in held_out_by(scene) if rule else is_held_out(scene)):
            scene = compose(rng)
        seen.add(scene)
        yield Example(f"scene_{number:04}.jpg", split, scene, describe(scene, rng))


def draw(scene: Scene, rng: Random) -> Image.Image:
    """`scene` as an RGB picture; `rng` decides all that the scene leaves open."""
    horizon = 128.0 if scene.background == "underwater" else rng.uniform(78, 92)
    picture = stage(scene.background, scene.weather, horizon, rng).convert("RGBA")
    spots = arrange(scene, rng)
    shadows = Image.new("L", (FULL, FULL))
    for spot in spots:
        if spot.group.doing not in ("fly", "swim", "leap", "sail"):
            half = spot.height * _width(spot.group) * 0.48
            box = (spot.x - half, spot.base + spot.lift - 4, spot.x + half, spot.base + spot.lift + 5)
            ImageDraw.Draw(shadows).ellipse([edge * SCALE for edge in box], fill=90)
    shadow = Image.new("RGBA", (FULL, FULL), (0, 0, 0, 255))
    shadow.putalpha(shadows.filter(ImageFilter.BoxBlur(5)))
    picture = Image.alpha_composite(picture, shadow)
    mirrored = {group: rng.random() < 0.5 for group in scene.groups}
    for spot in spots:
        group = spot.group
        place = (spot.x, spot.base, spot.height, mirrored[group])
        layer = thing(group.kind, group.colour, group.doing, *place, rng)
        picture = Image.alpha_composite(picture, layer)
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _width(group: Group) -> float:
    return DOING_WIDTHS.get(group.doing, SHAPES[group.kind].width)


def arrange(scene: Scene, rng: Random) -> list[Spot]:
    """A spot for every single thing of `scene`, those farther back first."""
    first, second = scene.first, scene.second
    if second is None:
        boxes = {1: {"large": 108, "small": 60}, 2: {"large": 74, "small": 50, "": 66}, 3: {"": 56}}[first.number]
        box = boxes[first.size]
        if first.place not in ("left", "right"):
            return _row(first, SIDE / 2, 150 if box > 100 else 142, box, rng)
        # Even something large must be seen to be on one side.
        middle = 54.0 if first.size == "large" else 40.0
        return _row(first, middle if first.place == "left" else SIDE - middle, 146, 0.92 * box, rng, 108)
    if scene.relation == "beside":
        boxes = {"large": 78, "small": 44, "": 64}
        rooms = {first: 96, second: 64} if first.number > 1 else {first: 80, second: 80}
        spots = []
        for group, room in reversed(rooms.items()):
            middle = room / 2 if group.place == "left" else SIDE - room / 2
            spots.append(_row(group, middle, 146, boxes[group.size], rng, room - 4))
    elif scene.relation == "front":
        middle = rng.uniform(68, 92)
        spots = [_row(second, middle, 132, 124, rng)]
        spots.append(_row(first, middle + rng.choice((-26, 26)), 154, 64, rng))
    elif scene.relation == "under":
        middle = rng.uniform(72, 88)
        spots = [_row(second, middle, 146, 136, rng)]
        spots.append(_row(first, middle + rng.choice((-24, 24)), 153, 56, rng))
    else:
        boxes = {"large": 72, "small": 50, "": 64}
        middle = rng.uniform(70, 90)
        spots = [_row(second, middle, 154, {"large": 78, "small": 52}[second.size], rng)]
        # What flies keeps clear of what is below it.
        ceiling = min(spot.base - spot.height for spot in spots[0]) - 8
        box = min(boxes[first.size] - 8 * (first.number > 1), ceiling * SHAPES[first.kind].width ** 0.5)
        spots.append(_row(first, middle + rng.uniform(-10, 10), ceiling, box, rng))
    return [spot for row in spots for spot in row]


def _row(group: Group, middle: float, base: float, box: float, rng: Random, room: float = SIDE - 6) -> list[Spot]:
    """The things of one group side by side around `middle`, each about `box` large, in `room` at most."""
    box *= rng.uniform(0.93, 1.04)
    width = _width(group)
    # Things of one box cover a similar area, whether long or tall; in a tight row they overlap a little.
    height = min(box / width**0.5, 1.1 * box, room / (1 + 0.88 * (group.number - 1)) / width)
    gap = min(height * width * 1.04, (room - height * width) / max(1, group.number - 1))
    half = height * width / 2 + gap * (group.number - 1) / 2
    middle = min(max(middle + rng.uniform(-5, 5), half + 3), SIDE - half - 3)
    lift = {"bounce": 0.45, "jump": 0.16}.get(group.doing, 0.0) * height
    if group.doing == "fly":
        # Alone in the middle of the sky, or with its foot at the given height.
        base = 62 + height / 2 if base > 120 else max(base, height + 3)
    elif group.doing == "swim":
        base = 78 + height / 2
    spots = []
    for index in range(group.number):
        # Later ones stand nearer, so their feet are lower.
        step = index - (group.number - 1) / 2
        depth = step * rng.uniform(5, 10) if group.number > 1 else rng.uniform(-3, 3)
        foot = min(base + depth, 156)
        up = min(lift, max(0.0, foot - height - 3))
        spots.append(Spot(group, middle + gap * step, foot - up, height, up))
    return spots


def write(folder: Path, seed: int = SEED) -> None:
    """Writes pictures, captions and splits to `folder`, in place of any that are there."""
    pictures = folder / "Scenes_Dataset"
    if pictures.exists():
        shutil.rmtree(pictures)
    pictures.mkdir(parents=True)
    lines: list[str] = []
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for example in scenes(seed):
        image = draw(example.scene, Random(f"{seed} {example.name}"))
        image.save(pictures / example.name, quality=QUALITY, optimize=True)
        lines += [f"{example.name}#{index}\t{caption}" for index, caption in enumerate(example.captions)]
        members[example.split].append(example.name)
    _write_lines(folder / "Scenes.token.txt", lines)
    for split, names in members.items():
        _write_lines(folder / f"Scenes.{split}Images.txt", names)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Reads the command line and writes the data set."""
    parser = argparse.ArgumentParser(description="Draw the scenes data set.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of everything random")
    options = parser.parse_args()
    write(options.output, options.seed)
    print(f"wrote {sum(map(sum, SPLITS.values()))} pictures to {options.output}")


if __name__ == "__main__":
    main()
