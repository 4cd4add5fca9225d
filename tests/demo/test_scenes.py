"""Scenes: drawings, captions, and the pairs excluded from training."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_fast.demo import tars
from lit_fast.demo.drawing import arrange, draw, render
from lit_fast.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    FILLS,
    KNOWN,
    NOVEL,
    PAIRS,
    PLACES,
    SHAPES,
    SIZE,
    SIZES,
    Scene,
    Thing,
    captions,
    sample,
)
from lit_fast.demo.tars import TEMPLATES, write_captioned, write_classification

CROSSES = Thing("two", "small", "striped", "red", "cross", "left")
RING = Thing("one", "large", "solid", "orange", "ring", "right")
LEFT_RIGHT = Scene((CROSSES, RING), "grey")


def scenes(count: int, **options: object) -> list[Scene]:
    rng = random.Random(3)
    return [sample(rng, **options) for _ in range(count)]  # type: ignore[arg-type]


def test_novel_pairs_keep_every_colour_and_shape_in_training() -> None:
    assert set(KNOWN) | set(NOVEL) == set(PAIRS)
    assert not set(KNOWN) & set(NOVEL)
    for values in (COLOURS, SHAPES):
        for value in values:
            assert sum(value in pair for pair in NOVEL) == 2
            assert sum(value in pair for pair in KNOWN) == 6


def test_sample_uses_the_given_pairs_only() -> None:
    for scene in scenes(500):
        assert all((t.colour, t.shape) in KNOWN for t in scene.things)
    for scene in scenes(500, pairs=NOVEL):
        assert all((t.colour, t.shape) in NOVEL for t in scene.things)


def test_sample_covers_every_attribute() -> None:
    things = [t for s in scenes(2000) for t in s.things]
    for name, values in (
        ("count", COUNTS),
        ("size", SIZES),
        ("fill", FILLS),
        ("colour", COLOURS),
        ("shape", SHAPES),
        ("place", PLACES),
    ):
        assert {getattr(t, name) for t in things} == set(values)
    assert {s.background for s in scenes(2000)} == set(BACKGROUNDS)
    assert {len(s.things) for s in scenes(2000)} == {1, 2, 3}


def test_render_has_the_tower_size_and_depends_on_the_seed() -> None:
    scene = scenes(1)[0]
    one, same, other = (render(scene, random.Random(seed)) for seed in (5, 5, 6))
    assert one.size == (SIZE, SIZE)
    assert one.mode == "RGB"
    assert one.tobytes() == same.tobytes()
    assert one.tobytes() != other.tobytes()


def test_arrange_keeps_places_without_overlap() -> None:
    rng = random.Random(0)
    for scene in scenes(500):
        spots = arrange(scene, rng)
        for number, thing in enumerate(scene.things):
            own = [s for s in spots if s.thing == number]
            assert len(own) == COUNTS.index(thing.count) + 1
            if thing.place != "middle":
                left, top, right, bottom = PLACES[thing.place]
                assert all(left <= s.x <= right and top <= s.y <= bottom for s in own)
        for i, a in enumerate(spots):
            for b in spots[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.9 * max(a.radius, b.radius)


@pytest.mark.parametrize("colour", COLOURS)
def test_draw_uses_the_colour(colour: str) -> None:
    rng = random.Random(1)
    scene = Scene((Thing("one", "large", "solid", colour, "square", "middle"),), "grey")
    spots = arrange(scene, rng)
    pixel = np.asarray(draw(scene, spots, rng), int)[round(spots[0].y) - 2 :, round(spots[0].x) - 2 :]
    distance = {c: np.abs(pixel[:4, :4].mean((0, 1)) - rgb).sum() for c, rgb in COLOURS.items()}
    assert min(distance, key=distance.__getitem__) == colour


@pytest.mark.parametrize("shape", SHAPES)
def test_draw_makes_shapes_differ(shape: str) -> None:
    """The same drawing with another shape differs in many pixels."""
    spots = arrange(LEFT_RIGHT, random.Random(0))
    right = spots[-1]
    box = (int(right.x - 11), int(right.y - 11), int(right.x + 11), int(right.y + 11))

    def drawn(name: str) -> np.ndarray:
        thing = Thing("one", "large", "solid", "red", name, "right")
        image = draw(Scene((LEFT_RIGHT.things[0], thing), "white"), spots, random.Random(0))
        return np.asarray(image.crop(box), int)

    for other in set(SHAPES) - {shape}:
        assert (np.abs(drawn(shape) - drawn(other)).max(-1) > 60).mean() > 0.06


def test_captions_if_complete_state_all_facts() -> None:
    rng = random.Random(0)
    for text in captions(LEFT_RIGHT, rng, 50, complete=True):
        words = text.replace(",", "").split()
        assert {"two", "striped", "red", "crosses", "orange", "ring", "grey"} <= set(words)
        assert {"small", "little"} & set(words)
        assert {"large", "big"} & set(words)
        first, second = text.index("crosses"), text.index("ring")
        assert ("to the left of" in text) == (first < second and "to the" in text)
        assert ("to the right of" in text) == (second < first and "to the" in text)
        assert "a orange" not in text


def test_captions_if_incomplete_are_true() -> None:
    rng = random.Random(0)
    vocabulary = {*COLOURS, *BACKGROUNDS, *SHAPES, *(s + "s" for s in SHAPES), "crosses"}
    for scene in scenes(300):
        facts = {scene.background, *(t.colour for t in scene.things)}
        for thing in scene.things:
            facts.add(thing.shape if thing.count == "one" else thing.shape + "s")
            facts.add("crosses" if thing.shape == "cross" and thing.count != "one" else thing.shape)
        for text in captions(scene, rng, 4):
            words = set(text.replace(",", "").split())
            assert words & vocabulary <= facts
            assert ("striped" not in words) or any(t.fill == "striped" for t in scene.things)
            for verb, number in re.findall(r"there (is|are) (\w+)", text):
                assert (verb == "are") == (number in ("two", "three"))


def test_write_captioned_has_the_img2dataset_layout_and_distinct_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "PER_TAR", 20)
    write_captioned(tmp_path / "a", 50, 7, NOVEL)
    write_captioned(tmp_path / "b", 50, 7, NOVEL)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]
    texts = []
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for key in {name.partition(".")[0] for name in members}:
            meta = json.loads(members[f"{key}.json"])
            assert meta["captions"][0] == meta["caption"] == members[f"{key}.txt"].decode()
            assert len(meta["captions"]) == 3
            assert Image.open(io.BytesIO(members[f"{key}.jpg"])).size == (SIZE, SIZE)
            texts.append(frozenset(meta["captions"]))
    assert len(set(texts)) == 50


def test_write_classification_has_novel_pairs_in_the_clip_benchmark_layout(tmp_path: Path) -> None:
    write_classification(tmp_path, 2 * len(NOVEL), 1, NOVEL)
    names = (tmp_path / "classnames.txt").read_text().splitlines()
    assert names == [f"{colour} {shape}" for colour, shape in PAIRS]
    assert (tmp_path / "zeroshot_classification_templates.txt").read_text().splitlines() == list(TEMPLATES)
    with tarfile.open(tmp_path / "test" / "0.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    labels = [int(data) for name, data in members if name.endswith(".cls")]
    assert sorted(labels) == sorted(2 * [PAIRS.index(pair) for pair in NOVEL])
    assert sum(name.endswith(".jpg") for name, _ in members) == len(labels)
