"""ONNX graphs, run by onnxruntime, against the float64 references of both towers, and the folder that is written."""

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lit_fast.config import LossConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import classifier
from lit_fast.inference.model import Model
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.towers.tower import load_tower
from tests.helpers import encoded, picture, tiny_vit_arrays
from tests.reference import augreg_vit, text_tower, torch_vit
from tests.trained import words
from tests.weights.checkpoints import HEADS, SIZE, write_timm
from tests.weights.families import pixels
from tests.weights.test_families import TIMM

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from lit_fast.train.export import onnx_graph  # noqa: E402
from lit_fast.train.export.onnx import check, write  # noqa: E402
from lit_fast.train.export.onnx_graph import Graph  # noqa: E402
from lit_fast.train.export.onnx_towers import image_embeddings, text_embeddings  # noqa: E402
from lit_fast.train.export.writer import ExportOptions  # noqa: E402

SHAPE = Shape(width=32, depth=2, mlp_dim=64, heads=4)
LENGTH = 6
# Elements of unit vectors after a few layers in float32: measured at most 4e-7.
CLOSE = 3e-6


def drawn(shapes, seed=0):
    """float32 arrays for a tree of shapes: biases, norms and scales matter as much as kernels."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        mean = 1.0 if "scale" in str(path[-1]) else 0.0
        return rng.normal(mean, 0.3, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def text_params(tower):
    ids = jax.ShapeDtypeStruct((1, tower.max_length), np.int32)
    return drawn(jax.eval_shape(tower.init, jax.random.key(0), ids)["params"])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def run(path, given):
    """Embeddings of a batch, which those of a batch of one equal."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(["embeddings"], {session.get_inputs()[0].name: given})
    (first,) = session.run(["embeddings"], {session.get_inputs()[0].name: given[:1]})
    assert got.dtype == np.float32
    np.testing.assert_allclose(first, got[:1], rtol=0, atol=CLOSE)
    return got


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max", "map"])
@pytest.mark.parametrize("masked", [False, True])
def test_text_towers_equal_the_float64_reference(pooling, masked, tmp_path):
    ids = np.random.default_rng(0).integers(2, 50, (5, LENGTH))
    ids[1, 3:] = ids[2, 1:] = ids[3, :] = 1  # end of sentence and padding, down to an empty caption
    ids[0, 5] = 1  # the last row has no end of sentence
    seen = np.arange(LENGTH) <= np.array([5, 3, 1, 0, 5])[:, None] if masked else None
    for embedding_width, projected in itertools.product([0, 8], [False, True]):
        tower = TextTower(
            SHAPE, 50, LENGTH, 12 if projected else SHAPE.width, pooling=pooling, eos_id=1 if masked else None,
            embedding_width=embedding_width, projected=projected,
        )  # fmt: skip
        params = text_params(tower)
        graph, path = Graph(), str(tmp_path / "text.onnx")
        output = text_embeddings(graph, "ids", tower, {"txt": params})
        graph.save(path, ("ids", np.int64, (LENGTH,)), output, tower.out_dim, {})
        want = unit(text_tower(ids, jax.tree.map(np.float64, params), pooling, seen))
        np.testing.assert_allclose(run(path, ids), want, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", TIMM)
def test_vision_towers_equal_the_float64_reference(kind, tmp_path):
    weights, gelu, epsilon, pool = TIMM[kind]
    tower = load_tower(str(write_timm(tmp_path / "tower", weights, kind)))
    rng = np.random.default_rng(0)
    mean, kernel = rng.normal(size=tower.width), rng.normal(size=(tower.width, tower.width))
    images = pixels(3, SIZE)
    centred = unit(torch_vit(images / 127.5 - 1, weights, HEADS, gelu, epsilon, pool) - mean)
    for head, want in (
        ({}, centred),
        ({"img": {"head": {"kernel": np.float32(kernel)}}}, unit(centred @ kernel)),
    ):
        graph, path = Graph(), str(tmp_path / "vision.onnx")
        output = image_embeddings(graph, "images", tower, {"mean": np.float32(mean), **head})
        graph.save(path, ("images", np.uint8, (SIZE, SIZE, 3)), output, tower.width, {})
        np.testing.assert_allclose(run(path, images), want, rtol=0, atol=CLOSE)


def test_vision_graph_normalizes_each_channel(tiny_vit, tmp_path):
    tower, images = load_tower(str(tiny_vit)), pixels(2, 32)
    mean, std = (0.1, 0.4, 0.6), (0.2, 0.3, 0.5)
    tower = replace(tower, preprocess=replace(tower.preprocess, mean=mean, std=std))
    graph, path = Graph(), str(tmp_path / "vision.onnx")
    output = image_embeddings(graph, "images", tower, {"mean": np.zeros(32, np.float32)})
    graph.save(path, ("images", np.uint8, (32, 32, 3)), output, 32, {})
    want = unit(augreg_vit((images / 255 - mean) / std, tiny_vit_arrays(), "exact"))
    np.testing.assert_allclose(run(path, images), want, rtol=0, atol=CLOSE)


def test_graph_with_large_weights_stores_them_in_a_second_file(tiny_vit, tmp_path, monkeypatch):
    tower, images = load_tower(str(tiny_vit)), pixels(2, 32)
    got = []
    for name, largest in (("one", 1 << 31), ("two", 100_000)):
        monkeypatch.setattr(onnx_graph, "MAX_WEIGHT_BYTES", largest)
        graph, path = Graph(), str(tmp_path / f"{name}.onnx")
        output = image_embeddings(graph, "images", tower, {"mean": np.zeros(32, np.float32)})
        graph.save(path, ("images", np.uint8, (32, 32, 3)), output, 32, {})
        got.append(run(path, images))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.onnx", "two.onnx", "two.onnx.data"]
    assert (tmp_path / "two.onnx").stat().st_size < (tmp_path / "one.onnx").stat().st_size / 2
    np.testing.assert_array_equal(*got)


# --- the folder


@pytest.fixture(scope="module")
def tokenizer():
    return replace(words(), max_length=LENGTH, padding=0)


def make_model(tokenizer, tiny_vit, loss, **more):
    """A model with random weights: masked, pooled by attention, with an image head."""
    tower = load_tower(str(tiny_vit))
    config = TextConfig(**SHAPE._asdict(), pooling="map", mask_padding=True, dtype="float32")
    module = TextTower(
        SHAPE, tokenizer.vocab_size, LENGTH, tower.width, pooling="map", eos_id=tokenizer.eos_id
    )
    rng = np.random.default_rng(0)
    params = {
        "txt": text_params(module),
        "t": np.log([5.0]).astype(np.float32),
        "mean": rng.normal(size=tower.width).astype(np.float32),
        "img": {"head": {"kernel": rng.normal(size=(tower.width, tower.width)).astype(np.float32)}},
    }
    given = {
        "name": "flowers", "step": 3, "average": False, "tower_json": tower.provenance("float32"), "config": config,
        "loss": LossConfig(name=loss), "tokenizer": tokenizer, "params": params | more, "receipt": None,
        "open_tower": lambda: tower,
    }  # fmt: skip
    return Model(**given)


@pytest.fixture(scope="module")
def exported(tokenizer, tiny_vit, tmp_path_factory):
    """A model of either loss and the folder it was written to: of the first all there is, of the other the least."""
    made = {}
    for loss, bias in (("sigmoid", {"b": np.array([-1.5], np.float32)}), ("softmax", {})):
        model, folder, options = (
            make_model(tokenizer, tiny_vit, loss, **bias),
            tmp_path_factory.mktemp(loss),
            {},
        )
        if loss == "sigmoid":
            (folder / "names").write_text("Red_cat\n  dog, hound \nbird\n")
            (folder / "templates").write_text("a photo of a {c}.\nthe {}\n")
            options = {
                "vision": True,
                "classes": str(folder / "names"),
                "templates": str(folder / "templates"),
            }
        check(model, ExportOptions(**options))
        write(model, str(folder), ExportOptions(**options))
        made[loss] = model, folder
    return made


def test_zero_shot_head_equals_the_classifier(exported):
    model, folder = exported["sigmoid"]
    names, templates = ["Red_cat", "dog, hound", "bird"], ["a photo of a {c}.", "the {}"]
    assert (folder / "classes.txt").read_text().splitlines() == names
    matrix = np.load(folder / "zero_shot.npy")
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, classifier(names, templates, model.embed_text))
    # And without our classifier: the mean over both prompts of what the graph makes of them.
    prompts = [t for name in ("red cat", "dog", "bird") for t in (f"a photo of a {name}", f"the {name}")]
    embedded = run(folder / "text.onnx", model.tokenizer(prompts).astype(np.int64))
    np.testing.assert_allclose(matrix, unit(embedded.reshape(3, 2, -1).mean(1)), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_card_python_runs_and_scores_as_the_model(loss, exported, monkeypatch):
    model, folder = exported[loss]
    image = picture(1, 32, 32)
    (folder / "image.jpg").write_bytes(encoded(image))
    monkeypatch.chdir(folder)
    code = "\n".join(re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S))
    assert "`pip install numpy onnxruntime sentencepiece`" in Path("README.md").read_text()
    found = {} if loss == "sigmoid" else {"images": model.embed_image(["image.jpg"])}
    exec(code, found)
    captions = ["a dog", "a flower"]
    np.testing.assert_allclose(found["texts"], model.embed_text(captions), rtol=0, atol=CLOSE)
    for text in ("", "A small RED cat, ÄÖ in a tree and a dog"):
        assert found["tokenize"](text) == model.tokenizer([text])[0].tolist()
    # Features are stored in bfloat16: a relative error of 2^-9 each, before the image head.
    np.testing.assert_allclose(found["images"], model.embed_image(["image.jpg"]), rtol=0, atol=5e-3)
    want = model.score(["image.jpg"], captions)
    np.testing.assert_allclose(found["probabilities"], want, rtol=0, atol=1e-2)


def test_export_writes_metadata_and_files(exported):
    _, folder = exported["sigmoid"]
    text, vision = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx").get_modelmeta().custom_metadata_map
        for name in ("text", "vision")
    )
    assert (text["loss"], float(text["bias"])) == ("sigmoid", -1.5)
    assert float(text["temperature"]) == pytest.approx(5)
    assert (text["max_length"], text["eos_id"], text["pad_id"]) == ("6", "1", "0")
    assert '"method": "pil-crop"' in vision["preprocess"]
    softmax = onnxruntime.InferenceSession(exported["softmax"][1] / "text.onnx").get_modelmeta()
    assert "bias" not in softmax.custom_metadata_map
    names = [{p.name for p in exported[loss][1].iterdir()} for loss in ("sigmoid", "softmax")]
    assert names[0] - {"names", "templates", "image.jpg"} == {
        "text.onnx", "vision.onnx", "tokenizer.model", "zero_shot.npy", "classes.txt", "README.md",
    }  # fmt: skip
    assert names[1] - {"image.jpg"} == {"text.onnx", "tokenizer.model", "README.md"}


def test_check_without_vision_does_not_load_the_vision_tower(tokenizer, tiny_vit):
    def gone():
        raise UserError("the weights are gone")

    model = replace(make_model(tokenizer, tiny_vit, "softmax"), open_tower=gone)
    check(model, ExportOptions())
    with pytest.raises(UserError, match="the weights are gone"):
        check(model, ExportOptions(vision=True))


def test_write_with_a_wrong_graph_raises(tokenizer, tiny_vit, tmp_path, monkeypatch):
    from lit_fast.train.export import onnx_towers

    monkeypatch.setitem(onnx_towers._GELUS, "tanh", onnx_towers._GELUS["quick"])
    with pytest.raises(UserError, match=r"text\.onnx: onnxruntime .* from the tower's"):
        write(make_model(tokenizer, tiny_vit, "softmax"), str(tmp_path), ExportOptions())


def test_check_unusable_files_weights_and_packages_raise(tokenizer, tiny_vit, tmp_path, monkeypatch):
    model = make_model(tokenizer, tiny_vit, "softmax")
    names, bad = tmp_path / "names", tmp_path / "bad"
    names.write_text("rose\n")
    for content, options, message in (
        (None, {"classes": bad}, "bad does not exist"),
        (b"\n \n", {"classes": bad}, "bad is empty"),
        (b"\xff\xfe", {"classes": bad}, "bad is not UTF-8 text"),
        (b"rose\n?!\n", {"classes": bad}, r"bad: class name '\?!' \(number 1\)"),
        (
            b"a rose\n",
            {"classes": names, "templates": bad},
            "bad: prompt template 'a rose' lacks the class name",
        ),
        (b"a {}\n", {"templates": bad}, "without --classes"),
    ):
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            check(model, ExportOptions(**{key: str(path) for key, path in options.items()}))
    broken = replace(model, params=model.params | {"mean": np.full(32, np.nan, np.float32)})
    with pytest.raises(UserError, match="the model has weights that are not finite"):
        check(broken, ExportOptions())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'onnxruntime; install it with: pip install "lit-fast\[onnx\]"'):
        check(model, ExportOptions())
