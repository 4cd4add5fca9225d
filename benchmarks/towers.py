"""Towers of timm, open_clip and transformers under JAX against the same models in eager PyTorch.

Every model has random weights, shaken so that nothing is zero. For each: the largest difference of the float32
features relative to the largest feature, the cosine of the bfloat16 policy to float32, and the seconds of tracing.
Writes benchmarks/towers.md, a row at a time; models that have a row there are not measured again. A model that ends the
process, by its memory or its time, keeps the row "not finished".

Run: python -m benchmarks.towers [--only PART] [--seconds N]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file

from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.tower import load_tower
from tests.torch_packages import import_package

TABLE = Path(__file__).with_name("towers.md")

# Architecture, arguments. A depth makes deep models cheap; widths, heads and kinds of layers are the published ones.
TIMM: list[tuple[str, dict[str, Any]]] = [
    ("vit_large_patch16_dinov3", {"img_size": 64, "depth": 1}),
    ("vit_base_patch16_clip_224", {"img_size": 64, "depth": 2}),
    ("vit_so400m_patch14_siglip_224", {"img_size": 56, "depth": 1}),
    ("vit_pe_core_base_patch16_224", {"img_size": 64, "depth": 2}),
    ("vit_base_patch14_reg1_tipsv2", {"img_size": 56, "depth": 2}),
    ("vit_intern300m_patch14_448", {"img_size": 56, "depth": 1}),
    ("vit_medium_patch16_reg4_gap_256", {"img_size": 64, "depth": 2}),
    ("convnext_tiny.dinov3_lvd1689m", {"depths": [1, 1, 1, 1]}),
    ("regnety_004", {}),
    ("mobilenetv4_hybrid_medium", {}),
    ("maxvit_pico_rw_256", {"img_size": 256}),
    ("coatnet_nano_rw_224", {}),
    ("csatv2", {}),
    ("vit_tiny_patch16_224", {"img_size": 64}),
    ("vit_base_patch16_224", {"img_size": 64, "depth": 2, "global_pool": "avg"}),
    ("vit_base_patch32_clip_224", {"img_size": 64, "depth": 2}),
    ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 2}),
    ("vit_small_patch14_dinov2", {"img_size": 56, "depth": 2}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}),
    ("vit_small_patch16_dinov3", {"img_size": 64, "depth": 2}),
    ("vit_small_plus_patch16_dinov3", {"img_size": 64, "depth": 2}),
    ("vit_betwixt_patch16_rope_reg4_gap_256", {"img_size": 64, "depth": 2}),
    ("vit_pe_core_tiny_patch16_384", {"img_size": 64, "depth": 2}),
    ("vit_pe_spatial_tiny_patch16_512", {"img_size": 64, "depth": 2}),
    ("vit_base_patch16_radio_v3", {"depth": 2}),
    ("vit_relpos_small_patch16_224", {"img_size": 64, "depth": 2}),
    ("naflexvit_base_patch16_gap", {"depth": 1}),
    ("naflexvit_base_patch16_siglip", {"depth": 1}),
    ("deit3_small_patch16_224", {"img_size": 64, "depth": 2}),
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}),
    ("beit_base_patch16_224", {"img_size": 64, "depth": 2}),
    ("beitv2_base_patch16_224", {"img_size": 64, "depth": 2}),
    ("beit3_base_patch16_224", {"img_size": 64, "depth": 2}),
    ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}),
    ("eva02_base_patch16_clip_224", {"img_size": 64, "depth": 2}),
    ("aimv2_large_patch14_224", {"img_size": 56, "depth": 1}),
    ("cait_xxs24_224", {"img_size": 64, "depth": 2}),
    ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 2}),
    ("mixer_s32_224", {"img_size": 64}),
    ("gmlp_s16_224", {"img_size": 64}),
    ("resmlp_12_224", {"img_size": 64}),
    ("convit_tiny", {"img_size": 64, "depth": 12}),
    ("pit_ti_224", {"img_size": 224}),
    ("crossvit_tiny_240", {}),
    ("tnt_s_legacy_patch16_224", {"img_size": 64, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 2, 1]}),
    ("swinv2_tiny_window8_256", {"depths": [1, 1, 2, 1]}),
    ("swinv2_cr_tiny_224", {"depths": [1, 1, 2, 1]}),
    ("hiera_tiny_224", {}),
    ("mvitv2_tiny", {"img_size": 224}),
    ("davit_tiny", {"depths": [1, 1, 1, 1]}),
    ("tiny_vit_5m_224", {}),
    ("levit_128s", {}),
    ("efficientformer_l1", {}),
    ("efficientformerv2_s0", {}),
    ("efficientvit_m0", {}),
    ("efficientvit_b0", {}),
    ("maxvit_rmlp_pico_rw_256", {"img_size": 256}),
    ("coatnet_pico_rw_224", {}),
    ("coat_lite_tiny", {"img_size": 64}),
    ("twins_svt_small", {"img_size": 64}),
    ("pvt_v2_b0", {}),
    ("poolformer_s12", {}),
    ("caformer_s18", {}),
    ("mambaout_femto", {}),
    ("convnext_atto", {}),
    ("convnextv2_atto", {}),
    ("convnext_tiny", {"depths": [1, 1, 1, 1]}),
    ("edgenext_xx_small", {}),
    ("fastvit_t8", {}),
    ("fastvit_mci0", {}),
    ("mobilevit_xxs", {}),
    ("mobilevitv2_050", {}),
    ("repvit_m0_9", {}),
    ("ghostnet_100", {}),
    ("lcnet_050", {}),
    ("mobilenetv2_050", {}),
    ("mobilenetv3_small_050", {}),
    ("mobilenetv4_conv_small", {}),
    ("efficientnet_b0", {}),
    ("tf_efficientnet_lite0", {}),
    ("tf_efficientnetv2_b0", {}),
    ("mixnet_s", {}),
    ("fbnetc_100", {}),
    ("mnasnet_small", {}),
    ("resnet18", {}),
    ("resnet50_clip", {}),
    ("resnet50_clip_gap", {}),
    ("resnetv2_50x1_bit", {}),
    ("resnext26ts", {}),
    ("seresnet18", {}),
    ("resnest14d", {}),
    ("res2net50_14w_8s", {}),
    ("regnetx_002", {}),
    ("regnety_002", {}),
    ("regnetz_005", {}),
    ("dm_nfnet_f0", {}),
    ("nf_regnet_b0", {}),
    ("densenet121", {}),
    ("dla34", {}),
    ("dpn48b", {}),
    ("hrnet_w18_small", {}),
    ("inception_v3", {}),
    ("xception41", {}),
    ("vgg11", {}),
    ("vovnet39a", {}),
    ("cspresnet50", {}),
    ("darknet17", {}),
    ("hgnet_tiny", {}),
    ("selecsls42", {}),
    ("repvgg_a0", {}),
    ("bat_resnext26ts", {}),
    ("halonet26t", {}),
    ("lambda_resnet26t", {}),
    ("volo_d1_224", {"img_size": 224}),
    ("sequencer2d_s", {}),
    ("focalnet_tiny_srf", {}),
    ("gcvit_xxtiny", {}),
    ("nest_tiny_jx", {}),
    ("nextvit_small", {}),
    ("inception_next_atto", {}),
    ("rdnet_tiny", {}),
    ("starnet_s050", {}),
    ("shvit_s1", {}),
    ("swiftformer_xs", {}),
    ("vitamin_small_224", {"img_size": 224}),
    ("visformer_tiny", {}),
    ("hieradet_small", {}),
]

# Architecture, layers of its tower, None for all of them: those of timm's trunks cannot be cut.
OPEN_CLIP: dict[str, int | None] = {
    "ViT-B-32": 2,
    "ViT-L-14": 2,
    "ViT-B-32-quickgelu": 2,
    "RN50": None,
    "coca_ViT-B-32": 2,
    "ViTamin-S": None,
    "MobileCLIP-S1": None,
    "MobileCLIP2-S0": None,
    "PE-Core-T-16-384": None,
    "PE-Core-B-16": None,
    "ViT-B-16-SigLIP": None,
    "ViT-B-16-SigLIP2": None,
    "EVA02-B-16": None,
    "convnext_base": None,
    "nllb-clip-base-siglip": None,
    "ViT-SO400M-14-SigLIP": None,
}

_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "vit": _SMALL,
    "deit": _SMALL,
    "dinov2": _SMALL | {"patch_size": 16},
    "dinov2_with_registers": _SMALL | {"patch_size": 16},
    "dinov3_vit": _SMALL,
    "dinov3_convnext": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64},
    "beit": _SMALL | {"use_relative_position_bias": True},
    "vit_msn": _SMALL,
    "ijepa": _SMALL,
    "clip_vision_model": _SMALL | {"projection_dim": 24},
    "siglip_vision_model": _SMALL,
    "aimv2_vision_model": _SMALL | {"patch_size": 16},
    "convnext": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64},
    "convnextv2": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64},
    "swin": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "image_size": 224},
    "swinv2": {
        "embed_dim": 24,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "image_size": 256,
        "window_size": 8,
    },
    "hiera": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]},
    "regnet": {
        "embedding_size": 16,
        "hidden_sizes": [32, 48, 64, 96],
        "depths": [1, 1, 1, 1],
        "groups_width": 16,
    },
    "poolformer": {},
    "mobilenet_v2": {},
    "bit": {"num_groups": 8, "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]},
}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with noise on every weight and statistic, so that none is zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                noise = 0.02 * torch.randn(value.shape, generator=generator)
                value.copy_(value + (noise.abs() if (value == 1).all() else noise))
    return model.eval()


def timm_models(directory: Path) -> Iterator[tuple[str, Callable[[], tuple[Path, Any, dict[str, Any]]]]]:
    timm = import_package("timm")
    for name, arguments in TIMM:

        def make(name: str = name, arguments: dict[str, Any] = arguments) -> tuple[Path, Any, dict[str, Any]]:
            arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
            model = shaken(timm.create_model(name, num_classes=0, **arguments))
            timm.models.save_for_hf(model, directory, model_args=arguments, safe_serialization=False)
            (directory / "pytorch_model.bin").unlink()
            # Clones, as layers can share a tensor (CoaT).
            save_file({k: v.clone() for k, v in model.state_dict().items()}, directory / "model.safetensors")
            return directory, model, {}

        yield f"timm {name}" + "".join(f" {k}={v}" for k, v in arguments.items()), make


def open_clip_models(directory: Path) -> Iterator[tuple[str, Callable[[], tuple[Path, Any, dict[str, Any]]]]]:
    open_clip = import_package("open_clip")
    for name, layers in OPEN_CLIP.items():

        def make(name: str = name, layers: int | None = layers) -> tuple[Path, Any, dict[str, Any]]:
            config = open_clip.get_model_config(name)
            if layers:
                config["vision_cfg"]["layers"] = layers
            text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
            quick = config.get("quick_gelu", False)
            model = shaken(open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, quick).visual)
            path = directory / "open_clip_model.safetensors"
            save_file({f"visual.{k}": v.contiguous().clone() for k, v in model.state_dict().items()}, path)
            (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
            return directory, model, {}

        yield f"open_clip {name}" + (f" layers={layers}" if layers else ""), make


def transformers_models(
    directory: Path,
) -> Iterator[tuple[str, Callable[[], tuple[Path, Any, dict[str, Any]]]]]:
    transformers = import_package("transformers")
    for kind, settings in TRANSFORMERS.items():

        def make(kind: str = kind, settings: dict[str, Any] = settings) -> tuple[Path, Any, dict[str, Any]]:
            config = transformers.AutoConfig.for_model(kind, **settings)
            model_class = transformers.MODEL_MAPPING[type(config)]
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            model_class = getattr(transformers, f"{model_class.__name__}WithProjection", model_class)
            model = shaken(model_class(config))
            model.save_pretrained(directory)
            side = settings.get("image_size", 224)
            processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
            (directory / "preprocessor_config.json").write_text(json.dumps(processor))
            return directory, model, {}

        yield f"transformers {kind}", make


def reference(tower: Any, model: Any, images: np.ndarray) -> np.ndarray:
    """The features by eager PyTorch, float32."""
    mean, std = (np.asarray(v, np.float32) for v in (tower.preprocess.mean, tower.preprocess.std))
    x = torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = tower.body.pooled(_numpy(model(x, **tower.body.options)))
    return np.asarray(out)


def _numpy(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out.numpy()
    if isinstance(out, tuple):
        return tuple(_numpy(v) for v in out)
    return {k: _numpy(v) for k, v in out.items() if isinstance(v, torch.Tensor)}


def measure(tower: FrozenTower, model: Any) -> list[str]:
    """Figures of one model."""
    size = tower.preprocess.size
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), np.uint8)
    expected = reference(tower, model, images)
    start = time.perf_counter()
    run = jax.jit(tower.embed).lower(tower.params, images)
    seconds = time.perf_counter() - start
    found = np.asarray(_compiled(run)(tower.params, images))
    # A second trace, at another dtype and batch size.
    program = jax.jit(lambda p, x: tower.embed(p, x, jnp.bfloat16)).lower(tower.params, images[:1])
    half = np.asarray(_compiled(program)(tower.params, images[:1]))
    cosine = (half * expected[:1]).sum() / np.linalg.norm(half) / np.linalg.norm(expected[:1])
    callbacks = "callback" in run.as_text()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    relative = np.abs(found - expected).max() / np.abs(expected).max()
    return [
        f"{millions:.1f}", str(size), str(tower.width), f"{relative:.1e}", f"{cosine:.6f}",
        f"{seconds:.1f}", "yes" if callbacks else "none",
    ]  # fmt: skip


def _compiled(program: Any) -> Any:
    """A program compiled without the optimizations that take most of the time."""
    return program.compile({"xla_backend_optimization_level": 0})


def known_rows() -> dict[str, str]:
    """The rows of the table by model."""
    lines = TABLE.read_text().splitlines()[2:] if TABLE.exists() else []
    return {line.split("|")[1].strip(): line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--only", default="", help="models with this in their name; the table is printed, not written")
    add("--seconds", type=float, default=float("inf"), help="begin no model after this time")
    args = parser.parse_args()
    head = (
        "model", "parameters, M", "pixels", "width", "float32: difference", "bfloat16: cosine",
        "trace, s", "host callbacks",
    )  # fmt: skip
    start, known, rows = time.monotonic(), {} if args.only else known_rows(), {}

    def write(name: str, cells: list[str]) -> None:
        rows[name] = f"| {name} | " + " | ".join(cells) + " |"
        if not args.only:
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(rows | known).values()]
            TABLE.write_text("\n".join(lines) + "\n")

    for models in (timm_models, open_clip_models, transformers_models):
        with tempfile.TemporaryDirectory() as scratch:
            for name, make in models(Path(scratch)):
                if name in known:
                    rows[name] = known.pop(name)
                    continue
                if args.only not in name or time.monotonic() - start > args.seconds:
                    continue
                write(name, ["not finished"])
                try:
                    path, model, options = make()
                    cells = measure(load_tower(str(path), backend="torch", **options), model)
                except Exception as error:
                    cells = [f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"]
                write(name, cells)
                print(rows[name], flush=True)
                for file in Path(scratch).iterdir():
                    file.unlink()
                model = None
                jax.clear_caches()
                gc.collect()


if __name__ == "__main__":
    main()
