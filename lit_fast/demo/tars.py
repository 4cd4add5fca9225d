"""Scenes as tar files, in the layouts of img2dataset (captions) and CLIP_benchmark (classes)."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lit_fast.demo.drawing import render
from lit_fast.demo.scenes import NOVEL, PAIRS, Pair, Scene, captions, sample

# No article: "an orange star".
TEMPLATES = ("one {c}", "one small {c}", "one large {c}", "one striped {c}", "a picture of one {c}")


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
    """Write single-thing scenes in CLIP_benchmark's layout.

    On the pictures are `pairs`, equally often; the class names are all pairs, so that a picture can also be
    taken for something that was trained on.
    """
    rng = random.Random(seed)
    (directory / "test").mkdir(parents=True, exist_ok=True)
    names = [f"{colour} {shape}" for colour, shape in PAIRS]
    (directory / "classnames.txt").write_text("\n".join(names) + "\n")
    (directory / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (directory / "dataset_type.txt").write_text("classification\n")
    with tarfile.open(directory / "test" / "0.tar", "w") as tar:
        for number in range(scenes):
            pair = pairs[number % len(pairs)]
            scene = sample(rng, (pair,), kinds=1)
            _add(tar, f"{number:09d}.jpg", _jpeg(render(scene, rng)))
            _add(tar, f"{number:09d}.cls", str(PAIRS.index(pair)).encode())
    (directory / "test" / "nshards.txt").write_text("1\n")


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
