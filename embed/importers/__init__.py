"""Features that another program computed, imported as a dataset with features.

To add a format, add a reader to `find_parts` in `parts`, and its name to the choices of `--format` in
`lit_fast.embed.cli`.
"""

from __future__ import annotations
