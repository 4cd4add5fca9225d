"""What a vision transformer is made of, its parameters and its FLOPs; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from lit_fast.models.sizes import Shape

POOLS = ("tok", "gap", "map", "projection")


@dataclass(frozen=True)
class Architecture:
    """One vision transformer of the ViT, DeiT, DINOv2, CLIP or SigLIP kind.

    Attributes:
      shape: sizes of the encoder; `mlp_dim` is the width between the two dense layers, for SwiGLU that of
        each half.
      patch: height and width of a patch, pixels.
      pool: "tok": class token. "gap": mean of the patch tokens; class and register tokens take part in
        attention but not in the mean. "map": attention pooling (MAP head) over the patch tokens.
        "projection": class token times a matrix, CLIP's embedding.
      gelu: non-linearity of the MLPs: "exact" (erf), "tanh", "quick" (x sigmoid(1.702 x)) or "swiglu".
      epsilon: of every LayerNorm.
      class_token: there is one.
      registers: further tokens without a position, between class token and patches.
      pre_norm: a LayerNorm before the first block (CLIP).
      norm_after_pool: the final LayerNorm comes after pooling (timm's `fc_norm`), not before.
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
        """Length of a feature vector."""
        return self.projection if self.pool == "projection" else self.shape.width


def parameters(architecture: Architecture, size: int) -> int:
    """Number of parameters for images of `size` x `size` pixels, without head.

    The class token's own position is counted as a part of the class token, as it is stored here.
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


def flops_per_image(architecture: Architecture, size: int) -> float:
    """Operations of one image of `size` x `size` pixels: two per multiply-add of every matrix product.

    Of the whole model, as it is usually given; where one token is pooled, `ViT` spares the last layer's work
    for the others.
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
    return float(total)


def _mlp_products(a: Architecture) -> int:
    """Multiply-adds of an MLP for one token."""
    return (3 if a.gelu == "swiglu" else 2) * a.shape.width * a.shape.mlp_dim
