"""Arguments of `index`, `embed`, `tokenize`, `verify` and `import-features`.

A command imports its implementation when it runs, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], None]


def index(parser: argparse.ArgumentParser) -> Run:
    """Write the index of a dataset: its rows of images and captions, in their order.

    SOURCE is a tar, parquet, array_record or table file, a directory or a pattern, local or at https://, s3://,
    gs:// or hf://: 'train/*.tar', 's3://bucket/{00000..00099}.parquet', captions.csv, imagenet/val,
    annotations/captions_val2017.json, 'hf://datasets/OWNER/NAME/*.parquet'.
    Images are not copied: sources must stay where they are. Rows are shuffled once, by the seed; their order
    never changes.

    A table is a .csv, .tsv or .jsonl file; a .json file is read as COCO's captions. A directory holds files of one
    format, or one folder of images per class. Rows of a table with the same image file become one row with all
    captions, if they are near each other; later repeats, and any repeated key, are skipped and counted.
    noise:1024 is 1024 images of uniform random noise, for the key stream.noise of a training.

    CLIP_benchmark's evaluation sets: the directory or URL/ of one, or wds:NAME, which is downloaded from the
    Hugging Face Hub: wds:imagenet1k, wds:imagenetv2, wds:vtab/cifar10, wds:mscoco_captions, ...

    Names of columns are guessed. Captions: captions, caption, title, text, txt, sentences, raw, alt_text,
    captions/text. Images: image, jpg, jpeg, png, webp, img, image_bytes, image/encoded, or paths in filepath,
    file_path, image_path, path, file_name, filename, file. Keys: key, __key__, uid; the path of an image file.
    Labels: label, cls, class_id.

    Example: lit-fast index 'cc12m/*.tar' --out cc12m_dataset
    """
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="files, patterns, directories, URLs, wds:NAME or noise:N")
    add("--out", required=True, metavar="D", help="directory of the dataset")
    add(
        "--seed",
        type=_whole(0),
        default=0,
        metavar="N",
        help="seed of the order of the rows (default 0); --append keeps it",
    )
    add("--captions", type=_captions, default=(), metavar="[LANG=]NAME[,...]", help="columns of captions")
    add("--image", default="", metavar="NAME", help="column of the image bytes or of the path")
    add("--key", default="", metavar="NAME", help="column of unique names of the rows")
    add("--label", default="", metavar="NAME", help="column of class numbers")
    add("--language", default="", metavar="NAME", help="column of the captions' language")
    add(
        "--images",
        default="",
        metavar="DIR",
        help="directory that image paths are relative to (default: the table's)",
    )
    add("--append", action="store_true", help="add the rows of new sources to the dataset")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.index import index_dataset
        from lit_fast.embed.sources.interface import Columns

        options = Columns(args.captions, args.image, args.key, args.label, args.language, args.images)
        index_dataset(args.source, args.out, seed=args.seed, options=options, append=args.append)

    return run


def embed(parser: argparse.ArgumentParser) -> Run:
    """Embed every image of a dataset once with a frozen vision tower.

    If the command is interrupted, the same command continues. Images that cannot be decoded keep their row
    and are marked invalid.

    NAME is one of lit-fast towers, augreg/NAME, timm:NAME, open_clip:NAME/PRETRAINED or hf:OWNER/NAME. Models that
    lit-fast has no code for run through PyTorch's, as one JAX program: pip install 'lit-fast[torch]'.

    Example: lit-fast embed cc12m_dataset --tower augreg/B_8
    """
    add = parser.add_argument
    add("dataset", metavar="D", help="a dataset made by lit-fast index")
    add("--tower", required=True, metavar="NAME|PATH", help="weights of the vision tower")
    add("--name", metavar="NAME", help="directory in D/features (default: the tower's name)")
    methods = "pil-crop, pil-squash, hf-crop or tf-squash"
    add("--preprocess", metavar="NAME", help=f"{methods} (default: the tower's own)")
    add("--resolution", type=_whole(1), metavar="N", help="side in pixels (default: the tower's own)")
    add("--gelu", choices=("exact", "tanh", "quick"), help="form of the GELU (default: the tower's own)")
    add("--pool", metavar="NAME", help="tok, gap, map or projection (default: the tower's own)")
    add(
        "--backend",
        choices=("jax", "torch"),
        help="default: lit-fast's own model in JAX if it has one, else torch",
    )
    add(
        "--arch",
        metavar="NAME",
        help="of FILE.safetensors without config.json: a name of timm or open_clip:NAME",
    )
    add("--reduced-decode", action="store_true", help="decode large JPEGs at 1/2, 1/4 or 1/8 of their size")
    add("--views", type=_whole(1), default=1, metavar="K", help="vectors per image: itself and K - 1 crops")
    add("--batch-size", type=_whole(1), metavar="N", help="images per device (default 64, 16 on CPU)")
    add("--workers", type=_whole(1), metavar="N", help="decoding threads (default: one per core)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16")
    add(
        "--max-pixels", type=_whole(1), metavar="N", help="mark larger images as invalid (default 64 000 000)"
    )
    share = "embed share I of N only, I from 0 on (default: that of this process in the JAX cluster)"
    add("--shard-of", type=_share, metavar="I/N", help=share)

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
            backend=args.backend,
            arch=args.arch,
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
    """Check every stored byte of a dataset, and its features against the tower.

    Reads everything once: records, checksums, digests; and embeds a sample of the rows again. Prints one line per
    finding. Exit status 0 if everything is right, 1 if something is wrong.

    Example: lit-fast verify cc12m_dataset
    """
    add = parser.add_argument
    add("dataset", metavar="D", help="a dataset made by lit-fast index")
    add("--tower", metavar="NAME", help="check these features only (default: all)")
    add(
        "--sample", type=_whole(0), default=64, metavar="N", help="rows to embed again per tower (default 64)"
    )
    add("--repair", action="store_true", help="embed the shards with wrong features again")
    add("--json", metavar="OUT", help="write the findings to a file")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.verify.dataset import verify_dataset

        is_right = verify_dataset(
            args.dataset, tower=args.tower, sample=args.sample, repair=args.repair, out=args.json
        )
        if not is_right:
            raise SystemExit(1)

    return run


def tokenize(parser: argparse.ArgumentParser) -> Run:
    """Turn the captions of a dataset into token ids, with a given or a new vocabulary.

    Example: lit-fast tokenize cc12m_dataset --train-vocab 32000
    """
    add = parser.add_argument
    add("dataset", metavar="D", help="a dataset made by lit-fast index")
    model = parser.add_mutually_exclusive_group(required=True).add_argument
    model("--tokenizer", metavar="FILE.model", help="a SentencePiece model, or that of hf:OWNER/NAME")
    model(
        "--train-vocab", type=_whole(1), metavar="N", help="train a new model with N pieces on the captions"
    )
    add("--name", default="", metavar="NAME", help="directory in D/tokens (default: the model's name)")
    add("--max-length", type=_whole(1), default=16, metavar="N", help="token ids per caption (default 16)")
    add("--pad-id", type=_whole(0), metavar="N", help="padding (default: end-of-sentence; SigLIP 2: 0)")
    add(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="of a new model (default unigram)"
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

    clip-retrieval: SOURCE is the directory with img_emb/*.npy and optionally metadata/*.parquet, which has the
    captions and keys. sail: SOURCE is the directory with 0.pt, 1.pt, ..., the features of the images; PyTorch must be
    installed, and nothing is unpickled.

    Rows keep the order of the files. Captions may come from a table with one row per row of features, in the same
    order. The model of the features cannot be checked: --tower names it, and features of the same name and width
    count as the same tower's. If the command is interrupted, the same command continues.

    Example: lit-fast import-features laion_b32 --out laion --tower clip_b32 --format clip-retrieval
    """
    add = parser.add_argument
    add("source", metavar="SOURCE", help="directory with the features")
    add("--out", required=True, metavar="D", help="directory of the dataset")
    add("--tower", required=True, metavar="NAME", help="name of the model that made them")
    add("--format", required=True, choices=("clip-retrieval", "sail"), help="program that wrote them")
    add("--captions-table", metavar="FILE", help="table with captions: .csv, .tsv, .jsonl or .parquet")
    add("--captions", type=_captions, default=(), metavar="[LANG=]NAME[,...]", help="columns of captions")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.importers.import_features import import_features
        from lit_fast.embed.sources.interface import Columns

        options = Columns(args.captions)
        import_features(
            args.source, args.out, args.tower, args.format, table=args.captions_table, options=options
        )

    return run


def _whole(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
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
