"""`lit-fast export`: the format lit_fast, the parts that all formats share, wrong arguments and hostile files."""

import inspect
import json
import resource
import shutil
import signal
import tarfile

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lit_fast
from lit_fast.cli.main import main
from lit_fast.config import LossConfig, TextConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.errors import UserError
from lit_fast.runs.run import open_run
from lit_fast.towers.tower import load_tower
from lit_fast.train.export.card import write_card
from lit_fast.train.export.native import write
from lit_fast.train.export.writer import (
    FORMATS,
    ExportFormat,
    ExportOptions,
    check_options,
    format_module,
    write_directory,
)
from tests.helpers import picture
from tests.trained import CONFIG, command, random_model, words
from tests.weights.checkpoints import write_timm
from tests.weights.test_families import TIMM

FILES = ["README.md", "config.json", "model.safetensors", "receipt.json", "tokenizer.model", "tower.json"]


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "deep" / "model"
    command("export", trained_run, "--out", out)
    return out


def same_model(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    jax.tree.map(np.testing.assert_array_equal, got.tower.params, want.tower.params)
    assert got.tower.architecture == want.tower.architecture
    assert got.tower.preprocess == want.tower.preprocess
    dtype = want.tower_json["dtype"]
    assert got.tower.provenance(dtype)["identity"] == want.tower.provenance(dtype)["identity"]
    assert got.tokenizer.identity == want.tokenizer.identity
    assert (got.step, got.average) == (want.step, want.average)


def test_exported_directory_loads_as_the_same_model(exported, trained_run):
    assert sorted(path.name for path in exported.iterdir()) == FILES
    assert not list(exported.parent.glob(".*"))
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}
    got, want = lit_fast.load(exported), lit_fast.load(str(trained_run))
    same_model(got, want)
    images, texts = [picture(0), picture(1)], ["picture 0, caption 1", "b"]
    np.testing.assert_array_equal(got.score(images, texts), want.score(images, texts))
    np.testing.assert_array_equal(got.embed_text(texts), open_run(trained_run).embed_text(texts))


def test_exported_files_name_no_directory_of_the_machine(exported, trained_run):
    for file in exported.iterdir():
        if file.suffix in (".json", ".md"):
            assert str(trained_run.parent.parent) not in file.read_text()
    weights = load_file(exported / "model.safetensors")
    assert {name.partition("/")[0] for name in weights} == {"txt", "img", "t", "b", "mean"}
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_export_of_a_step_or_average_loads_as_the_same_model(trained_run, tmp_path):
    for options in ({"step": 2}, {"average": True}):
        out = tmp_path / next(iter(options))
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        command("export", trained_run, "--out", out, *words)
        same_model(lit_fast.load(out), lit_fast.load(trained_run, **options))
    again = tmp_path / "again"
    command("export", tmp_path / "step", "--out", again)
    assert sorted(p.read_bytes() for p in again.iterdir() if p.suffix != ".md") == sorted(
        p.read_bytes() for p in (tmp_path / "step").iterdir() if p.suffix != ".md"
    )


@pytest.mark.parametrize(
    "loss", [LossConfig(), LossConfig(name="softmax"), LossConfig(bias=False, center=True)]
)
@pytest.mark.parametrize(
    "text",
    [
        TextConfig(width=32, depth=1, heads=2, pooling="map", mask_padding=True, embedding_width=8),
        TextConfig(width=32, depth=2, heads=4, mlp_dim=24, head=False, dtype="float32"),
    ],
)
def test_every_text_tower_and_loss_loads_as_the_same_model(tiny_vit, tmp_path, text, loss):
    model = random_model(load_tower(str(tiny_vit)), text, loss, average=True)
    write(model, str(tmp_path), ExportOptions())
    got = lit_fast.load(tmp_path)
    same_model(got, model)
    assert got.config.shape == text.shape
    assert (got.loss.name, got.loss.center) == (loss.name, loss.center)
    assert sorted(got.params) == sorted(model.params)
    np.testing.assert_array_equal(got.embed_text(["a red thing"]), model.embed_text(["a red thing"]))


@pytest.mark.parametrize("name", list(TIMM))
def test_every_vision_tower_loads_as_the_same_model(tmp_path, name):
    source = write_timm(tmp_path / name, TIMM[name][0], name)
    model = random_model(load_tower(str(source)), TextConfig(width=32, depth=1, heads=2))
    (tmp_path / "out").mkdir()
    write(model, str(tmp_path / "out"), ExportOptions())
    same_model(lit_fast.load(tmp_path / "out"), model)


# --- the model card


def card_of(model, directory):
    write_card(str(directory), model, "lit_fast")
    return (directory / "README.md").read_text()


def test_card_has_front_matter_and_the_figures_of_the_receipt(exported, trained_run, tmp_path):
    card = (exported / "README.md").read_text()
    receipt = json.loads((trained_run / "receipt.json").read_text())
    assert card.startswith('---\nlibrary_name: "lit_fast"\n')
    for part in (
        f"data: digest `{receipt['digests']['dataset']}`", "steps: 4 of 4 (finished)", "pairs seen: 64",
        "device hours", f"{receipt['hardware']['host_cores']} cores of", "lit_fast.load(",
        "licence of the vision tower: not known", "## Limits", "`pip install .` in a checkout of lit_fast",
    ):  # fmt: skip
        assert part in card
    plain, average = receipt["evaluation"]["results"]
    assert (plain["dataset"], average["dataset"]) == ("d", "d (average)")
    figure = plain["metrics"]["image_retrieval_recall@5"]
    low, high = plain["interval_95"]["image_retrieval_recall@5"]
    assert f"{100 * figure:.1f}  {100 * low:5.1f} - {100 * high:5.1f}" in card
    assert "(average)" not in card
    assert "(average)" in card_of(lit_fast.load(trained_run, average=True), tmp_path)
    assert "These weights were not evaluated" in card_of(lit_fast.load(trained_run, step=2), tmp_path)


def test_card_python_runs_and_scores_as_the_model(exported, tmp_path, monkeypatch):
    code = (exported / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    directory = copied(exported, tmp_path / "x")
    picture(0).save(directory / "image.jpg")
    monkeypatch.chdir(directory)
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (1, 32)
    np.testing.assert_array_equal(names["scores"], names["model"].compare(names["images"], names["texts"]))


def test_card_of_a_known_tower_names_licence_and_base_model(tiny_vit, tmp_path):
    tower = load_tower(str(tiny_vit))
    provenance = tower.provenance("float32") | {"source": "timm:vit_tiny_patch16_224.augreg_in21k"}
    model = random_model(tower, TextConfig(width=32, depth=1, heads=2), tower_json=provenance)
    card = card_of(model, tmp_path)
    assert 'license: "apache-2.0"\nbase_model: "timm/vit_tiny_patch16_224.augreg_in21k"\n---\n' in card
    assert "The run left no receipt" in card
    cards = pytest.importorskip("huggingface_hub").ModelCard
    assert cards(card).data.to_dict()["license"] == "apache-2.0"


def test_export_with_a_damaged_receipt_fails_in_one_line(trained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "receipt.json").write_text('{"hardware": 3}')
    refused(["export", run, "--out", tmp_path / "out"], "the model's receipt.json is damaged", capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", FORMATS)
def test_format_module_has_the_functions_of_export_format(name):
    module = format_module(name)
    for function in ("check", "write"):
        expected = list(inspect.signature(getattr(ExportFormat, function)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(module, function)).parameters) == expected


# --- errors, after which nothing is left behind


def refused(arguments, message, capsys):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "pickle"], "invalid choice"),
        (["--vision"], "--vision is for --format onnx"),
        (["--classes", "c.txt", "--format", "big_vision"], "--classes is for --format onnx"),
        (["--public"], "--public is for --push"),
        (["--step", "3"], "no checkpoint of step 3"),
        (["--tower", "none.npz"], "none.npz"),
        (["--push", "../name"], "not of the form OWNER/NAME"),
    ],
)
def test_export_with_wrong_arguments_writes_nothing(trained_run, tmp_path, capsys, options, message):
    refused(["export", trained_run, "--out", tmp_path / "out", *options], message, capsys)
    assert not list(tmp_path.iterdir())


def test_check_options_of_two_formats_are_accepted_by_both(monkeypatch):
    options = ExportOptions(classes="names.txt")
    monkeypatch.setitem(FORMATS, "other", ("native", ("classes",)))
    for name in ("onnx", "other"):
        check_options(name, options)
    with pytest.raises(UserError, match="--classes is for --format onnx or other; leave it out"):
        check_options("transformers", options)


def test_export_into_an_existing_location_keeps_it(trained_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    refused(["export", trained_run, "--out", tmp_path / "full"], "is not empty", capsys)
    refused(["export", trained_run, "--out", tmp_path / "full/mine.txt"], "is not a directory", capsys)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(["export", trained_run, "--out", tmp_path / "link"], "is not a directory", capsys)
    refused(["export", tmp_path / "none", "--out", tmp_path / "out"], "does not exist", capsys)
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    command("export", trained_run, "--out", tmp_path / "empty")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == FILES


@pytest.mark.parametrize("name", ["lit_fast", "big_vision", "open_clip", "transformers", "onnx"])
def test_export_on_a_full_disk_leaves_nothing(trained_run, tmp_path, name):
    if name == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    options = ExportOptions(nearest_pixels=name == "open_clip")
    model = lit_fast.load(trained_run)
    _ = model.tower
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        with pytest.raises(UserError, match=r"--out \S+ cannot be written: .*[Ff]ile too large"):
            write_directory(name, model, str(tmp_path / "out"), options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"step": 1}, {"average": True}, {"tower": "x.npz"}])
def test_load_exported_model_refuses_options_of_a_run(exported, option):
    with pytest.raises(UserError, match=f"leave out {next(iter(option))}"):
        lit_fast.load(exported, **option)


# --- hostile folders


def copied(directory, target):
    """Replace `target` by a copy of the directory, which a test damages."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    return target


def one_line(folder):
    """Load everything; return the text of the UserError, which must be one line."""
    text = ""
    try:
        _ = lit_fast.load(folder).tower
    except UserError as error:
        text = str(error)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "format", "siglip", "neither a run nor a model that lit-fast export wrote"),
        ("config.json", "version", 2, "has version 2"),
        ("config.json", "text", {"width": 10**18}, "width is '1000000000000000000'"),
        ("config.json", "text", {"depth": 1 << 20}, "does not match the files beside it"),
        ("config.json", "text", {"wdith": 3}, "did you mean text.width"),
        ("config.json", "text", {"pooling": None}, "text.pooling is missing"),
        ("config.json", "loss", {"image_head": None}, "loss.image_head is missing"),
        ("config.json", "tokenizer", {"max_length": 10**9, "pad_id": 1}, "max_length is '1000000000'"),
        ("config.json", "tokenizer", {"max_length": 13, "pad_id": 1}, "tokenizer.model is not the tokenizer"),
        ("config.json", "loss", {"name": "softmax"}, "b has shape (1,), expected no such array"),
        ("tower.json", "width", 10**9, "width is '1000000000'"),
        ("tower.json", "width", 0, "width is '0'"),
        ("tower.json", "identity", "a\nb", "its identity is that of another tower"),
        ("tower.json", "depth", 3, "model.safetensors does not match"),
        ("tower.json", "heads", 5, "damaged: ValueError sizes"),
        ("tower.json", "gelu", "tanh", "its identity is that of another tower"),
        ("tower.json", "preprocess", {"mean": None}, "damaged: KeyError"),
        ("tower.json", "dtype", "object", "damaged: ValueError dtype"),
        ("tower.json", "options", {"max_pixels": "all"}, "max_pixels is not a number"),
    ],
)
def test_load_changed_json_fails_in_one_line(exported, tmp_path, file, key, value, message):
    folder = copied(exported, tmp_path / "x")
    content = json.loads((folder / file).read_text())
    if isinstance(value, dict):  # None: without it
        value = {name: v for name, v in (content[key] | value).items() if v is not None}
    (folder / file).write_text(json.dumps(content | {key: value}))
    assert message in one_line(folder)


def test_load_wrong_or_damaged_weights_fails_in_one_line(exported, tmp_path):
    folder = copied(exported, tmp_path / "x")
    weights = folder / "model.safetensors"
    arrays, whole = load_file(weights), weights.read_bytes()
    for name in ("t", "img/cls", "txt/head/kernel"):
        save_file({n: a for n, a in arrays.items() if n != name}, weights)
        assert f"{name} is missing" in one_line(folder)
        save_file(arrays | {name: np.full_like(arrays[name], np.nan)}, weights)
        assert f"{name} holds values that are not finite" in one_line(folder)
        save_file(arrays | {f"{name}/more": arrays[name]}, weights)
        assert f"{name}/more has shape {arrays[name].shape}, expected no such array" in one_line(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    assert "not a readable .safetensors" in one_line(folder)
    (copied(exported, folder) / "tokenizer.model").write_bytes(words().model)
    assert "tokenizer.model is not the tokenizer" in one_line(folder)
    for name in ("model.safetensors", "tokenizer.model", "tower.json"):
        (copied(exported, folder) / name).unlink()
        assert name in one_line(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("float32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), file=st.sampled_from(["config.json", "tower.json"]), value=ANYTHING)
def test_load_any_json_value_never_raises_a_traceback(exported, tmp_path, data, file, value):
    folder = copied(exported, tmp_path / "x")
    content = json.loads((folder / file).read_text())
    inside = data.draw(
        st.sampled_from([content, *(v for v in content.values() if v and isinstance(v, dict))])
    )
    inside[data.draw(st.sampled_from(sorted(inside)))] = value
    (folder / file).write_text(json.dumps(content))
    one_line(folder)


# --- a real tower and real photos


def test_export_of_a_real_tower_embeds_real_photos_as_stored(realdata, tmp_path):
    with tarfile.open(realdata / "flickr8k/dev/00000.tar") as tar:
        tar.extractall(tmp_path / "all", filter="data")
    members = sorted((tmp_path / "all").iterdir())[: 24 * 3]
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for member in members:
            tar.add(member, member.name)
    (tmp_path / "c.toml").write_text(CONFIG.replace("steps = 4", "steps = 2"))
    data, run, weights = tmp_path / "d", tmp_path / "run", tmp_path / "Ti_16.npz"
    shutil.copy(next((realdata / "vit").glob("Ti_16*.npz")), weights)
    command("index", tmp_path / "photos.tar", "--out", data)
    command("embed", data, "--tower", weights, "--preprocess", "tf-squash")
    command("tokenize", data, "--train-vocab", 400, "--name", "words", "--max-length", 12)
    command("train", tmp_path / "c.toml", "--workdir", run, "--dataset", data)
    command("export", run, "--out", tmp_path / "out")
    weights.unlink()
    model = lit_fast.load(tmp_path / "out")
    rows, stored = open_run(run).image_embeddings(open_dataset(data))
    keys = [key for block in open_dataset(data).iter_blocks() for key in block.keys]
    photos = [tmp_path / "all" / f"{keys[row]}.jpg" for row in rows]
    # As in tests/inference/test_model.py: one rounding to bfloat16.
    np.testing.assert_allclose(model.embed_image(photos), stored, atol=2**-7)
