"""Export as ONNX graphs, optionally with vision tower and zero-shot head.

    text.onnx             ids int64 [batch, length] -> embeddings float32 [batch, width], normalized
    vision.onnx           images uint8 [batch, size, size, 3] -> embeddings float32 [batch, width], normalized
    tokenizer.model       sentencepiece; the other rules of tokenization are in text.onnx's metadata
    zero_shot.npy         float32 [classes, width], see `lit_fast.evaluation.zeroshot.classifier`
    classes.txt           its class names, one a line
    README.md             the model card, with Python that uses them

Weights above 2 GB are stored beside their graph in text.onnx.data and vision.onnx.data. Both graphs are run with
onnxruntime and compared with the towers before the export is complete.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates, classifier
from lit_fast.inference.model import Model
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import Params, embed_ids, text_tower
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.paths import join, name
from lit_fast.storage.text_files import read_lines
from lit_fast.train.export.card import rounding_note, write_card
from lit_fast.train.export.vision_tower import own_vit
from lit_fast.train.export.writer import ExportOptions

# The largest distance between unit vectors. Float32 sums in another order differ by 4e-7 after one layer and 1e-6
# after twelve (ViT-Ti/16); a GELU of the other kind by 1e-4 after one and 2e-3 after twelve.
TOLERANCE = 3e-5

_OPERATORS = (
    "Operator set 17, which onnxruntime has run since 1.12; the batch is free, the length of the ids is not."
)


def check(model: Model, options: ExportOptions) -> None:
    """Raise UserError if the export cannot be made.

    A package is missing, a file cannot be used, or weights are not finite. The vision tower's weights are loaded only
    if it is exported too.
    """
    for package in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f'ONNX export needs the package {package}; install it with: pip install "lit-fast[onnx]"'
            ) from None
    if options.templates is not None and options.classes is None:
        raise UserError(f"--templates {options.templates} has no effect without --classes FILE; add it")
    _prompts(options)
    _check_finite("the model", model.params)
    if options.vision:
        _check_finite(model.tower.name, own_vit(model).params)


def write(model: Model, directory: str, options: ExportOptions) -> None:
    """Write the graphs, the tokenizer, the zero-shot head and the card.

    Raises:
      UserError: onnxruntime's embeddings differ from the tower's.
    """
    _write_text(model, join(directory, "text.onnx"))
    if options.vision:
        _write_vision(model, join(directory, "vision.onnx"))
    write_atomic(join(directory, "tokenizer.model"), model.tokenizer.model)
    names, templates = _prompts(options)
    if names:
        classes = classifier(names, templates, model.embed_text)
        np.save(join(directory, "zero_shot.npy"), classes, allow_pickle=False)
        write_atomic(join(directory, "classes.txt"), "".join(f"{name}\n" for name in names).encode())
    notes = (_OPERATORS, rounding_note(model))
    values = _scoring(model) | {"vision": options.vision, "zero_shot": bool(names)}
    write_card(directory, model, "onnx", notes, **values)


def _write_text(model: Model, path: str) -> None:
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
        _compare(path, _random_ids(tower, model), lambda ids: embed(model.params, ids.astype(np.int32)))


def _write_vision(model: Model, path: str) -> None:
    from lit_fast.train.export.onnx_graph import Graph
    from lit_fast.train.export.onnx_towers import image_embeddings

    tower = own_vit(model)
    size = tower.preprocess.size
    graph = Graph()
    output = image_embeddings(graph, "images", tower, model.params)
    metadata = _metadata(model) | {"preprocess": json.dumps(tower.preprocess.to_dict())}
    graph.save(path, ("images", np.uint8, (size, size, 3)), output, model.width, metadata)

    embed = jax.jit(tower.embed)
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    with jax.default_matmul_precision("highest"):
        _compare(path, images, lambda x: model.embed_features(np.asarray(embed(tower.params, x))))


def _check_finite(owner: str, params: Params) -> None:
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(params)):
        raise UserError(f"{owner} has weights that are not finite numbers; export another checkpoint")


def _random_ids(tower: TextTower, model: Model) -> np.ndarray:
    """Return random ids int64 [5, length].

    The captions have several lengths; the last has no end-of-sentence.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tower.vocab_size, (5, tower.max_length))
    ids[ids == model.tokenizer.eos_id] = (model.tokenizer.eos_id + 1) % tower.vocab_size
    for row, end in zip(ids, (0, 1, tower.max_length // 2, tower.max_length - 1), strict=False):
        row[end], row[end + 1 :] = model.tokenizer.eos_id, model.tokenizer.pad_id
    return ids


def _compare(path: str, inputs: np.ndarray, embed: Callable[[np.ndarray], jax.Array | np.ndarray]) -> None:
    """Raise UserError if onnxruntime's embeddings differ by more than `TOLERANCE`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {session.get_inputs()[0].name: inputs})
    distance = np.linalg.norm(embeddings - np.asarray(embed(inputs)), axis=1).max()
    if not distance <= TOLERANCE:  # false for NaN too
        raise UserError(
            f"{name(path)}: onnxruntime {onnxruntime.__version__} computes embeddings that are {distance:.1e} from the "
            f"tower's ({TOLERANCE:.0e} is allowed); if lit-fast eval's figures are right, try another version of it"
        )


def _prompts(options: ExportOptions) -> tuple[list[str], list[str]]:
    """Return the checked class names and templates.

    Without templates the class names are the prompts.
    """
    if options.classes is None:
        return [], []
    names = list(read_lines(options.classes))
    templates = ["{c}"] if options.templates is None else list(read_lines(options.templates))
    for file, check_lines, lines in (
        (options.classes, canonical_names, names),
        (options.templates, canonical_templates, templates),
    ):
        try:
            check_lines(lines)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    return names, templates


def _scoring(model: Model) -> dict[str, float]:
    """Return the temperature and the bias, if any, of the scores."""
    bias = {"bias": float(model.params["b"][0])} if "b" in model.params else {}
    return {"temperature": math.exp(float(model.params["t"][0])), **bias}


def _metadata(model: Model) -> dict[str, str]:
    """Return the values that turn two embeddings into a score."""
    scoring = {name: str(value) for name, value in _scoring(model).items()}
    return {"run": model.name, "loss": model.loss.name, **scoring}
