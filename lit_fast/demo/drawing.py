"""Draw scenes with PIL.

Positions, sizes, angles, hues, backgrounds and noise are random.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from lit_fast.demo.scenes import BACKGROUNDS, COLOURS, COUNTS, PLACES, SIZE, Scene


@dataclass(frozen=True)
class Spot:
    """The index of a thing, and the centre and half width of one of its shapes in pixels."""

    thing: int
    x: float
    y: float
    radius: float


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw the scene as a 64 x 64 RGB picture, at random positions."""
    return draw(scene, arrange(scene, rng), rng)


def arrange(scene: Scene, rng: random.Random) -> list[Spot]:
    """Choose the position of each shape; the shapes of a scene do not overlap."""
    spots = []
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = PLACES[thing.place]
        count = COUNTS.index(thing.count) + 1
        large = thing.size == "large"
        radius = rng.choice((9.0, 9.5, 10.0)) if large else rng.choice((5.5, 6.0, 6.5))
        if thing.place == "middle" and rng.random() < 0.5:
            left, top, right, bottom = top, left, bottom, right  # vertical instead of horizontal
        if thing.place == "middle" and count < 3:  # keep near the centre
            left, top, right, bottom = max(left, 10), max(top, 10), min(right, 54), min(bottom, 54)
        if len(scene.things) == 1 and count == 1:  # "on the left" must not be a corner
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
    """Return the columns and rows of slots for `count` shapes."""
    if width == height:
        return (1, 1) if count == 1 else (2, 2)
    return (count, 1) if width > height else (1, count)


def draw(scene: Scene, spots: Sequence[Spot], rng: random.Random) -> Image.Image:
    """Draw background, shapes and noise as a 64 x 64 RGB picture."""
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
    """Mix two shades of one colour by a gradient, a cloud or nothing."""
    one, other = (Image.new("RGB", (SIZE, SIZE), _jitter(_jitter(colour, 8, rng), 10, rng)) for _ in range(2))
    return Image.composite(one, other, rng.choice(_shades()))


@functools.cache
def _shades() -> tuple[Image.Image, ...]:
    """Return masks that mix two shades: flat, gradients, stripes and clouds."""
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
    """Return noise around 128, twice as wide as a picture, for random crops."""
    rng = np.random.default_rng(1)
    tiles = []
    for sigma in (2, 4, 6, 8, 10, 12):
        values = 128 + sigma * rng.standard_normal((2 * SIZE, 2 * SIZE, 3))
        tiles.append(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)))
    return tuple(tiles)


@functools.cache
def _mask(shape: str, fill: str, diameter: int, angle: int) -> Image.Image:
    """Return the 8-bit coverage of a shape, drawn at 8 times the size and averaged."""
    scale = 8
    side = diameter + 4  # space for corners after the rotation
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
        corners = [(math.pi * k / 5, 1.08 if k % 2 == 0 else 0.44) for k in range(10)]
        polygon([(r * math.sin(a), -r * math.cos(a)) for a, r in corners])
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
