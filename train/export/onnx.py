"""Export as ONNX: the text tower, where asked the vision tower, and a zero-shot head as a matrix.

    text.onnx             ids int64 [batch, length] -> embeddings float32 [batch, width], normalised
    vision.onnx           images uint8 [batch, size, size, 3] -> embeddings float32 [batch, width], normalised
    tokenizer.model       sentencepiece; what else makes a caption into ids stands in text.onnx's metadata
    zero_shot.npy         float32 [classes, width], see `lit_fast.evaluation.zeroshot.classifier`
    classes.txt           its class names, one a line
    README.md             the model card, with Python that uses them

Weights above 2 GB lie beside their graph in text.onnx.data and vision.onnx.data. Both graphs are run with
onnxruntime and compared with the towers themselves before the export is done.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates, classifier
from lit_fast.inference.model import Model
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import Params, embed_ids, text_tower
from lit_fast.storage.files import read_lines
from lit_fast.train.export.card import model_card, rounding
from lit_fast.utils.normalize import normalize

if TYPE_CHECKING:
    from lit_fast.inference.model import Model


# How the files of an ONNX export are used: the part of its model card whose Python runs as it stands.


_TEXT = """\
Embeddings are float32 of unit length; the dot product of an image's and a text's is their cosine.

```python
import numpy as np
import onnxruntime
import sentencepiece

pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")

def tokenize(caption):  # ASCII letters in lower case; cut, ended and padded
    ids = pieces.encode(caption.encode().lower().decode())[:{cut}] + [{eos}]
    return ids + [{pad}] * ({length} - len(ids))

text_tower = onnxruntime.InferenceSession("text.onnx")
(texts,) = text_tower.run(None, {{"ids": np.array([tokenize("a dog"), tokenize("a flower")])}})
```
"""

_VISION = """
An image becomes uint8 pixels as {method} of lit_fast does it; mean and standard deviation are in the graph.

```python
from lit_fast.data.images.decode import decode
from lit_fast.towers.preprocess import Preprocess

preprocess = Preprocess.from_dict({preprocess})
image = decode(open("image.jpg", "rb").read(), at_least=preprocess.at_least, alpha=preprocess.alpha)
pixels = preprocess.apply(image)
(images,) = onnxruntime.InferenceSession("vision.onnx").run(None, {{"images": pixels[None]}})
```
"""

_NO_VISION = """
`images`, float32 [n, {width}], are made by `lit_fast.load(...).embed_image`, or by the graph that
`lit-fast export --format onnx --vision` writes.
"""

_SIGMOID = """
The probability that an image and a text belong together, each pair by itself:

```python
probabilities = 1 / (1 + np.exp(-({temperature:.9g} * images @ texts.T {bias:+.9g})))
```
"""

_SOFTMAX = """
The probability of each text among those given:

```python
logits = {temperature:.9g} * images @ texts.T
weights = np.exp(logits - logits.max(axis=1, keepdims=True))
probabilities = weights / weights.sum(axis=1, keepdims=True)
```
"""

_ZERO_SHOT = """
`zero_shot.npy` holds an embedding of every class of `classes.txt`:

```python
classes, names = np.load("zero_shot.npy"), open("classes.txt", encoding="utf-8").read().splitlines()
print([names[i] for i in (images @ classes.T).argmax(axis=1)])
```
"""


def use(model: Model, vision: bool, zero_shot: bool) -> str:
    """Markdown, for an export with or without vision tower and zero-shot head."""
    tokenizer, params = model.tokenizer, model.params
    length = tokenizer.max_length
    text = _TEXT.format(cut=length - 1, length=length, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    if vision:
        how = model.tower.preprocess
        text += _VISION.format(method=how.method, preprocess=how.to_dict())
    else:
        text += _NO_VISION.format(width=model.width)
    bias = float(params["b"][0]) if "b" in params else 0.0
    score = _SOFTMAX if model.loss.name == "softmax" else _SIGMOID
    text += score.format(temperature=math.exp(float(params["t"][0])), bias=bias)
    return text + (_ZERO_SHOT if zero_shot else "")


# Largest distance between unit vectors. Float32 sums in another order: 4e-7 after one layer, 1e-6 after twelve
# (ViT-Ti/16); a GELU of the other kind: 1e-4 after one, 2e-3 after twelve.
TOLERANCE = 3e-5

_OPERATORS = (
    "Operator set 17, which onnxruntime has run since 1.12; the batch is free, the length of the ids is not."
)


def check(
    model: Model, *, vision: bool = False, classes: Path | None = None, templates: Path | None = None
) -> None:
    """Find out whether the export can be made; writes nothing.

    Args:
      model: every text tower and every vision tower can be expressed.
      vision: export the vision tower too; its weights are loaded.
      classes: file of class names, one a line.
      templates: file of prompt templates, one a line, with "{c}" for the class name; without one the class
        names stand alone.

    Raises:
      UserError: a package is missing, a file cannot be used, or the weights are not finite.
    """
    for package in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f'ONNX export needs the package {package}; install it with: pip install "lit-fast[onnx]"'
            ) from None
    if templates is not None and classes is None:
        raise UserError(f"--templates {templates} is of no use without --classes FILE")
    _prompts(classes, templates)
    _check_finite("the model", model.params)
    if vision:
        _check_finite(model.tower.name, model.tower.params)


def write(
    model: Model,
    folder: Path,
    *,
    vision: bool = False,
    classes: Path | None = None,
    templates: Path | None = None,
) -> None:
    """Write the files into an existing folder; arguments as for `check`.

    Raises:
      UserError: what onnxruntime computes is not what the tower computes.
    """
    _write_text(model, folder / "text.onnx")
    if vision:
        _write_vision(model, folder / "vision.onnx")
    (folder / "tokenizer.model").write_bytes(model.tokenizer.model)
    names, prompts = _prompts(classes, templates)
    if names:
        np.save(folder / "zero_shot.npy", classifier(names, prompts, model.embed_text), allow_pickle=False)
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    card = model_card(model, use(model, vision, bool(names)), (_OPERATORS, rounding(model)), library="onnx")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_text(model: Model, path: Path) -> None:
    from lit_fast.train.export.onnx_graph import Graph
    from lit_fast.train.export.onnx_towers import text_embeddings

    tower = text_tower(dataclasses.replace(model.config, dtype="float32"), model.tokenizer, model.width)
    graph = Graph()
    output = text_embeddings(graph, "ids", tower, model.params)
    metadata = _metadata(model) | {
        "max_length": str(tower.max_length),
        "eos_id": str(model.tokenizer.eos_id),
        "pad_id": str(model.tokenizer.pad_id),
    }
    graph.save(path, ("ids", np.int64, (tower.max_length,)), output, model.width, metadata)
    with jax.default_matmul_precision("highest"):
        embed = jax.jit(partial(embed_ids, tower))
        _compare(path, _some_ids(tower, model), lambda ids: embed(model.params, ids.astype(np.int32)))


def _write_vision(model: Model, path: Path) -> None:
    from lit_fast.train.export.onnx_graph import Graph
    from lit_fast.train.export.onnx_towers import image_embeddings

    tower, size = model.tower, model.tower.preprocess.size
    graph = Graph()
    output = image_embeddings(graph, "images", tower, model.params)
    metadata = _metadata(model) | {"preprocess": json.dumps(tower.preprocess.to_dict())}
    graph.save(path, ("images", np.uint8, (size, size, 3)), output, model.width, metadata)

    @jax.jit
    def embed(weights: Params, params: Params, images: jax.Array) -> jax.Array:
        x = normalize(tower.embed(weights, images) - params["mean"])
        return normalize(x @ params["img"]["head"]["kernel"]) if "img" in params else x

    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    with jax.default_matmul_precision("highest"):
        _compare(path, images, lambda given: embed(tower.params, model.params, given))


def _check_finite(name: str, params: Params) -> None:
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(params)):
        raise UserError(f"{name} has weights that are not finite numbers; export another checkpoint")


def _some_ids(tower: TextTower, model: Model) -> np.ndarray:
    """Random ids int64 [5, length]: captions of several lengths, the last without an end-of-sentence."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tower.vocab_size, (5, tower.max_length))
    ids[ids == model.tokenizer.eos_id] = (model.tokenizer.eos_id + 1) % tower.vocab_size
    for row, end in zip(ids, (0, 1, tower.max_length // 2, tower.max_length - 1), strict=False):
        row[end], row[end + 1 :] = model.tokenizer.eos_id, model.tokenizer.pad_id
    return ids


def _compare(path: Path, given: np.ndarray, embed: Callable[[np.ndarray], jax.Array]) -> None:
    """Raises UserError if onnxruntime's embeddings are further than `TOLERANCE` from the tower's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: given})
    distance = np.linalg.norm(got - np.asarray(embed(given)), axis=1).max()
    if not distance <= TOLERANCE:  # nor NaN
        raise UserError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} computes embeddings that are {distance:.1e} from the "
            f"tower's ({TOLERANCE:.0e} is allowed); if lit-fast eval's figures are right, try another version of it"
        )


def _prompts(classes: Path | None, templates: Path | None) -> tuple[list[str], list[str]]:
    """Class names and templates, checked."""
    if classes is None:
        return [], []
    names = list(read_lines(classes))
    prompts = ["{c}"] if templates is None else list(read_lines(templates))
    for path, check_lines, lines in (
        (classes, canonical_names, names),
        (templates, canonical_templates, prompts),
    ):
        try:
            check_lines(lines)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return names, prompts


def _metadata(model: Model) -> dict[str, str]:
    """What a score needs beside the two embeddings."""
    params = model.params
    bias = {"bias": str(float(params["b"][0]))} if "b" in params else {}
    temperature = math.exp(float(params["t"][0]))
    return {"run": model.name, "loss": model.loss.name, "temperature": str(temperature), **bias}
