"""Tell lit_fast's own vision towers, whose parameters the formats translate, from those of other libraries."""

from __future__ import annotations

from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.towers.tower import Tower


def own_vit(model: Model) -> Tower:
    """Return the vision tower of a model, which must be a ViT of lit_fast's own code.

    Raises:
      UserError: it is a model of another library, or its weights cannot be loaded.
    """
    if isinstance(model.tower, Tower):
        return model.tower
    library = model.tower_json["architecture"]
    raise UserError(
        f"the vision tower {model.tower.name} is computed by {library}'s code, which this format cannot express; "
        "export with --format lit_fast or open_clip"
    )
