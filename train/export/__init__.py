"""`lit-fast export`: a trained model in the formats of others.

Each module writes one format: `check(model)` raises UserError, before anything is written, where the format cannot
express the model, and `write(model, folder)` fills an empty folder.
"""

from __future__ import annotations
