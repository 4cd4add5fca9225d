"""Write scenes as tar files in the layouts of img2dataset and CLIP_benchmark."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence

from PIL import Image

from lit_fast.demo.drawing import render
from lit_fast.demo.scenes import NOVEL, PAIRS, Pair, Scene, captions, sample
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import local_path, make_directory
from lit_fast.storage.paths import StrPath, join

PER_TAR = 2048  # scenes

# No article: "an orange star".
TEMPLATES = ("one {c}", "one small {c}", "one large {c}", "one striped {c}", "a picture of one {c}")


def write_captioned(directory: StrPath, scenes: int, seed: int, pairs: Sequence[Pair]) -> None:
    """Write captioned scenes in img2dataset's layout.

    The files are `00000.tar`, ... with key.jpg, key.txt and key.json (all captions) of each scene. No two scenes have
    the same description. Scenes of `NOVEL` pairs, which are for retrieval, get complete captions only.
    """
    rng = random.Random(seed)
    used: set[Scene] = set()
    make_directory(directory)
    for first in range(0, scenes, PER_TAR):
        with tarfile.open(local_path(join(directory, f"{first // PER_TAR:05d}.tar")), "w") as tar:
            for number in range(first, min(first + PER_TAR, scenes)):
                while (scene := sample(rng, pairs)) in used:
                    pass
                used.add(scene)
                texts = captions(scene, rng, complete=pairs == NOVEL)
                meta = {"key": f"{number:09d}", "caption": texts[0], "captions": texts}
                _add(tar, f"{number:09d}.jpg", _jpeg(render(scene, rng)))
                _add(tar, f"{number:09d}.txt", texts[0].encode())
                _add(tar, f"{number:09d}.json", json.dumps(meta).encode())


def write_classification(directory: StrPath, scenes: int, seed: int, pairs: Sequence[Pair]) -> None:
    """Write single-thing scenes in CLIP_benchmark's layout.

    The pictures show each of `pairs` equally often. The class names are all pairs, so a picture can also be taken for
    a pair of the training scenes.
    """
    rng = random.Random(seed)
    names = [f"{colour} {shape}" for colour, shape in PAIRS]
    for file, lines in {
        "classnames.txt": names,
        "zeroshot_classification_templates.txt": TEMPLATES,
        "dataset_type.txt": ["classification"],
        "test/nshards.txt": ["1"],
    }.items():
        write_atomic(join(directory, file), "".join(f"{line}\n" for line in lines).encode())
    with tarfile.open(local_path(join(directory, "test", "0.tar")), "w") as tar:
        for number in range(scenes):
            pair = pairs[number % len(pairs)]
            scene = sample(rng, (pair,), kinds=1)
            _add(tar, f"{number:09d}.jpg", _jpeg(render(scene, rng)))
            _add(tar, f"{number:09d}.cls", str(PAIRS.index(pair)).encode())


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
