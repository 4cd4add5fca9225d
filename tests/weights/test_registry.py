"""The table of known towers, and the command that prints it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_fast.cli.inspect import towers
from lit_fast.cli.main import main
from lit_fast.errors import UserError
from lit_fast.models.architecture import flops_per_image, parameters
from lit_fast.weights import resolve
from lit_fast.weights.registry import known_towers


def test_known_towers_are_consistent() -> None:
    table = known_towers()
    assert len({t.name for t in table}) == len(table) > 100
    for tower in table:
        assert tower.resolution % tower.architecture.patch == 0 or tower.architecture.patch == 14, tower.name
        assert tower.architecture.pool != "projection" or tower.architecture.projection, tower.name
        assert tower.name.startswith(("hf:", "timm:", "augreg/"))
        if tower.name.startswith("augreg/"):
            file = Path(tower.source)
            assert str(file.parent) == "vit_models/augreg"
            assert resolve._AUGREG_FILE.fullmatch(file.stem), tower.name
            variant, _, patch = file.name.partition("-")[0].partition("_")
            assert (int(patch), tower.name.split("/")[1].split("_")[0]) == (tower.architecture.patch, variant)
            said = file.stem.rpartition("-res_")[2] if "-res_" in file.stem else "224"
            assert tower.resolution == int(said)
        elif tower.name.startswith("timm:"):
            _, _, size = tower.name.partition(".")[0].rpartition("_")
            assert tower.resolution == (518 if "dinov2" in size or "dinov2" in tower.name else int(size))


def test_parameters_and_flops_have_known_values() -> None:
    by_name = {t.name: t for t in known_towers()}
    b8 = by_name["augreg/B_8"]
    # The file has 85,807,872 without head; the class token's own position is added to it when it is read.
    assert parameters(b8.architecture, 224) == 85_807_872 - 768
    # From the definition, multiply-adds twice: patches, 12 x (projections, MLP, attention).
    n, w = 785, 768
    block = 2 * n * (4 * w * w + 8 * w * w) + 4 * n * n * w
    assert flops_per_image(b8.architecture, 224) == 2 * 784 * 192 * w + 12 * block


@pytest.mark.parametrize(
    "name",
    [
        "augreg/B_8",
        "hf:facebook/dinov2-with-registers-giant",
        "hf:openai/clip-vit-large-patch14-336",
        "timm:deit_base_distilled_patch16_384.fb_in1k",
        "hf:google/siglip2-so400m-patch14-384",
    ],
)
def test_parameters_equal_those_of_the_module(name: str) -> None:
    import jax
    import jax.numpy as jnp

    from lit_fast.models.vit import ViT

    tower = next(t for t in known_towers() if t.name == name)
    size = tower.resolution // tower.architecture.patch * tower.architecture.patch
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(ViT(tower.architecture).init, jax.random.key(0), images)
    assert parameters(tower.architecture, size) == sum(v.size for v in jax.tree.leaves(shapes))


def test_towers_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    run = towers(parser)
    run(parser.parse_args(["b_8"]))
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "name",
        "width",
        "pixels",
        "pooling",
        "parameters",
        "GFLOPs",
        "licence",
        "source",
    ]
    assert first.split()[:7] == ["augreg/B_8", "768", "224", "tok", "85.8", "M", "156.3"]
    run(parser.parse_args([]))
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(known_towers())
    with pytest.raises(UserError, match="no known tower"):
        run(parser.parse_args(["zzz"]))


def test_format_towers_imports_neither_jax_nor_numpy() -> None:
    code = "import sys; from lit_fast.weights.registry import *; format_towers(known_rows(known_towers()));"
    code += " print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "[]\n"


def test_towers_command_without_a_match_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "zzz"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
