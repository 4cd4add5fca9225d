"""The commands `index`, `embed`, `tokenize`, `verify` and `import-features`: their arguments.

What they import is imported when they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Run = Callable[[argparse.Namespace], None]


def index(parser: argparse.ArgumentParser) -> Run:
    """Fix the rows of a dataset: images and captions in tars, parquet, tables, folders, array_records.

    SOURCE is a file, a directory or a pattern, local or at https://, s3:// or gs://: 'train/*.tar',
    's3://bucket/{00000..00099}.parquet', captions.csv, annotations/captions_val2017.json, imagenet/val.
    Sources are read where they lie and must stay there; rows are shuffled once, by the seed.

    A directory stands for the files of the one format in it, or is a folder of images per class. A .json is
    COCO's captions. Rows of a table with the same image file become one row with all captions, if no more than
    some 260 000 rows lie between them; a later repeat is left out as a duplicate, as is any key seen before.
    noise:1024 stands for 1024 pictures of uniform random noise, for the key stream.noise of a training.

    CLIP_benchmark's evaluation sets: the directory or URL/ of one, or wds:NAME, which is fetched from the
    Hugging Face Hub: wds:imagenet1k, wds:imagenetv2, wds:vtab/cifar10, wds:mscoco_captions, ...

    Names of columns are guessed. Captions: captions, caption, title, text, txt, sentences, raw, alt_text,
    captions/text. Images: image, jpg, jpeg, png, webp, img, image_bytes, image/encoded, or paths in filepath,
    file_path, image_path, path, file_name, filename, file. Keys: key, __key__, uid; the path of an image file.
    Labels: label, cls, class_id.
    """
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="files, patterns or directories")
    parser.add_argument("--out", required=True, type=Path, metavar="D", help="directory of the dataset")
    parser.add_argument("--seed", type=_whole(0), default=0, help="order of the rows (default 0)")
    parser.add_argument(
        "--captions", type=_captions, default=(), metavar="[LANG=]NAME[,...]", help="columns or JSON keys"
    )
    parser.add_argument("--image", default="", metavar="NAME", help="column of the image or of its path")
    parser.add_argument("--key", default="", metavar="NAME", help="column of unique names of the rows")
    parser.add_argument("--label", default="", metavar="NAME", help="column of class numbers")
    parser.add_argument("--language", default="", metavar="NAME", help="column of the captions' language")
    parser.add_argument(
        "--images",
        default="",
        metavar="DIR",
        help="what paths are relative to (default: the table's directory)",
    )
    parser.add_argument("--append", action="store_true", help="add the rows of new sources to the dataset")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.index import index_dataset
        from lit_fast.embed.sources.items import Names

        names = Names(args.captions, args.image, args.key, args.label, args.language, args.images)
        index_dataset(args.source, args.out, seed=args.seed, names=names, append=args.append)

    return run


def embed(parser: argparse.ArgumentParser) -> Run:
    """Embed every image of a dataset once with a frozen vision tower.

    The same command again goes on where it was interrupted. Images that cannot be decoded keep their row
    and are marked invalid.
    """
    parser.add_argument("dataset", type=Path, metavar="D", help="a dataset made by lit-fast index")
    parser.add_argument("--tower", required=True, metavar="NAME|PATH", help="weights of the vision tower")
    parser.add_argument("--name", metavar="NAME", help="directory in D/features (default: the tower's name)")
    parser.add_argument(
        "--preprocess",
        metavar="NAME",
        help="pil-crop, pil-squash, hf-crop or tf-squash (default: the tower's own)",
    )
    parser.add_argument("--resolution", type=_whole(1), metavar="N", help="pixels (default: the tower's own)")
    parser.add_argument("--gelu", choices=("exact", "tanh", "quick"), help="default: the tower's own")
    parser.add_argument(
        "--pool", metavar="NAME", help="tok, gap, map or projection (default: the tower's own)"
    )
    parser.add_argument(
        "--reduced-decode",
        action="store_true",
        help="decode JPEGs much larger than needed at 1/2, 1/4 or 1/8",
    )
    parser.add_argument(
        "--views", type=_whole(1), default=1, metavar="K", help="vectors per image: itself and K - 1 crops"
    )
    parser.add_argument(
        "--batch-size", type=_whole(1), metavar="N", help="images per device (default 64, 16 on CPU)"
    )
    parser.add_argument("--workers", type=_whole(1), metavar="N", help="decoding threads (default: cores)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16"
    )
    parser.add_argument("--max-pixels", type=_whole(1), metavar="N", help="larger images are invalid")
    parser.add_argument(
        "--shard-of",
        type=_share,
        metavar="I/N",
        help="do share I of N only, I from 0 on (default: this process's of the JAX cluster's)",
    )

    def run(args: argparse.Namespace) -> None:
        from lit_fast.cli.options import enable_compilation_cache
        from lit_fast.data.images.decode import MAX_PIXELS
        from lit_fast.embed.extract import embed_dataset

        enable_compilation_cache()
        embed_dataset(
            args.dataset,
            args.tower,
            name=args.name,
            preprocess=args.preprocess,
            resolution=args.resolution,
            gelu=args.gelu,
            pool=args.pool,
            reduced_decode=args.reduced_decode,
            views=args.views,
            batch_size=args.batch_size,
            workers=args.workers,
            dtype=args.dtype,
            max_pixels=args.max_pixels or MAX_PIXELS,
            share=args.shard_of,
        )

    return run


def verify(parser: argparse.ArgumentParser) -> Run:
    """Check every stored byte of a dataset, and that its features are the tower's.

    Reads everything once: records, checksums, digests, and embeds a sample of the rows anew. One line per
    finding; exit status 0 only if everything is right, 1 if something is wrong.
    """
    parser.add_argument("dataset", type=Path, metavar="D", help="a dataset made by lit-fast index")
    parser.add_argument("--tower", metavar="NAME", help="these features only (default: all)")
    parser.add_argument(
        "--sample", type=_whole(0), default=64, metavar="N", help="rows to embed anew per tower (default 64)"
    )
    parser.add_argument("--repair", action="store_true", help="embed the shards with wrong features anew")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the findings to a file")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.verify.dataset import verify_dataset

        right = verify_dataset(
            args.dataset, tower=args.tower, sample=args.sample, repair=args.repair, out=args.json
        )
        if not right:
            raise SystemExit(1)

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
        "--pad-id", type=_whole(0), metavar="N", help="padding (default: end-of-sentence; SigLIP 2: 0)"
    )
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="of a new vocabulary"
    )

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.tokenize import tokenize_dataset

        tokenize_dataset(
            args.dataset,
            tokenizer=args.tokenizer,
            train_vocab=args.train_vocab,
            name=args.name,
            max_length=args.max_length,
            pad_id=args.pad_id,
            model_type=args.model_type,
        )

    return run


def import_features(parser: argparse.ArgumentParser) -> Run:
    """Make a dataset of features that another program has computed.

    clip-retrieval: SOURCE is the directory with img_emb/*.npy and, if there are any, metadata/*.parquet, whose
    captions and keys are taken. sail: SOURCE is the directory with 0.pt, 1.pt, ..., the images' features; they are
    read without unpickling.

    Rows keep the order of the files. Captions may come from a table with one row per row of features, in the same
    order. Nobody can tell from which model features are: --tower says it, and features of the same name and width
    count as the same tower's. The same command again goes on where it was interrupted.
    """
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory with the features")
    parser.add_argument("--out", required=True, type=Path, metavar="D", help="directory of the dataset")
    parser.add_argument("--tower", required=True, metavar="NAME", help="name of the model that made them")
    parser.add_argument(
        "--format", required=True, choices=("clip-retrieval", "sail"), help="how they were written"
    )
    parser.add_argument(
        "--captions-table", type=Path, metavar="FILE", help="captions: .csv, .tsv, .jsonl or .parquet"
    )
    parser.add_argument(
        "--captions", type=_captions, default=(), metavar="[LANG=]NAME[,...]", help="columns with captions"
    )

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.importers.import_features import import_features
        from lit_fast.embed.sources.items import Names

        names = Names(args.captions)
        import_features(
            args.source, args.out, args.tower, args.format, table=args.captions_table, names=names
        )

    return run


def _whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return whole_number


def _captions(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [part.rpartition("=")[::2] for part in text.split(",")]
    if not all(name for _, name in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like title or en=caption,de=caption_de")
    return tuple((language, name) for language, name in pairs)


def _share(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0/4")
    return int(number), int(count)
