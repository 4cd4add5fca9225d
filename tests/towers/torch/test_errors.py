"""Every way in which a tower of another library cannot be used is one line with an action."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lit_fast.errors import UserError
from lit_fast.towers.torch import packages
from lit_fast.towers.tower import load_tower
from tests.torch_packages import import_package
from tests.towers.torch.models import save_open_clip, save_timm, save_transformers
from tests.web import Hub, running_hub  # noqa: F401


@pytest.fixture(autouse=True)
def _packages() -> None:
    import_package("timm")
    pytest.importorskip("torchax")


def refusal(spec: object, **options: Any) -> str:
    """The one line with which a tower is refused."""
    with pytest.raises(UserError) as caught:
        load_tower(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def go_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what `import_package` sets."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def edit(path: Path, **values: Any) -> None:
    """Change values of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_extra_that_is_missing_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_timm(tmp_path, "resnet")
    monkeypatch.setitem(sys.modules, "torchax", None)
    assert "package torchax is not installed; install it with: pip install 'lit-fast[torch]'" in refusal(
        tmp_path, backend="torch"
    )
    monkeypatch.setattr(packages, "installed", lambda name: False)
    assert refusal(tmp_path).endswith("; to use PyTorch's code for it run: pip install 'lit-fast[torch]'")
    assert "architecture resnet18 is not supported" in refusal(tmp_path, backend="jax")
    assert "pip install 'lit-fast[torch]'" in refusal("open_clip:ViT-B-32/openai")


def test_torchax_that_does_not_fit_names_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_timm(tmp_path, "resnet")
    (tmp_path / "site" / "torchax").mkdir(parents=True)
    (tmp_path / "site" / "torchax" / "__init__.py").write_text("raise AttributeError('aten.prod has no x')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "torchax")
    message = refusal(tmp_path, backend="torch")
    assert "does not work with torch" in message
    assert message.endswith(f"(aten.prod has no x); pip install 'torchax=={packages.TORCHAX}'")


def test_torchvision_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """With the packages as they are installed; only here a new process imports them."""
    code = "import torchvision"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "torchvision::" not in found.stderr:
        pytest.skip("torch and torchvision fit each other here")
    path = tmp_path / "w.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, path)
    code = f"from lit_fast.towers.tower import load_tower; load_tower({str(path)!r}, arch='resnet18')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("lit_fast.errors.UserError: torch ")
    assert last.endswith(" do not fit each other; install both from one index")


def test_pinned_torchax_is_that_of_the_extra() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    constraints = (Path(__file__).parents[3] / "constraints.txt").read_text()
    assert f'"torchax=={packages.TORCHAX}"' in project
    assert f"torchax=={packages.TORCHAX}\n" in constraints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 33}, "cannot be traced by JAX at 33 pixels ("),
        ({"pool": "map"}, "pool 'map' does not fit timm's vit_small_patch16_dinov3"),
        ({"pool": "projection"}, "pool 'projection' does not fit vit_small_patch16_dinov3, which has none"),
        ({"pool": "best"}, "pool 'best' is unknown; choose from tok, gap, map, projection"),
        ({"gelu": "tanh"}, "gelu is for lit_fast's own ViTs"),
        ({"backend": "jax"}, "architecture vit_small_patch16_dinov3 is not supported; give timm's plain ViT"),
        ({"backend": "tpu"}, "backend must be jax or torch, not 'tpu'"),
        ({"preprocess": "best"}, "preprocess method 'best'"),
        ({"arch": "resnet18"}, "the weights do not fit resnet18: they have "),
        ({"arch": "resnet_18"}, "has no model resnet_18; nearest: resnet18"),
        ({"arch": "resnet18.x"}, "timm's resnet18 has no weights 'x'; choose from "),
        ({"arch": "vit_tiny_patch16_224"}, ": pos_embed is missing"),
        ({"arch": "test_efficientnet"}, "the weights do not fit timm's test_efficientnet: Missing key(s)"),
        ({"arch": "ViT-B-32"}, "has no model ViT-B-32; nearest: open_clip:ViT-B-32"),
        ({"arch": "open_clip:ViT-B-33"}, "has no model ViT-B-33; nearest: ViT-B-32"),
        ({"arch": "open_clip:ViT-B-32/x"}, "open_clip:ViT-B-32 has no weights 'x'; choose from openai, "),
    ],
)
def test_option_that_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_timm(tmp_path, "dinov3")
    assert message in refusal(tmp_path, **options)


def test_name_of_open_clip_that_does_not_exist_names_the_nearest() -> None:
    for name in ("ViT-B-33", "ViT-B-33/openai"):
        assert "has no model ViT-B-33; nearest: ViT-B-32" in refusal(f"open_clip:{name}")
    assert "ViT-B-32 has no weights 'x'; choose from openai, " in refusal("open_clip:ViT-B-32/x")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save_timm(tmp_path, "resnet")
    arrays = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({"conv1.weight": arrays["conv1.weight"][:4]}, "size mismatch for conv1.weight"),
        ({"more.weight": arrays["conv1.weight"]}, 'Unexpected key(s) in state_dict: "more.weight"'),
        ({"conv1.weight": None}, 'Missing key(s) in state_dict: "conv1.weight"'),
        ({"bn1.bias": np.full_like(arrays["bn1.bias"], np.nan)}, "bn1.bias holds values that are not finite"),
    ):
        changed = {name: array for name, array in (arrays | change).items() if array is not None}
        save_file(changed, tmp_path / "model.safetensors")
        assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [{"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"pretrained_cfg": {"file": "evil.pth"}}],
)
def test_configuration_that_names_other_files_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    save_timm(tmp_path, "resnet")
    edit(tmp_path / "config.json", model_args=arguments)
    assert f"the model argument {next(iter(arguments))} is not allowed" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "hf-hub:evil/model"}, "has no model hf-hub:evil/model"),
        ({"architecture": "local-dir:/x"}, "has no model local-dir:/x"),
        ({"model_args": 7}, "model_args is not an object"),
        ({"model_args": {"depthh": 3}}, "cannot build resnet18 ("),
        ({"model_args": {"channels": [1 << 20] * 4}}, "the weights do not fit resnet18: they have"),
    ],
)
def test_configuration_of_timm_that_is_damaged_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_timm(tmp_path, "resnet")
    edit(tmp_path / "config.json", **values)
    assert message in refusal(tmp_path)


def test_configuration_of_open_clip_that_is_damaged_is_refused(tmp_path: Path) -> None:
    save_open_clip(tmp_path)
    config = tmp_path / "open_clip_config.json"
    good = json.loads(config.read_text())
    vision = good["model_cfg"]["vision_cfg"]
    for change, message in (
        (
            {"timm_model_name": "hf-hub:evil/model"},
            "has the trunk 'hf-hub:evil/model', which timm does not have",
        ),
        ({"width": 64}, "the weights do not fit open_clip's model: "),
        ({"widthh": 64}, "cannot build open_clip's model ("),
        ({"image_size": [32, 16]}, "is not the side of a square"),
        ({"width": 1 << 20}, "the weights do not fit"),
    ):
        edit(config, model_cfg=good["model_cfg"] | {"vision_cfg": vision | change})
        assert message in refusal(tmp_path)
    edit(config, model_cfg={"embed_dim": 3})
    assert "is not that of an open_clip model" in refusal(tmp_path)
    edit(config, **good | {"preprocess_cfg": {"resize_mode": "longest"}})
    assert "resize_mode 'longest' is not one of shortest, squash; give --preprocess" in refusal(tmp_path)


def test_configuration_of_transformers_that_is_damaged_is_refused(tmp_path: Path) -> None:
    save_transformers(tmp_path, "convnext")
    config = tmp_path / "config.json"
    good = config.read_text()
    for change, message in (
        ({"model_type": "nothing"}, "has no model type 'nothing'; give another model"),
        ({"model_type": "bert"}, "takes no images; give a vision model"),
        ({"hidden_sizes": [16, 24, 32, 40]}, "the weights do not fit transformers' convnext: "),
        ({"depths": [1, 1, 1, 2]}, "is missing; give the config.json that they are of"),
        ({"hidden_act": "best"}, "cannot build transformers' convnext ("),
    ):
        edit(config, **change)
        assert message in refusal(tmp_path)
        config.write_text(good)
    processor = tmp_path / "preprocessor_config.json"
    edit(processor, image_processor_type="VJEPA2VideoProcessor")
    assert "image processor 'VJEPA2VideoProcessor' is not one of" in refusal(tmp_path)
    assert load_tower(str(tmp_path), preprocess="pil-squash").preprocess.size == 32


def test_gated_weights_name_the_licence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_timm(tmp_path, "dinov3")
    go_online(monkeypatch)
    hub.add("timm/vit_small_patch16_dinov3.lvd1689m", tmp_path)
    hub.gated.add("timm/vit_small_patch16_dinov3.lvd1689m")
    message = refusal("timm:vit_small_patch16_dinov3.lvd1689m")
    assert "is gated; accept its licence at" in message
    assert message.endswith("and run: hf auth login")


def test_names_of_the_hub_are_resolved(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "open_clip"):
        (tmp_path / name).mkdir()
    save_timm(tmp_path / "timm", "resnet")
    save_open_clip(tmp_path / "open_clip")
    (tmp_path / "open_clip" / "model.bin").write_bytes(b"pickle")
    hub.add("timm/resnet18.a1_in1k", tmp_path / "timm")
    hub.add("owner/clip", tmp_path / "open_clip")
    go_online(monkeypatch)
    for spec in ("timm:resnet18.a1_in1k", "timm:resnet18", "hf:timm/resnet18.a1_in1k"):
        assert load_tower(spec).provenance("float32")["model"] == "resnet18"
    tower = load_tower("hf:owner/clip")
    assert (tower.name, tower.source, tower.width) == ("owner-clip", "hf:owner/clip", 24)
    import open_clip

    config = (
        open_clip.get_model_config("ViT-B-32")
        | json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())["model_cfg"]
    )
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(config))
    monkeypatch.setitem(open_clip.pretrained._VITB32, "openai", {"hf_hub": "owner/clip/", "quick_gelu": True})
    tower = load_tower("open_clip:ViT-B-32/openai")
    assert (tower.name, tower.width) == ("ViT-B-32-openai", 24)
    assert tower.provenance("float32")["arguments"]["quick_gelu"] is True
    assert " pretrained weights; choose from openai, " in refusal("open_clip:ViT-B-32")
    assert not any(path.endswith((".bin", ".pt", ".pth")) for path in hub.downloads)


def test_timm_weights_that_are_pickles_only_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch)
    hub.add("timm/resnet18.a1_in1k", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert refusal("timm:resnet18.a1_in1k").endswith("choose a repository with .safetensors weights")
    assert not any("pytorch_model" in path for path in hub.downloads)
