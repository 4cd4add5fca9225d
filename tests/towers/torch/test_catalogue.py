"""`lit-fast towers` and `lit-fast plan` know the models of timm and open_clip."""

from __future__ import annotations

import sys

import pytest

from lit_fast.cli.main import main
from lit_fast.config import Config, PlanConfig
from lit_fast.models.architecture import flops_per_image
from lit_fast.towers.tower import load_tower
from lit_fast.train.cost.flops import tower_flops
from lit_fast.train.plan.data import plan_data
from tests.torch_packages import import_package


@pytest.fixture(autouse=True)
def _packages() -> None:
    import_package("timm")
    import_package("open_clip")
    pytest.importorskip("torchax")


def test_towers_lists_models_of_timm_and_open_clip(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "resnet18.a1"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == [
        "timm:resnet18.a1_in1k", "512", "224", "-", "11.2", "M", "3.6", "apache-2.0", "hf.co/timm/resnet18.a1_in1k",
    ]  # fmt: skip
    assert main(["towers", "ViT-B-32/laion400m_e31"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:6] == ["open_clip:ViT-B-32/laion400m_e31", "512", "224", "projection", "87.8", "M"]
    assert main(["towers", "volo_d5"]) == 0
    assert "2 models that need --preprocess are left out" in capsys.readouterr().err


def test_towers_without_usable_packages_lists_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchax", None)
    assert main(["towers", "dinov2"]) == 0
    out = capsys.readouterr()
    assert "hf:facebook/dinov2-base" in out.out
    assert out.err.startswith("note: models of timm and open_clip are not listed: package torchax")
    assert main(["towers", "resnet18.a1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_plan_counts_the_operations_of_the_traced_program() -> None:
    data = plan_data(Config(plan=PlanConfig(tower="timm:test_resnet.r160_in1k")))
    # timm's count of multiply-adds by torch on meta tensors, times two.
    assert data.width == 96
    assert data.image_flops is not None
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        timm.create_model("test_resnet", num_classes=0).requires_grad_(False)(torch.empty(1, 3, 160, 160))
    assert data.image_flops == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_tower_flops_of_both_backends_agree(tiny_vit: object) -> None:
    own, other = load_tower(str(tiny_vit)), load_tower(str(tiny_vit), backend="torch")
    formula = flops_per_image(own.architecture, own.preprocess.size)  # type: ignore[attr-defined]
    assert tower_flops(other) == pytest.approx(formula, rel=1e-6)
