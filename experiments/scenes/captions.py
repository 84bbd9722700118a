"""Five captions for a scene, as five different people would write them.

Templates hold slots; each slot is filled again for each caption from the tables of words below. `a` is the
group a caption speaks of first and `b` the other one.
"""

from dataclasses import dataclass
from random import Random

from scene import Group, Scene

CAPTIONS = 5
FEWEST_WORDS, MOST_WORDS = 5, 16
REPEATABLE = ("a", "an", "the", "of", "on", "in", "under", "to", "is")


@dataclass(frozen=True)
class Verb:
    """One verb as it agrees with one thing, with several, and as a participle."""

    singular: str
    plural: str
    participle: str


NOUNS = {
    "dog": (("dog", "dogs"), ("dog", "dogs"), ("animal", "animals")),
    "cat": (("cat", "cats"), ("cat", "cats"), ("animal", "animals")),
    "child": (("child", "children"), ("kid", "kids")),
    "ball": (("ball", "balls"),),
    "house": (("house", "houses"), ("house", "houses"), ("building", "buildings")),
    "tree": (("tree", "trees"),),
    "car": (("car", "cars"), ("car", "cars"), ("vehicle", "vehicles")),
    "bird": (("bird", "birds"),),
    "kite": (("kite", "kites"),),
    "umbrella": (("umbrella", "umbrellas"),),
    "boat": (("boat", "boats"), ("sailboat", "sailboats")),
    "fish": (("fish", "fish"),),
}
SMALL_NOUNS = {"dog": ("puppy", "puppies"), "cat": ("kitten", "kittens")}
SIZES = {"large": ("big", "large", "huge"), "small": ("small", "little", "tiny"), "": ("",)}
NUMBERS = {2: ("two", "two", "a pair of", "some"), 3: ("three", "three", "a group of", "some")}

STANDS = Verb("stands", "stand", "standing")
VERBS = {
    "run": (Verb("runs", "run", "running"), Verb("races", "race", "racing")),
    "sit": (Verb("sits", "sit", "sitting"),),
    "sleep": (Verb("sleeps", "sleep", "sleeping"), Verb("is asleep", "are asleep", "lying asleep")),
    "stand": (STANDS,),
    "wave": (Verb("waves", "wave", "waving"), Verb("raises a hand", "raise a hand", "raising a hand")),
    "jump": (Verb("jumps", "jump", "jumping"), Verb("leaps", "leap", "leaping")),
    "lie": (Verb("lies", "lie", "lying"), Verb("rests", "rest", "resting")),
    "bounce": (Verb("bounces", "bounce", "bouncing"),),
    "park": (Verb("is parked", "are parked", "parked"), STANDS),
    "drive": (Verb("drives", "drive", "driving"),),
    "fly": (Verb("flies", "fly", "flying"), Verb("soars", "soar", "soaring")),
    "perch": (STANDS, Verb("rests", "rest", "resting")),
    "open": (STANDS, Verb("is open", "are open", "open")),
    "sail": (Verb("sails", "sail", "sailing"), Verb("floats", "float", "floating")),
    "swim": (Verb("swims", "swim", "swimming"),),
    "leap": (Verb("jumps", "jump", "jumping"), Verb("leaps", "leap", "leaping")),
}

SETTINGS = {
    "meadow": ("on the grass", "in a meadow", "in a green field", "on a grassy field"),
    "beach": ("on the beach", "on the sand", "at the sandy beach", "near the sea"),
    "snow": ("in the snow", "in the white snow", "on a snowy hill", "on a winter day"),
    "street": ("on the street", "on the road", "in the city", "on a city street"),
    "night": ("at night", "in the dark", "under the stars", "under the moon"),
    "sea": ("on the water", "at sea", "on the blue ocean", "on the open sea"),
    "room": ("in a room", "on the floor", "inside a room", "on the wooden floor"),
    "underwater": ("under the water", "in the deep sea", "in the blue ocean", "in the water"),
}
"""Where a group on the ground (or in the water) is, and where a whole scene is."""
OVER = {
    "meadow": ("over the grass", "over a meadow", "over a green field"),
    "beach": ("over the beach", "over the sand", "above the beach"),
    "snow": ("over the snow", "above the snow", "over a snowy hill"),
    "street": ("over the street", "above the road", "over the city"),
    "night": ("at night", "in the night sky", "in the dark sky"),
    "sea": ("over the water", "over the sea", "above the ocean"),
}
"""Where a flying group is; "in the sky" and "through the air" go everywhere."""
ACROSS = {
    "meadow": ("across the grass", "through a meadow", "across a green field"),
    "beach": ("across the sand", "along the beach", "along the sea"),
    "snow": ("through the snow", "across the snow"),
    "street": ("along the street", "along the road", "through the city"),
    "night": ("through the night", "through the dark"),
    "room": ("through a room", "across the floor"),
}
"""Where a running or driving group is, half of the time."""
SIDES = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "": ("",),
}
WEATHER = {
    "sunny": ("on a sunny day", "in the sun", "in the bright sun"),
    "cloudy": ("on a cloudy day", "under a cloudy sky", "under white clouds"),
}

# {a} {b} the groups; {is} {does} {doing} the verb of a, {b_does} of b; {where} where a does it, {setting}
# where the scene is; {by} the relation in words, {side} where in the picture a is.
ALONE = (
    "{a} {is} {doing} {where}",
    "{a} {is} {doing} {where}",
    "{a} {does} {where}",
    "{a} {does} {where}",
    "{a} {doing} {where}",
    "{a} {doing} {where}",
    "{setting} , {a} {does}",
    "there {is} {a} {setting}",
    "{a} {is} {setting}",
)
PLACED = ("{a} {does} {side}", "{a} {is} {side}", "{side} , {a} {does} {where}", "{a} {doing} {where} {side}")
WEATHERED = ("{a} {does} {weather}", "{a} {is} {doing} {where} {weather}", "{weather} , {a} {does} {where}")
RELATED = (
    "{a} {is} {doing} {by} {b}",
    "{a} {does} {by} {b}",
    "{a} {does} {by} {b} {setting}",
    "{a} {doing} {by} {b}",
    "{a} {is} {by} {b} {setting}",
    "{setting} , {a} {does} {by} {b}",
    "there {is} {a} {by} {b}",
)
TOGETHER = ("{a} and {b} {setting}", "{a} and {b} are {setting}")
MEANWHILE = ("{a} {does} while {b} {b_does} {setting}", "{a} {is} {doing} and {b} {b_does} {setting}")
TO_THE_LEFT = ("{a} {does} on the left and {b} on the right", "{a} {is} to the left of {b}")
TO_THE_RIGHT = ("{a} {does} on the right and {b} on the left", "{a} {is} to the right of {b}")
BY = {
    "beside": (("next to", "beside", "near"), ("next to", "beside", "near")),
    "front": (("in front of",), ("behind",)),
    "above": (("above", "over", "high above"), ("below", "under")),
    "under": (("under", "below"), ("above", "over")),
}
"""Each relation in words: as seen from the first group, and as seen from the second."""


def describe(scene: Scene, rng: Random) -> tuple[str, ...]:
    """Five different captions of `scene` in Flickr8k's style: spaces between tokens, a capital, mostly a final ` .`."""
    captions: list[str] = []
    used: set[str] = set()
    while len(captions) < CAPTIONS:
        template, slots = _sentence(scene, rng)
        words = template.format(**slots).split()
        length = sum(word != "," for word in words)
        # "A red house and a tree" may repeat its "a", but nobody says "by the sea ... at sea".
        content = [word for word in words if word not in REPEATABLE]
        repeats = len(set(content)) < len(content)
        if template in used or repeats or not FEWEST_WORDS <= length <= MOST_WORDS:
            continue
        used.add(template)
        sentence = " ".join(words)
        captions.append(sentence[0].upper() + sentence[1:] + (" ." if rng.random() < 0.9 else ""))
    return tuple(captions)


def _sentence(scene: Scene, rng: Random) -> tuple[str, dict[str, str]]:
    """One template and the words for its slots."""
    a, b, side = scene.first, scene.second, 0
    if b is not None and rng.random() < 0.3:
        a, b, side = b, a, 1
    solo = b is None or rng.random() < 0.2
    verb = rng.choice(VERBS[a.doing])
    slots = {
        "a": _named(a, rng),
        "is": "is" if a.number == 1 else "are",
        "does": verb.singular if a.number == 1 else verb.plural,
        "doing": verb.participle,
        "where": _where(a, scene.background, rng),
        # A thing in the sky, all by itself, is not "on the grass".
        "setting": rng.choice((OVER if solo and a.doing == "fly" else SETTINGS)[scene.background]),
        "side": rng.choice(SIDES[a.place]),
    }
    if scene.weather:
        slots["weather"] = rng.choice(WEATHER[scene.weather])
    if b is None or solo:
        templates = [*ALONE, *(PLACED if a.place else ()), *(WEATHERED if scene.weather else ())]
        return rng.choice(templates), slots
    other = rng.choice(VERBS[b.doing])
    slots |= {
        "b": _named(b, rng),
        "b_does": other.singular if b.number == 1 else other.plural,
        "by": rng.choice(BY[scene.relation][side]),
    }
    templates = [*RELATED, *TOGETHER, *MEANWHILE]
    if scene.relation == "beside":
        templates += TO_THE_RIGHT if a.place == "right" else TO_THE_LEFT
    return rng.choice(templates), slots


def _named(group: Group, rng: Random) -> str:
    """A noun phrase: always a noun, a number for several, size and colour as the speaker likes."""
    plural = group.number > 1
    noun = rng.choice(NOUNS[group.kind])[plural]
    size = rng.choice(SIZES[group.size]) if rng.random() < 0.4 else ""
    if group.size == "small" and rng.random() < 0.45:
        noun = SMALL_NOUNS.get(group.kind, ("", ""))[plural] or noun
    colour = group.colour if rng.random() < 0.65 else ""
    if group.kind == "child":
        shirt = f"{colour} shirts" if plural else f"a {colour} shirt"
        dressed = rng.choice((f"in {shirt}", f"wearing {shirt}", f"wearing {colour}", f"in {colour}"))
        words = f"{size} {noun} {dressed}" if colour else f"{size} {noun}"
    elif group.kind == "tree" and colour and rng.random() < 0.3:
        words = f"{size} {noun} with {colour} leaves"
    else:
        words = f"{size} {colour} {noun}"
    words = " ".join(words.split())
    if plural:
        return f"{rng.choice(NUMBERS[group.number])} {words}"
    if rng.random() < 0.15:
        return f"the {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _where(group: Group, background: str, rng: Random) -> str:
    """Where a group is, in words that suit what it does."""
    if group.doing == "fly":
        return rng.choice((*OVER[background], "in the sky", "through the air"))
    if group.doing == "leap":
        return rng.choice(("out of the water", "out of the sea", "over the waves"))
    if group.doing in ("run", "drive") and rng.random() < 0.5:
        return rng.choice(ACROSS[background])
    if group.doing == "sail" and rng.random() < 0.3:
        return rng.choice(("on the waves", "across the water", "across the sea"))
    return rng.choice(SETTINGS[background])
