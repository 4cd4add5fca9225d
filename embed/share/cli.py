"""Arguments of `push` and `pull`. A command imports its implementation when it runs, so that `--help` is fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], None]


def push(parser: argparse.ArgumentParser) -> Run:
    """Share a dataset on the Hugging Face Hub: index, captions, tokens and features, without the images.

    A missing repository is created, private unless --public is given. Its README.md lists the contents and the
    commands that train from them. Directories of this machine are replaced by elsewhere://1, elsewhere://2, ...;
    names of files stay. Captions and the keys of the rows are uploaded as they are. Files that the repository has are
    skipped: if the command is interrupted, the same command continues.

    The token is that of hf auth login or HF_TOKEN; it needs write access.

    Example: lit-fast push cc12m_dataset someone/cc12m-features
    """
    add = parser.add_argument
    add("dataset", metavar="D", help="a dataset")
    add("repository", metavar="OWNER/NAME", help="dataset repository on the Hub")
    add("--tower", action="append", metavar="NAME", help="features of this tower only; may be repeated")
    add("--tokenizer", action="append", metavar="NAME", help="tokens of this tokenizer only; may be repeated")
    add("--public", action="store_true", help="make a new repository public")
    add("--license", default="", metavar="NAME", help="licence for the README.md (default: unknown)")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.share.push import push_dataset

        push_dataset(
            args.dataset,
            args.repository,
            towers=args.tower,
            tokenizers=args.tokenizer,
            public=args.public,
            licence=args.license,
        )

    return run


def pull(parser: argparse.ArgumentParser) -> Run:
    """Get a dataset that lit-fast push has uploaded, ready for training.

    Every file is compared with the sizes and digests of the repository's manifest, and its content is checked as
    lit-fast verify does, before D appears. If the command is interrupted, the same command continues. If D is
    already this dataset, missing features and tokens are added.

    Example: lit-fast pull someone/cc12m-features cc12m
    Example: lit-fast train siglit_b8_one_day --workdir runs/b8 --dataset cc12m
    """
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="dataset repository on the Hub")
    add("dataset", metavar="D", help="new directory")
    add("--tower", action="append", metavar="NAME", help="features of this tower only; may be repeated")
    add("--tokenizer", action="append", metavar="NAME", help="tokens of this tokenizer only; may be repeated")
    add("--revision", default="main", metavar="REV", help="branch, tag or commit (default main)")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.share.pull import pull_dataset

        pull_dataset(
            args.repository,
            args.dataset,
            revision=args.revision,
            towers=args.tower,
            tokenizers=args.tokenizer,
        )

    return run
