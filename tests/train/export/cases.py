"""Texts and configurations that the tests of several export formats share."""

from lit_fast.config import LossConfig, TextConfig

TEXTS = ["a red thing", "Blue things, NOT green ones; and another thing", "", "x", "a </s> thing"]
FULL = LossConfig(center=True, image_head=True)
CENTERED = LossConfig(center=True)
MU = TextConfig(variant="mu", dtype="float32", depth=2)
MASKED = TextConfig(variant="mu", dtype="float32", depth=2, pooling="mean", mask_padding=True)

# Fields of text towers by name. Without a head the text tower must be as wide as the vision tower.
TEXT_TOWERS = {
    "last": {},
    "first": {"pooling": "first"},
    "mean": {"pooling": "mean"},
    "last, masked": {"mask_padding": True},
    "first, masked": {"pooling": "first", "mask_padding": True},
    "mean, masked": {"pooling": "mean", "mask_padding": True},
    "narrow table": {"embedding_width": 8},
    "narrow table, mean": {"pooling": "mean", "embedding_width": 8},
    "no head": {"head": False, "heads": 2},
    "odd sizes": {"width": 36, "heads": 3, "mlp_dim": 50, "pooling": "mean", "mask_padding": True},
}
