"""`python -m train CONFIG.toml ...` is `lit-fast train CONFIG.toml ...`."""

from __future__ import annotations

import sys

from lit_fast.cli.main import main

raise SystemExit(main(["train", *sys.argv[1:]]))
