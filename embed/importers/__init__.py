"""Features that another program computed, imported as a dataset with features.

`import_features` reads files, `import_rows` takes rows from a program. To add a format, add its files to `parts` and
its reader to `vectors`, and its name to the choices of `--format` in `lit_fast.embed.cli`.
"""

from __future__ import annotations
