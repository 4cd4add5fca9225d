"""All commands with towers of other libraries: embed to search, the same bytes after a kill, and exports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lit_fast
from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower
from tests.embed.contents import patch_shard_rows, tree
from tests.helpers import encoded, picture, samples, write_tar
from tests.torch_packages import import_package
from tests.towers.torch.models import SIZE, save_open_clip, save_timm, save_transformers
from tests.trained import command, train_run
from tests.weights.families import pixels

ROOT = Path(__file__).parents[3]

# The command, also with a torchvision that does not fit torch; shards of 1024 rows.
COMMAND = (
    "import sys\n"
    "from tests.torch_packages import load_torchvision\n"
    "load_torchvision()\n"
    "import lit_fast.data.dataset as d\n"
    "d.SHARD = 1024\n"
    "from lit_fast.cli.main import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    import_package("timm")
    pytest.importorskip("torchax")


def model_directory(path: Path, library: str) -> Path:
    import torch

    torch.manual_seed(0)  # the rounding of bfloat16 depends on the weights
    path.mkdir(parents=True)
    if library == "timm":
        save_timm(path, "resnet")
    elif library == "open_clip":
        save_open_clip(path)
    else:
        save_transformers(path, "convnext")
    return path


@pytest.fixture(scope="module", params=["timm", "open_clip", "transformers"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a tower of a library; its dataset is `d` beside it, the tower's files are in `tower`."""
    path = tmp_path_factory.mktemp(request.param)
    return train_run(path, model_directory(path / "tower", request.param))


def test_commands_work_with_a_tower_of_another_library(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, image, out = run.parent / "d", tmp_path / "5.jpg", tmp_path / "out.json"
    image.write_bytes(encoded(picture(5)))
    command("verify", data)
    assert "24 rows embedded again, smallest cosine 0.99999" in capsys.readouterr().out
    command("info", data)
    name = {"timm": ", timm resnet18", "open_clip": ", open_clip", "transformers": ", transformers convnext"}
    assert name[run.parent.name.rstrip("0123456789")] in capsys.readouterr().out
    command("info", run)
    assert "tower" in capsys.readouterr().out
    command("eval", run, "--retrieval", data)
    command("search", data, "--model", run, "--image", image, "--top", 3, "--json", out)
    nearest = json.loads(out.read_text())[0]["results"][0]
    assert nearest["key"] == "000000005"
    assert nearest["cosine"] == pytest.approx(1, abs=1e-4)
    command("classify", image, "--model", run, "--labels", "boat,cat")
    assert "boat" in capsys.readouterr().out


def test_export_holds_the_tower_and_embeds_images(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    command("export", run, "--out", out)
    moved = run.parent / "tower"
    moved.rename(run.parent / "away")
    try:
        model, images = lit_fast.load(str(out)), [picture(i) for i in range(3)]
        found = model.embed_image(images)
    finally:
        (run.parent / "away").rename(moved)
    np.testing.assert_array_equal(found, lit_fast.load(str(run)).embed_image(images))
    # The recipe in tower.json is not trusted.
    tower = json.loads((out / "tower.json").read_text())
    for change in ({"model": "../x"}, {"arguments": 7}, {"architecture": "torch"}, {"pool": "best"}):
        (out / "tower.json").write_text(json.dumps(tower | change))
        with pytest.raises(UserError) as caught:
            _ = lit_fast.load(str(out)).tower
        assert "\n" not in str(caught.value)


def test_other_formats_refuse_the_tower_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for format_name in ("big_vision", "transformers"):
        options = ["--out", str(tmp_path / format_name), "--format", format_name]
        assert main(["export", str(run), *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert (
            "code, which this format cannot express; export with --format lit_fast or open_clip" in lines[0]
        )


def test_open_clip_export_computes_the_same_embeddings(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_package("open_clip")
    import open_clip
    import torch

    out = tmp_path / "model"
    options = ["--out", str(out), "--format", "open_clip", "--nearest-pixels"]
    library = run.parent.name.rstrip("0123456789")
    if library == "timm":  # the model's arguments are not those of its name
        assert main(["export", str(run), *options]) == 2
        assert "open_clip cannot express the vision tower tower: timm's resnet18 has the argument" in (
            capsys.readouterr().err
        )
        return
    if library == "transformers":
        assert main(["export", str(run), *options]) == 2
        assert "transformers's convnext is not in timm or open_clip" in capsys.readouterr().err
        return
    command("export", run, *options)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    images = pixels(3, SIZE)
    with torch.no_grad():
        x = torch.from_numpy((images.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
        found = model.eval().encode_image(x, normalize=True).numpy()
    np.testing.assert_allclose(found, lit_fast.load(str(run)).embed_image(list(images)), atol=2e-2)


def test_open_clip_export_of_a_timm_tower_by_its_name(tmp_path: Path) -> None:
    """Exact in float32: the tower is timm's own, the head is folded into open_clip's projection."""
    from safetensors.torch import save_file

    from lit_fast.config import LossConfig
    from lit_fast.train.export.writer import ExportOptions, write_directory
    from tests.towers.torch.models import shaken
    from tests.train.export.cases import MU
    from tests.trained import random_model

    timm, open_clip = import_package("timm"), import_package("open_clip")
    import torch

    name = "test_resnet"
    network = shaken(timm.create_model(name, pretrained=False))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    tower = load_tower(str(tmp_path / "w.safetensors"), arch=name, resolution=SIZE, preprocess="pil-squash")
    cropped = random_model(load_tower(str(tmp_path / "w.safetensors"), arch=name), MU, LossConfig())
    with pytest.raises(UserError, match="which open_clip cannot; export with --format lit_fast, embed with"):
        write_directory("open_clip", cropped, str(tmp_path / "model"), ExportOptions())
    model = random_model(tower, MU, LossConfig(center=True, image_head=True))
    write_directory("open_clip", model, str(tmp_path / "model"), ExportOptions())
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    images = pixels(2, SIZE)
    mean, std = (np.asarray(v, np.float32) for v in (tower.preprocess.mean, tower.preprocess.std))
    with torch.no_grad():
        x = torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
        found = loaded.eval().encode_image(x, normalize=True).numpy()
    features = np.asarray(jax.jit(tower.embed)(tower.params, images))
    np.testing.assert_allclose(found, model.embed_features(features), atol=1e-4)


def test_embed_of_a_file_with_its_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    from tests.towers.torch.models import shaken

    timm = import_package("timm")
    network = shaken(timm.create_model("test_efficientnet", num_classes=7))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    write_tar(tmp_path / "pairs.tar", samples(6))
    data = tmp_path / "d"
    command("index", tmp_path / "pairs.tar", "--out", data)
    spec = ["--tower", tmp_path / "weights.safetensors"]
    assert main(["embed", str(data), *map(str, spec)]) == 2
    assert "has no config.json beside it; put it there, or name the architecture: --arch" in (
        capsys.readouterr().err
    )
    command("embed", data, *spec, "--arch", "test_efficientnet", "--resolution", 32, "--batch-size", 2)
    features = open_features(open_dataset(data))
    assert (features.tower, features.width) == ("weights", 256)
    assert features.provenance["options"] == {"resolution": 32, "arch": "test_efficientnet"}
    assert features.provenance["versions"].keys() == {"lit_fast", "jax", "torch", "torchax", "timm"}
    command("verify", data)
    assert "6 rows embedded again" in capsys.readouterr().out


def test_embed_killed_and_shared_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle and a resume give the bytes of two hosts' shares."""
    patch_shard_rows(monkeypatch)
    model_directory(tmp_path / "tower", "timm")
    files = [encoded(picture(i, 40, 36)) for i in range(16)]
    members = []
    for i in range(1100):
        members += [(f"{i}.jpg", files[i % 16]), (f"{i}.cls", b"0")]
    write_tar(tmp_path / "many.tar", members)
    data = tmp_path / "d"
    command("index", tmp_path / "many.tar", "--out", data)

    words = ["embed", data, "--tower", tmp_path / "tower"]
    killed = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words), "--name", "killed"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    partial = data / "features" / "killed" / "partial"
    while killed.poll() is None and not any(f.stat().st_size for f in partial.rglob("*") if f.is_file()):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    command(*words, "--name", "killed")
    for share in ("0/2", "1/2"):
        command(*words, "--name", "shared", "--shard-of", share)
    assert tree(data / "features" / "killed") == tree(data / "features" / "shared")


def test_tower_of_questionable_options_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    network = import_package("timm").create_model("efficientnet_lite0", num_classes=0)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    load_tower(str(tmp_path / "w.safetensors"), arch="efficientnet_lite0", resolution=50)
    notes = capsys.readouterr().err
    assert "note: weights of tf_efficientnet_lite0, which pads otherwise, fit efficientnet_lite0 too" in notes
    assert "note: 50 pixels are less than a quarter of the tower's 224" in notes
    load_tower(str(tmp_path / "w.safetensors"), arch="tf_efficientnet_lite0", resolution=64)
    notes = capsys.readouterr().err
    assert "; give --arch efficientnet_lite0 if they are its" in notes
    assert "pixels" not in notes
