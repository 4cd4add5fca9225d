"""timm's names of the towers that open_clip takes from it, by their shape."""

from __future__ import annotations

import re

from lit_fast.models.architecture import Architecture
from lit_fast.models.sizes import VARIANTS
from lit_fast.weights.timm import epsilon_of, gelu_of

# By the letter of the variant. A name says the patch and, if it is not 518 pixels, the size.
_NAMES = {
    "S": ["vit_small_patch14_reg4_dinov2"],
    "B": [
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch32_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_siglip_256",
        "vit_base_patch16_siglip_384",
        "vit_base_patch16_siglip_512",
        "vit_base_patch32_siglip_256",
    ],
    "L": [
        "vit_large_patch14_reg4_dinov2",
        "vit_large_patch14_clip_quickgelu_224",
        "vit_large_patch14_clip_quickgelu_336",
        "vit_large_patch16_siglip_256",
        "vit_large_patch16_siglip_384",
        "vit_large_patch16_siglip_512",
    ],
    "So400m": [
        "vit_so400m_patch14_siglip_224",
        "vit_so400m_patch14_siglip_378",
        "vit_so400m_patch14_siglip_384",
        "vit_so400m_patch16_siglip_256",
        "vit_so400m_patch16_siglip_384",
        "vit_so400m_patch16_siglip_512",
    ],
    "H": ["vit_huge_patch14_clip_quickgelu_224", "vit_huge_patch14_clip_quickgelu_378"],
    "g-opt": ["vit_giantopt_patch16_siglip_256", "vit_giantopt_patch16_siglip_384"],
}


def timm_name(a: Architecture, size: int) -> str | None:
    """The name of the model that computes a tower for images of `size` pixels; None: there is none."""
    for letter, names in _NAMES.items():
        for name in names:
            if VARIANTS[letter] == a.shape and _described(name) == _description(a, size):
                return name
    return None


def _description(a: Architecture, size: int) -> tuple[object, ...]:
    pool = "tok" if a.pool == "projection" else a.pool
    tokens = (pool, a.class_token, a.registers, a.pre_norm, a.norm_after_pool)
    return (a.patch, size, a.gelu, a.epsilon, *tokens)


def _described(name: str) -> tuple[object, ...]:
    numbers = re.search(r"patch(\d+)\D.*?(?:_(\d+))?$", name)
    assert numbers is not None
    clip, dinov2 = "_clip_" in name, "_dinov2" in name
    tokens = (
        ("tok", True, 4 if dinov2 else 0, clip, False) if clip or dinov2 else ("map", False, 0, False, False)
    )
    return (int(numbers[1]), int(numbers[2] or 518), gelu_of(name), epsilon_of(name), *tokens)
