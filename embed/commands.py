"""The commands `index`, `embed` and `tokenize`: their arguments.

What they import is imported when they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Run = Callable[[argparse.Namespace], None]


def index(parser: argparse.ArgumentParser) -> Run:
    """Fix the rows of a dataset: image files and captions in webdataset tars.

    SOURCE is a tar, a directory of tars or a pattern: 'train/*.tar', 'train/{00000..00099}.tar'. The tars
    are read where they lie and must stay there; rows are shuffled once, by the seed.
    """
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="tar files, patterns or directories")
    parser.add_argument("--out", required=True, type=Path, metavar="D", help="directory of the new dataset")
    parser.add_argument("--seed", type=_whole(0), default=0, help="order of the rows (default 0)")

    def run(args: argparse.Namespace) -> None:
        from embed.index import index_dataset

        index_dataset(args.source, args.out, seed=args.seed)

    return run


def embed(parser: argparse.ArgumentParser) -> Run:
    """Embed every image of a dataset once with a frozen vision tower.

    The same command again goes on where it was interrupted. Images that cannot be decoded keep their row
    and are marked invalid.
    """
    parser.add_argument("dataset", type=Path, metavar="D", help="a dataset made by lit-fast index")
    parser.add_argument("--tower", required=True, metavar="NAME|PATH", help="weights of the vision tower")
    parser.add_argument("--name", metavar="NAME", help="directory in D/features (default: the tower's name)")
    parser.add_argument("--preprocess", choices=("pil-crop", "tf-squash"), help="default: the tower's own")
    parser.add_argument("--resolution", type=_whole(1), metavar="N", help="pixels (default: the tower's own)")
    parser.add_argument("--gelu", choices=("exact", "tanh"), help="default: the tower's own")
    parser.add_argument("--batch-size", type=_whole(1), metavar="N", help="default: 64 per device, 8 on CPU")
    parser.add_argument("--workers", type=_whole(1), metavar="N", help="decoding threads (default: cores)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16"
    )
    parser.add_argument("--max-pixels", type=_whole(1), metavar="N", help="larger images are invalid")
    parser.add_argument(
        "--shard-of", type=_share, default=(0, 1), metavar="I/N", help="do share I of N only, I from 0 on"
    )

    def run(args: argparse.Namespace) -> None:
        from embed.extract import embed_dataset
        from lit_fast.preprocess import MAX_PIXELS

        embed_dataset(
            args.dataset,
            args.tower,
            name=args.name,
            preprocess=args.preprocess,
            resolution=args.resolution,
            gelu=args.gelu,
            batch_size=args.batch_size,
            workers=args.workers,
            dtype=args.dtype,
            max_pixels=args.max_pixels or MAX_PIXELS,
            share=args.shard_of,
        )

    return run


def tokenize(parser: argparse.ArgumentParser) -> Run:
    """Turn the captions of a dataset into token ids, with a given or a new vocabulary."""
    parser.add_argument("dataset", type=Path, metavar="D", help="a dataset made by lit-fast index")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="FILE.model", help="a SentencePiece model")
    which.add_argument("--train-vocab", type=_whole(1), metavar="N", help="train a new one with N pieces")
    parser.add_argument("--name", default="", metavar="NAME", help="directory in D/tokens")
    parser.add_argument("--max-length", type=_whole(1), default=16, metavar="N", help="ids (default 16)")
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="of a new vocabulary"
    )

    def run(args: argparse.Namespace) -> None:
        from embed.tokenize import tokenize_dataset

        tokenize_dataset(
            args.dataset,
            tokenizer=args.tokenizer,
            train_vocab=args.train_vocab,
            name=args.name,
            max_length=args.max_length,
            model_type=args.model_type,
        )

    return run


def _whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return whole_number


def _share(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0/4")
    return int(number), int(count)
