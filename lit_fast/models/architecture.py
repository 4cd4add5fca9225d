"""Architectures of vision transformers, with their parameter and FLOP counts; imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_fast.models.sizes import Shape

POOLS = ("tok", "gap", "map", "projection")
GELUS = ("exact", "tanh", "quick")
# Larger values in a file would need more memory than any machine has.
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Architecture:
    """One vision transformer of the ViT, DeiT, DINOv2, CLIP or SigLIP kind.

    Attributes:
      shape: sizes of the encoder; `mlp_dim` is the width between the two dense layers, for SwiGLU of each half.
      patch: height and width of a patch in pixels.
      pool: "tok": class token. "gap": mean of the patch tokens, without class and register tokens. "map": attention
        pooling (MAP head) over the patch tokens. "projection": class token times a matrix, CLIP's embedding.
      gelu: activation of the MLPs: "exact" (erf), "tanh", "quick" (x sigmoid(1.702 x)) or "swiglu".
      epsilon: of every LayerNorm.
      class_token: prepend a class token.
      registers: number of tokens without a position between class token and patches.
      pre_norm: apply a LayerNorm before the first block (CLIP).
      norm_after_pool: apply the final LayerNorm after pooling (timm's `fc_norm`) instead of before.
      projection: width of the projected class token; 0 without projection.
    """

    shape: Shape
    patch: int
    pool: str = "tok"
    gelu: str = "exact"
    epsilon: float = 1e-6
    class_token: bool = True
    registers: int = 0
    pre_norm: bool = False
    norm_after_pool: bool = False
    projection: int = 0

    @property
    def width(self) -> int:
        """Width of a feature vector."""
        return self.projection if self.pool == "projection" else self.shape.width


def from_record(record: dict[str, Any]) -> Architecture:
    """Return the architecture that `tower.json` records, see `lit_fast.towers.tower.Tower.record`.

    Raises:
      KeyError, TypeError, ValueError: a value is missing or invalid.
    """
    width, pool, gelu = record["width"], record["pool"], record["gelu"]
    if record["architecture"] != "vit" or pool not in POOLS or gelu not in (*GELUS, "swiglu"):
        raise ValueError(f"architecture {record['architecture']!r}, pool {pool!r}, gelu {gelu!r}")
    architecture = Architecture(
        shape=Shape(record.get("encoder_width", width), record["depth"], record["mlp_dim"], record["heads"]),
        patch=record["patch"],
        pool=pool,
        gelu=gelu,
        epsilon=record["layer_norm_epsilon"],
        class_token=record.get("class_token", pool == "tok"),
        registers=record.get("registers", 0),
        pre_norm=record.get("pre_norm", False),
        norm_after_pool=record.get("norm_after_pool", False),
        projection=width if pool == "projection" else 0,
    )
    shape = architecture.shape
    sizes = (width, *shape, architecture.patch, architecture.registers + 1)
    if not all(type(n) is int and 0 < n <= _MAX_SIZE for n in sizes) or shape.width % shape.heads:
        raise ValueError(f"sizes {sizes}")
    if type(architecture.epsilon) is not float:
        raise TypeError(f"layer_norm_epsilon {architecture.epsilon!r}")
    return architecture


def parameters(architecture: Architecture, size: int) -> int:
    """Count the parameters for images of `size` x `size` pixels, without head.

    The class token includes its own position, as `ViT` stores it.
    """
    a, (width, depth, mlp_dim, _) = architecture, architecture.shape
    mlp = _mlp_products(a) + (2 if a.gelu == "swiglu" else 1) * mlp_dim + width
    block = 4 * width**2 + 4 * width + mlp + 4 * width
    tokens = (size // a.patch) ** 2 + a.class_token + a.registers
    total = depth * block + (3 * a.patch**2 + 1 + tokens) * width + 2 * width
    total += 2 * width * a.pre_norm
    if a.pool == "map":
        total += block - 2 * width + width  # one LayerNorm instead of two, and the probe
    if a.pool == "projection":
        total += width * a.projection
    return total


def flops_per_image(architecture: Architecture, size: int, *, computed: bool = False) -> float:
    """Count the FLOPs of one image of `size` x `size` pixels: two per multiply-add of every matrix product.

    This is the usual figure of the whole model. Where one token is pooled, `ViT` computes less: its last layer skips
    the other tokens' queries, attention and MLP, which are left out with `computed`.
    """
    a, (width, depth, _, _) = architecture, architecture.shape
    patches = (size // a.patch) ** 2
    length = patches + a.class_token + a.registers
    block = length * (8 * width**2 + 2 * _mlp_products(a)) + 4 * length**2 * width
    total = 2 * patches * 3 * a.patch**2 * width + depth * block
    if a.pool == "map":  # one query over the patches
        total += 4 * width**2 + 4 * patches * width**2 + 4 * patches * width + 2 * _mlp_products(a)
    if a.pool == "projection":
        total += 2 * width * a.projection
    if computed and a.pool in ("tok", "projection"):
        total -= (length - 1) * (4 * width**2 + 2 * _mlp_products(a) + 4 * length * width)
    return float(total)


def _mlp_products(a: Architecture) -> int:
    """Count the multiply-adds of an MLP for one token."""
    return (3 if a.gelu == "swiglu" else 2) * a.shape.width * a.shape.mlp_dim
