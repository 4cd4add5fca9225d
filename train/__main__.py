"""`python -m train CONFIG.toml ...` is `lit-fast train CONFIG.toml ...`."""

import sys

from lit_fast.cli import main

raise SystemExit(main(["train", *sys.argv[1:]]))
