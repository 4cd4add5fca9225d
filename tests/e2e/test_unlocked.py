"""A trained image tower from the command line: train, evaluate, resume, embed with it, export, start from it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import lit_fast
from lit_fast.cli.main import main
from lit_fast.config import Config, ImageConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.models.two_towers import image_tower_params
from lit_fast.runs.run import open_run
from lit_fast.towers.tower import load_tower
from lit_fast.train import loop
from lit_fast.train.image_start import open_image_start
from lit_fast.weights.text_towers import read_text_weights
from tests.e2e.trainings import metrics
from tests.helpers import picture, samples, tiny_vit_arrays, write_tar
from tests.train.export.test_open_clip import loaded_by_open_clip
from tests.train.export.test_transformers import loaded_by_transformers
from tests.trained import command
from tests.weights.families import normalized

IMAGE = """[image]
train = "unlocked"
dtype = "float32"
"""
CONFIG = f"""
steps = 6
[text]
variant = "mu"
dtype = "float32"
{IMAGE}[stream]
global_batch = 16
[optimizer]
warmup_steps = 1
learning_rate = 1e-2
average_decay = 0.5
[evaluate]
every_steps = 2
[checkpoint]
every_steps = 2
[log]
every_steps = 1
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The dataset d with features tiny, an evaluation set e without, and the run r."""
    path = tmp_path_factory.mktemp("unlocked")
    np.savez(path / "tiny.npz", **tiny_vit_arrays())
    (path / "config.toml").write_text(CONFIG)
    write_tar(path / "pairs.tar", samples(40))
    labelled = samples(24, first=40)
    labelled += [(f"{i:09d}.cls", str(i % 2).encode()) for i in range(40, 64)]
    write_tar(path / "eval.tar", sorted(labelled))
    write_tar(path / "shots.tar", [(f"1{n}", data) for n, data in sorted(labelled)])
    (path / "names.txt").write_text("red\ngreen\n")
    command("index", path / "pairs.tar", "--out", path / "d")
    for name in ("eval", "shots"):
        command(
            "index",
            path / f"{name}.tar",
            "--out",
            path / name,
            "--classnames",
            path / "names.txt",
            "--seed",
            7,
        )
    command("embed", path / "d", "--tower", path / "tiny.npz")
    command("tokenize", path / "d", "--train-vocab", 284, "--name", "words", "--max-length", 12)
    train(path, "r")
    return path


def train(path, run, *more):
    sets = ("--evaluate.retrieval", path / "eval", "--evaluate.zero_shot", path / "eval")
    few_shot = ("--evaluate.few_shot", f"{path / 'shots'}={path / 'eval'}")
    data = ("--dataset", path / "d", "--tower", "tiny")
    command("train", path / "config.toml", "--workdir", path / run, *data, *sets, *few_shot, *more)


def evaluate(path, run, out, *more):
    sets = ("--retrieval", path / "eval", "--zero-shot", path / "eval")
    few_shot = ("--few-shot", path / "shots", path / "eval")
    command("eval", path / run, *sets, *few_shot, "--json", path / out, *more)
    return [{k: r[k] for k in ("task", "metrics", "images")} for r in json.loads((path / out).read_text())]


def test_run_trains_both_towers_and_says_so(case):
    run = open_run(case / "r")
    before = dict(np.load(case / "tiny.npz"))
    assert not np.array_equal(run.params["img"]["embedding"]["kernel"], before["embedding/kernel"])
    assert run.config.optimizer.learning_rate_scale == ("img/(?!head/).*=0.1",)
    receipt = json.loads((case / "r/receipt.json").read_text())
    assert receipt["image_tower"]["train"] == "unlocked"
    assert receipt["image_tower"]["source"].endswith("tiny.npz")
    assert {"keep", "image_keep", "image_parts"} <= receipt["memory"].keys()
    tasks = [r["task"] for r in receipt["evaluation"]["results"]]
    assert tasks == ["zeroshot_classification", "zeroshot_retrieval", "few_shot_classification"] * 2
    curves = [
        name for name in json.loads((case / "r/metrics.jsonl").read_text().splitlines()[-1]) if "/" in name
    ]
    assert "eval/acc1_5shot" in curves
    assert "unlocked from" in (case / "r/report.html").read_text()


def test_eval_of_images_equals_the_evaluation_in_the_loop_and_that_of_stored_features(case, capsys):
    receipt = json.loads((case / "r/receipt.json").read_text())
    in_loop = [{k: r[k] for k in ("task", "metrics", "images")} for r in receipt["evaluation"]["results"]]
    embedded = evaluate(case, "r", "one.json")
    assert "embedding 24 images of" in capsys.readouterr().err
    assert embedded == in_loop[:3]
    assert evaluate(case, "r", "average.json", "--average") == in_loop[3:]
    capsys.readouterr()
    for name in ("eval", "shots"):
        command("embed", case / name, "--tower", case / "r", "--dtype", "float32")
    assert evaluate(case, "r", "two.json") == embedded
    assert "embedding 24 images of" not in capsys.readouterr().err


def test_embed_with_a_run_stores_the_features_of_its_model(case):
    command("embed", case / "d", "--tower", case / "r", "--name", "trained", "--dtype", "float32")
    features = open_features(open_dataset(case / "d"), "trained")
    model = lit_fast.load(case / "r")
    assert model.tower_json["identity"] == features.identity
    assert features.identity != open_features(features.dataset, "tiny").identity
    # One image by the model itself.
    keys = [key for block in features.dataset.iter_blocks() for key in block.keys]
    row = keys.index("000000003")
    got, want = model.embed_image([picture(3)]), model.embed_features(features.read_all()[[row]])
    np.testing.assert_allclose(got, want, atol=2**-6)  # the tar has it as JPEG


def test_next_frozen_run_starts_from_the_trained_towers(case):
    command("embed", case / "d", "--tower", case / "r", "--name", "next", "--dtype", "float32")
    frozen = (case / "config.toml").read_text().replace(IMAGE, "")
    (case / "frozen.toml").write_text(frozen)
    start = ("--text.init", case / "r", "--steps", "2", "--evaluate.every_steps", "0")
    command(
        "train",
        case / "frozen.toml",
        "--workdir",
        case / "f",
        "--dataset",
        case / "d",
        "--tower",
        "next",
        *start,
    )
    # At the start temperature and loss are those at the end of the first run, up to a warm-up step of rate zero.
    assert metrics(case / "f", "temperature")[1] == pytest.approx(metrics(case / "r", "temperature")[6])
    assert not image_tower_params(open_run(case / "f").params)


def test_run_unlocks_the_tower_of_a_frozen_run_with_head_and_mean(case):
    keys = (
        "--loss.center",
        "true",
        "--loss.image_head",
        "true",
        "--steps",
        "2",
        "--optimizer.warmup_steps",
        "1",
    )
    frozen = (case / "config.toml").read_text().replace(IMAGE, "")
    (case / "centred.toml").write_text(frozen)
    data = ("--dataset", case / "d", "--tower", "tiny")
    command("train", case / "centred.toml", "--workdir", case / "c", *data, *keys)
    command("train", case / "config.toml", "--workdir", case / "u", *data, *keys, "--text.init", case / "c")
    one, two = open_run(case / "c"), open_run(case / "u")
    assert np.asarray(one.params["mean"]).any()
    np.testing.assert_array_equal(one.params["mean"], two.params["mean"])
    assert set(two.params["img"]) > {"head", "embedding"}
    rules = two.config.optimizer
    assert rules.weight_decay_scale[0] == "img/(?!head/).*=0"


def test_run_stopped_and_resumed_has_the_same_bits(case, monkeypatch):
    """Stopped after step 3, between two checkpoints, and resumed."""
    stop = loop.PreemptionSignal.should_stop
    steps = []

    def should_stop(self):
        steps.append(1)
        return 15 if len(steps) == 3 else stop(self)

    monkeypatch.setattr(loop.PreemptionSignal, "should_stop", should_stop)
    with pytest.raises(AssertionError):  # the exit status is that of SIGTERM
        train(case, "s")
    assert json.loads((case / "s/receipt.json").read_text())["status"] == "stopped"
    train(case, "s")
    one, two = open_run(case / "r"), open_run(case / "s")
    assert one.step == two.step == 6
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert metrics(case / "r") == metrics(case / "s")


def by_lit_fast(folder, pixels, texts):
    return embeddings(lit_fast.load(folder), pixels, texts)


def by_big_vision_names(folder, pixels, texts):
    """There is no package of big_vision: read again by its names."""
    tower = load_tower(str(folder / "model.npz"), gelu="exact")
    text = {"txt": read_text_weights(f"{folder / 'model.npz'}:txt").params}
    model = lit_fast.load(folder.parent / "r")
    other = replace(model, params=model.params | text, open_tower=lambda: tower)
    return embeddings(other, pixels, texts)


def by_transformers(folder, pixels, texts):
    model, processor = loaded_by_transformers(folder)
    import torch

    inputs = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixel_values=normalized(pixels)).pooler_output
        found = images, model.get_text_features(**inputs).pooler_output
    return [a / a.norm(dim=-1, keepdim=True) for a in found]


def by_open_clip(folder, pixels, texts):
    model, _, tokenizer = loaded_by_open_clip(folder)
    import torch

    with torch.no_grad():
        return [
            model.encode_image(normalized(pixels), normalize=True),
            model.encode_text(tokenizer(texts), normalize=True),
        ]


def by_onnx(folder, pixels, texts):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = []
    ids = lit_fast.load(folder.parent / "r").tokenizer(texts).astype(np.int64)
    for name, inputs in (("vision", pixels), ("text", ids)):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        found.append(session.run(None, {session.get_inputs()[0].name: inputs})[0])
    return found


def embeddings(model, pixels, texts):
    """Embeddings of pixels uint8 and of texts, float32."""
    tower = model.tower
    return model.embed_features(np.asarray(jax.jit(tower.embed)(tower.params, pixels))), model.embed_text(
        texts
    )


@pytest.mark.parametrize(
    ("format_name", "embed", "options"),
    [
        ("lit_fast", by_lit_fast, ()),
        ("big_vision", by_big_vision_names, ()),
        ("transformers", by_transformers, ()),
        ("open_clip", by_open_clip, ("--nearest-pixels",)),
        ("onnx", by_onnx, ("--vision",)),
    ],
)
def test_export_embeds_images_and_texts_as_the_trained_run(case, format_name, embed, options):
    out, texts = case / f"export_{format_name}", ["picture 3, caption 1", "b"]
    command("export", case / "r", "--out", out, "--format", format_name, *options)
    model = lit_fast.load(case / "r")
    pixels = np.stack([model.tower.preprocess.apply(picture(i)) for i in range(3)])
    want = embeddings(model, pixels, texts)
    for got, wanted in zip(embed(out, pixels, texts), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # unit vectors, float32, two layers
    pretrained = load_tower(str(case / "tiny.npz"))
    before = replace(model, open_tower=lambda: pretrained)
    assert np.abs(embeddings(before, pixels, texts)[0] - want[0]).max() > 1e-2


def test_embed_takes_an_exported_average(case):
    """`embed --tower RUN` takes the weights that eval and export take: the last ones, unless --average is given."""
    command("export", case / "r", "--out", case / "average", "--average")
    for tower, average in ((case / "average", True), (case / "r", False)):
        command("embed", case / "eval", "--tower", tower, "--name", f"of-{average}", "--dtype", "float32")
        stored = open_features(open_dataset(case / "eval"), f"of-{average}")
        model = lit_fast.load(case / "r", average=average)
        assert stored.provenance["sha256"] == model.tower_json["sha256"]


def test_scratch_trains_the_architecture_of_a_name_or_of_a_tower(case):
    scratch = ("--image.train", "scratch", "--steps", "2", "--evaluate.every_steps", "0")
    data = ("--dataset", case / "d", "--tower", "tiny")
    command(
        "train", case / "config.toml", "--workdir", case / "mu", *data, *scratch, "--image.arch", "mu/8",
        "--image.resolution", "16", "--image.microbatches", "4", "--image.keep", "embeddings",
    )  # fmt: skip
    run = open_run(case / "mu")
    assert run.tower_json["pool"] == "map"
    assert "MAPHead_0" in run.params["img"]
    assert run.config.optimizer.learning_rate_scale == ()


def test_scratch_takes_the_architecture_of_a_tower_with_other_pooling(case):
    image = ImageConfig(train="scratch", pool="gap", resolution=48)
    start = open_image_start(Config(tower="tiny", image=image), open_dataset(case / "d"))
    assert start.params is None
    record = start.record
    assert (record["pool"], record["depth"], record["sha256"], record["class_token"]) == ("gap", 2, "", True)
    params = start.tower(image).init(jax.random.key(0))
    assert params["pos_embedding"].shape == (1, 36, 32)


def test_reduced_decode_is_a_part_of_the_tower(case):
    dataset, image = open_dataset(case / "d"), ImageConfig(train="unlocked", reduced_decode=True)
    plain = open_image_start(Config(tower="tiny", image=replace(image, reduced_decode=False)), dataset)
    start = open_image_start(Config(tower="tiny", image=image), dataset)
    assert (start.preprocess.reduced, plain.preprocess.reduced) == (True, False)
    assert start.record["identity"] != plain.record["identity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image.tower", "nowhere.npz"), "nowhere.npz"),
        (("--image.pool", "map"), "pool 'map' does not fit the weights"),
        (("--image.keep", "products", "--image.microbatches", "5"), "not divisible by image.microbatches 5"),
        (("--loss.center", "true", "--text.init", "x.npz"), "x.npz"),
        (("--image.train", "scratch", "--image.arch", "B/13"), "is not a multiple of the patch size 13"),
        (("--optimizer.freeze", "image/.*"), "matches no parameter"),
        (
            ("--image.train", "scratch", "--image.arch", "mu/8", "--image.reduced_decode", "true"),
            "image.arch mu/8: tf-squash samples single pixels",
        ),
    ],
)
def test_mistake_is_one_line_before_anything_is_written(case, capsys, options, message):
    data = ("--dataset", case / "d", "--tower", "tiny")
    arguments = ["train", case / "config.toml", "--workdir", case / "bad", *data, *options]
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (case / "bad" / "config.toml").exists()
