"""Captioned scenes: coloured shapes and true English sentences about them.

A scene has one to three things. A thing is one, two or three equal shapes of one size, colour and fill in one place.
One in four pairs of colour and shape (`NOVEL`) occurs in no training scene, while every colour and every shape does:
a model that recognizes "a purple heart" has learnt "purple" and "heart". All scenes are a function of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SIZE = 64  # pixels

COLOURS = {
    "red": (214, 38, 44),
    "orange": (245, 138, 28),
    "yellow": (247, 218, 46),
    "green": (44, 158, 62),
    "turquoise": (58, 205, 198),
    "blue": (48, 78, 220),
    "purple": (136, 58, 172),
    "pink": (247, 148, 196),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
BACKGROUNDS = {
    "white": (246, 246, 246),
    "grey": (132, 132, 132),
    "black": (20, 20, 22),
    "brown": (98, 66, 42),
    "beige": (226, 208, 172),
}
COUNTS = ("one", "two", "three")
SIZES = ("small", "large")
FILLS = ("solid", "striped")
# Place -> (left, top, right, bottom) in pixels.
PLACES = {
    "left": (0, 0, 32, 64),
    "right": (32, 0, 64, 64),
    "top": (0, 0, 64, 32),
    "bottom": (0, 32, 64, 64),
    "middle": (0, 14, 64, 50),
    "top left": (0, 0, 32, 32),
    "top right": (32, 0, 64, 32),
    "bottom left": (0, 32, 32, 64),
    "bottom right": (32, 32, 64, 64),
}
CORNERS = tuple(p for p in PLACES if " " in p)

Pair = tuple[str, str]  # colour, shape
PAIRS: tuple[Pair, ...] = tuple((c, s) for c in COLOURS for s in SHAPES)
# Two shapes of every colour, two colours of every shape.
NOVEL: tuple[Pair, ...] = tuple(
    (colour, shape)
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
    if (i + 3 * j) % 8 in (0, 5)
)
KNOWN: tuple[Pair, ...] = tuple(p for p in PAIRS if p not in NOVEL)


@dataclass(frozen=True)
class Thing:
    """One to three equal shapes."""

    count: str
    size: str
    fill: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """The facts that captions state; `lit_fast.demo.drawing` adds random details."""

    things: tuple[Thing, ...]
    background: str


def sample(rng: random.Random, pairs: Sequence[Pair] = KNOWN, kinds: int = 0) -> Scene:
    """Sample a scene of `kinds` things with colours and shapes of `pairs`.

    If `kinds` is 0, the number is random: one, two or three.
    """
    kinds = kinds or rng.choices((1, 2, 3), (3, 5, 2))[0]
    if kinds == 1:
        places = [rng.choice(tuple(PLACES))]
    elif kinds == 2:
        places = list(rng.choice((("left", "right"), ("top", "bottom"))))
    else:
        places = rng.sample(CORNERS, 3)
    things = []
    for place, (colour, shape) in zip(places, rng.sample(pairs, kinds), strict=True):
        size = rng.choice(SIZES)
        # A corner has room for one large shape or three small ones; captions of three things are brief.
        single = kinds == 3 or (size == "large" and place in CORNERS)
        count = "one" if single else rng.choice(COUNTS)
        fill = "striped" if kinds < 3 and rng.random() < 0.3 else "solid"
        things.append(Thing(count, size, fill, colour, shape, place))
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)))


def captions(scene: Scene, rng: random.Random, count: int = 3, complete: bool = False) -> list[str]:
    """Return `count` true sentences about the scene.

    The first is complete; with `complete` all of them are. An incomplete caption omits the background, a size, a fill,
    the places or a whole thing.
    """
    out: list[str] = []
    while len(out) < count:
        full = complete or not out
        text = _sentence(scene, rng, full)
        if text not in out or rng.random() < 0.1:
            out.append(text)
    return out


def _sentence(scene: Scene, rng: random.Random, full: bool) -> str:
    things = list(scene.things)
    if not full and len(things) > 1 and rng.random() < 0.15:
        things = [rng.choice(things)]
    detail = 1.0 if full else 0.6
    phrases = {t: _phrase(t, rng, detail) for t in things}
    if len(things) == 1:
        body = phrases[things[0]]
        if len(scene.things) == 1 and (full or rng.random() >= 0.4):
            body += f" {_where(things[0].place, rng)}"
    elif len(things) == 2:
        body = _double(things[0], things[1], phrases, rng, full)
    else:
        rng.shuffle(things)
        placed = full or rng.random() < 0.7
        parts = [f"{phrases[t]} {_where(t.place, rng, brief=True)}" if placed else phrases[t] for t in things]
        body = f"{parts[0]}, {parts[1]} and {parts[2]}"
    return _frame(body, scene.background, rng, full)


def _phrase(thing: Thing, rng: random.Random, detail: float) -> str:
    """Return, for example, "two small striped red stars"."""
    words = []
    if rng.random() < detail:
        words.append(thing.size if rng.random() < 0.75 else {"small": "little", "large": "big"}[thing.size])
    if thing.fill == "striped" and rng.random() < detail:
        words.append("striped")
    words.append(thing.colour)
    if thing.count == "one":
        words.append(thing.shape)
        article = "one" if rng.random() < 0.2 else "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])
    words.append(thing.shape + ("es" if thing.shape.endswith("s") else "s"))
    return " ".join([thing.count, *words])


def _where(place: str, rng: random.Random, brief: bool = False) -> str:
    if place in CORNERS:
        return place if brief else rng.choice((f"in the {place} corner", f"at the {place}"))
    if place in ("left", "right"):
        return rng.choice((f"on the {place}", f"on the {place} side"))
    return "in the middle" if place == "middle" else f"at the {place}"


def _double(first: Thing, second: Thing, phrases: dict[Thing, str], rng: random.Random, full: bool) -> str:
    """Describe two things, which are left and right, or at the top and the bottom."""
    a, b = phrases[first], phrases[second]
    if not full and rng.random() < 0.3:
        return f"{a} and {b}" if rng.random() < 0.5 else f"{b} and {a}"
    if first.place == "left":
        forms = (
            f"{a} to the left of {b}",
            f"{b} to the right of {a}",
            f"{a} on the left and {b} on the right",
        )
    else:
        forms = (f"{a} above {b}", f"{b} below {a}", f"{a} at the top and {b} at the bottom")
    return rng.choice(forms)


def _frame(body: str, background: str, rng: random.Random, full: bool) -> str:
    if full or rng.random() < 0.5:
        ground = rng.choice((f"on a {background} background", f"on {background}"))
        if rng.random() < 0.2:
            return f"{ground}, {body}"
        body = f"{body} {ground}"
    are = "are" if body.startswith(("two", "three")) else "is"
    return rng.choice(("", "", "", f"there {are} ", "a picture of ", "a picture with ")) + body
