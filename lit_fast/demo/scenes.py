"""Captioned scenes: coloured shapes, drawn by PIL, described in several true English sentences.

A scene holds one to three things; a thing is one, two or three equal shapes of one size, colour and fill
in one place. About one in seven pairs of colour and shape (`NOVEL`) is kept out of everything that is
trained on, while every colour and every shape occurs, so that recognising "a turquoise heart" means
having learnt "turquoise" and "heart". Everything is a function of the seed.
"""

from __future__ import annotations

import functools
import io
import json
import math
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

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

# No article: "an orange star".
TEMPLATES = ("one {c}", "one small {c}", "one large {c}", "one striped {c}", "a picture of one {c}")

Pair = tuple[str, str]  # colour, shape
PAIRS: tuple[Pair, ...] = tuple((c, s) for c in COLOURS for s in SHAPES)
_COLOUR_NUMBER = {c: i for i, c in enumerate(COLOURS)}
NOVEL: tuple[Pair, ...] = tuple(
    (c, s) for c, s in PAIRS if (_COLOUR_NUMBER[c] + 3 * SHAPES.index(s)) % 7 == 3
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
    """What the captions may speak of; jitter, shading and noise are the drawing's affair."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Spot:
    """One drawn shape: the number of its thing, its centre and its half width, in pixels."""

    thing: int
    x: float
    y: float
    radius: float


def sample(rng: random.Random, pairs: Sequence[Pair] = KNOWN, kinds: int = 0) -> Scene:
    """A random scene of `kinds` things (0: one, two or three) whose colour-shape pairs come from `pairs`."""
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
        # A corner has room for one large shape or three small ones; three things are told briefly.
        single = kinds == 3 or (size == "large" and place in CORNERS)
        count = "one" if single else rng.choice(COUNTS)
        fill = "striped" if kinds < 3 and rng.random() < 0.3 else "solid"
        things.append(Thing(count, size, fill, colour, shape, place))
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)))


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as a 64 x 64 RGB picture; places, sizes, angles, hues and noise vary with `rng`."""
    return draw(scene, arrange(scene, rng), rng)


def arrange(scene: Scene, rng: random.Random) -> list[Spot]:
    """Where each shape of each thing goes; shapes of one scene do not overlap."""
    spots = []
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = PLACES[thing.place]
        count = COUNTS.index(thing.count) + 1
        large = thing.size == "large"
        radius = rng.choice((9.0, 9.5, 10.0)) if large else rng.choice((5.5, 6.0, 6.5))
        if thing.place == "middle" and rng.random() < 0.5:
            left, top, right, bottom = top, left, bottom, right  # upright instead of lying
        if thing.place == "middle" and count < 3:  # keep near the centre
            left, top, right, bottom = max(left, 10), max(top, 10), min(right, 54), min(bottom, 54)
        if len(scene.things) == 1 and count == 1:  # "on the left" shall not mean a corner
            left, right = (left + 16, right - 16) if right - left == SIZE else (left, right)
            top, bottom = (top + 16, bottom - 16) if bottom - top == SIZE else (top, bottom)
        columns, rows = _slots(right - left, bottom - top, count)
        width, height = (right - left) / columns, (bottom - top) / rows
        for slot in rng.sample(range(columns * rows), count):
            slack_x, slack_y = max(width / 2 - radius, 0.0), max(height / 2 - radius, 0.0)
            x = left + (slot % columns + 0.5) * width + rng.uniform(-slack_x, slack_x)
            y = top + (slot // columns + 0.5) * height + rng.uniform(-slack_y, slack_y)
            spots.append(Spot(number, x, y, radius))
    return spots


def _slots(width: float, height: float, count: int) -> tuple[int, int]:
    """Columns and rows of slots for `count` shapes."""
    if width == height:
        return (1, 1) if count == 1 else (2, 2)
    return (count, 1) if width > height else (1, count)


def draw(scene: Scene, spots: Sequence[Spot], rng: random.Random) -> Image.Image:
    """Background, shapes and noise as a 64 x 64 RGB picture."""
    image = _background(BACKGROUNDS[scene.background], rng)
    angles = [rng.randrange(-4, 5) * 5 for _ in scene.things]
    inks = [_jitter(COLOURS[t.colour], 16, rng) for t in scene.things]
    for spot in spots:
        thing = scene.things[spot.thing]
        mask = _mask(thing.shape, thing.fill, round(2 * spot.radius), angles[spot.thing])
        corner = (round(spot.x - mask.width / 2), round(spot.y - mask.height / 2))
        image.paste(inks[spot.thing], corner, mask)
    noise = rng.choice(_noise())
    x, y = rng.randrange(SIZE), rng.randrange(SIZE)
    noise = noise.crop((x, y, x + SIZE, y + SIZE))
    return ImageChops.add(image, noise, offset=-128)


def _jitter(colour: tuple[int, ...], amount: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)


def _background(colour: tuple[int, ...], rng: random.Random) -> Image.Image:
    """Two shades of one colour, mixed by a gradient, a cloud or nothing."""
    one, other = (Image.new("RGB", (SIZE, SIZE), _jitter(_jitter(colour, 8, rng), 10, rng)) for _ in range(2))
    return Image.composite(one, other, rng.choice(_shades()))


@functools.cache
def _shades() -> tuple[Image.Image, ...]:
    """Masks that mix two shades: flat, gradients in sixteen directions, clouds, stripes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    fields = [np.zeros_like(x)] * 8
    for k in range(16):
        slope = math.cos(k * math.pi / 8) * x + math.sin(k * math.pi / 8) * y
        fields.append(0.5 + slope / 1.4)
        fields.append(0.5 + 0.5 * np.sin(slope * (20 + 4 * k)))
    masks = [Image.fromarray((np.clip(f, 0, 1) * 255).astype(np.uint8)) for f in fields]
    for _ in range(16):
        cloud = Image.fromarray(rng.integers(0, 256, (5, 5), np.uint8))
        masks.append(cloud.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return tuple(masks)


@functools.cache
def _noise() -> tuple[Image.Image, ...]:
    """Noise of several strengths around 128, twice as wide as a picture, to be cut at random."""
    rng = np.random.default_rng(1)
    tiles = []
    for sigma in (2, 4, 6, 8, 10, 12):
        values = 128 + sigma * rng.standard_normal((2 * SIZE, 2 * SIZE, 3))
        tiles.append(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)))
    return tuple(tiles)


@functools.cache
def _mask(shape: str, fill: str, diameter: int, angle: int) -> Image.Image:
    """Coverage of one shape, 8-bit, drawn at eight times the size and averaged down."""
    scale = 8
    side = diameter + 4  # room for corners that a rotation turns outward
    canvas = Image.new("L", (side * scale, side * scale))
    middle, radius = side * scale / 2, diameter * scale / 2
    pen = ImageDraw.Draw(canvas)

    def disc(x: float, y: float, r: float, value: int) -> None:
        box = (middle + radius * (x - r), middle + radius * (y - r))
        pen.ellipse((*box, middle + radius * (x + r), middle + radius * (y + r)), fill=value)

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        pen.polygon([(middle + radius * x, middle + radius * y) for x, y in points], fill=255)

    if shape == "circle":
        disc(0, 0, 0.95, 255)
    elif shape == "ring":
        disc(0, 0, 1, 255)
        disc(0, 0, 0.52, 0)
    elif shape == "crescent":
        disc(0, 0, 1, 255)
        disc(0.5, -0.12, 0.82, 0)
    elif shape == "square":
        polygon([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)])
    elif shape == "triangle":
        polygon([(0, -1), (1, 0.8), (-1, 0.8)])
    elif shape == "star":
        turns = [(math.pi * k / 5, 1.08 if k % 2 == 0 else 0.44) for k in range(10)]
        polygon([(r * math.sin(a), -r * math.cos(a)) for a, r in turns])
    elif shape == "cross":
        polygon([(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)])
        polygon([(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)])
    else:  # heart
        disc(-0.48, -0.38, 0.52, 255)
        disc(0.48, -0.38, 0.52, 255)
        polygon([(-0.95, -0.16), (0, -0.5), (0.95, -0.16), (0, 1)])
    if fill == "striped":
        stripes = Image.new("L", canvas.size, 255)
        width = 2.2 * scale
        for k in range(1, math.ceil(canvas.width / width), 2):
            ImageDraw.Draw(stripes).rectangle((0, k * width, canvas.width, (k + 1) * width), fill=70)
        canvas = ImageChops.multiply(canvas, stripes)
    canvas = canvas.rotate(angle, Image.Resampling.BILINEAR)
    return canvas.resize((side, side), Image.Resampling.BOX)


def captions(scene: Scene, rng: random.Random, count: int = 3, complete: bool = False) -> list[str]:
    """`count` true sentences about the scene, the first one complete; all of them if `complete`.

    An incomplete caption leaves out the background, a size, a fill, the places or a whole thing.
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
    if len(things) == 1 and len(scene.things) == 1:
        body = _single(things[0], phrases[things[0]], rng, full)
    elif len(things) == 1:
        body = phrases[things[0]]
    elif len(things) == 2:
        body = _double(*things, phrases, rng, full)
    else:
        rng.shuffle(things)
        placed = full or rng.random() < 0.7
        parts = [f"{phrases[t]} {_where(t.place, rng, brief=True)}" if placed else phrases[t] for t in things]
        body = f"{parts[0]}, {parts[1]} and {parts[2]}"
    return _frame(body, scene.background, rng, full)


def _phrase(thing: Thing, rng: random.Random, detail: float) -> str:
    """For example "two small striped red stars"."""
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


def _single(thing: Thing, phrase: str, rng: random.Random, full: bool) -> str:
    if not full and rng.random() < 0.4:
        return phrase
    return f"{phrase} {_where(thing.place, rng)}"


def _double(first: Thing, second: Thing, phrases: dict[Thing, str], rng: random.Random, full: bool) -> str:
    """The two things stand left and right, or at the top and the bottom."""
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


def write_captioned(
    directory: Path, scenes: int, seed: int, pairs: Sequence[Pair], per_tar: int = 2048
) -> None:
    """Write `00000.tar`, ... as img2dataset does: per scene key.jpg, key.txt, key.json with all captions.

    No two scenes are the same description. The captions of scenes with `NOVEL` pairs, which are for
    retrieval, are all complete.
    """
    rng = random.Random(seed)
    seen: set[Scene] = set()
    directory.mkdir(parents=True, exist_ok=True)
    for first in range(0, scenes, per_tar):
        with tarfile.open(directory / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, scenes)):
                while (scene := sample(rng, pairs)) in seen:
                    pass
                seen.add(scene)
                texts = captions(scene, rng, complete=pairs == NOVEL)
                meta = {"key": f"{number:09d}", "caption": texts[0], "captions": texts}
                _add(tar, f"{number:09d}.jpg", _jpeg(render(scene, rng)))
                _add(tar, f"{number:09d}.txt", texts[0].encode())
                _add(tar, f"{number:09d}.json", json.dumps(meta).encode())


def write_classification(directory: Path, scenes: int, seed: int, pairs: Sequence[Pair] = NOVEL) -> None:
    """Write single-thing scenes in CLIP_benchmark's layout; the classes are `pairs`, equally often."""
    rng = random.Random(seed)
    (directory / "test").mkdir(parents=True, exist_ok=True)
    names = [f"{colour} {shape}" for colour, shape in pairs]
    (directory / "classnames.txt").write_text("\n".join(names) + "\n")
    (directory / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (directory / "dataset_type.txt").write_text("classification\n")
    with tarfile.open(directory / "test" / "0.tar", "w") as tar:
        for number in range(scenes):
            label = number % len(pairs)
            scene = sample(rng, (pairs[label],), kinds=1)
            _add(tar, f"{number:09d}.jpg", _jpeg(render(scene, rng)))
            _add(tar, f"{number:09d}.cls", str(label).encode())
    (directory / "test" / "nshards.txt").write_text("1\n")


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
