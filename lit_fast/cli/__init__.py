"""The command `lit-fast`: argument parsing and printing.

`main` dispatches. The commands of the stages are in `lit_fast.embed.cli`, `lit_fast.train.cli` and
`lit_fast.train.export.cli`; the entry points in pyproject.toml list all of them.
"""
