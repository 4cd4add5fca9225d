"""Arguments of `index`, `embed`, `tokenize`, `verify` and `import-features`.

A command imports its implementation when it runs, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

Run = Callable[[argparse.Namespace], None]


def index(parser: argparse.ArgumentParser) -> Run:
    """Create a dataset: an index of images and captions, with a fixed order of rows.

    SOURCE is a tar, parquet, tfrecord, array_record or table file, a directory or a pattern, local or at https://,
    s3://, gs://, hf:// or another protocol of fsspec, such as az:// (a URL of a directory ends with /):
    'train/*.tar', 's3://bucket/{00000..00099}.parquet', captions.csv, imagenet/val,
    annotations/captions_val2017.json, 'hf://datasets/OWNER/NAME/*.parquet'.
    Images are not copied: sources must stay where they are, unchanged. After they have moved, --relocate connects
    the dataset to them again. Rows are shuffled once, by the seed; their order never changes.

    In a tar, files whose names are equal up to the last dot are one row; the last file of a name counts.
    A table is a .csv, .tsv, .txt or .jsonl file, also with .gz. Its separator (comma, tab, ; or |) and its encoding
    are found; a table separated by tabs or | may have stray quotes, in others a quote that does not close is an
    error. A .json file is COCO's captions, Karpathy's splits (dataset_coco.json with --split train+restval) or a
    list of objects. A directory holds files of one format, images with x.txt or x.json beside x.jpg (img2dataset's
    `files`), or one folder of images per class.
    Rows of a table with the same image file become one row with all captions, if they are near each other; later
    repeats, and any repeated key, are skipped and counted.
    Hidden files and leftovers of other programs (__MACOSX, Thumbs.db, @eaDir, ...) are skipped.
    Folders named by ImageNet's WordNet ids (n01440764) get its class names and the 80 prompt templates.
    noise:1024 is 1024 images of uniform random noise, for the key stream.noise of a training.

    CLIP_benchmark's evaluation sets: the directory or URL/ of one, or wds:NAME, which is downloaded from the
    Hugging Face Hub: wds:imagenet1k, wds:imagenetv2, wds:vtab/cifar10, wds:mscoco_captions, ...

    Columns that no option names are guessed by name, and the guess is printed. --captions '', --key '' and --label ''
    use none. Captions: captions, caption, title, text, txt, sentences, raw, alt_text, captions/text, sentence, comment,
    description, alt, or several like caption_0. Images: image, jpg, jpeg, png, webp, img, image_bytes, image/encoded,
    or paths in filepath, file_path, image_path, path, file_name, filename, file, image_name and the like. Keys: key,
    __key__, uid; the path of an image file. Labels: label, cls, class_id, class. A field of a field has a dotted name:
    --captions sentences.raw. A cell may hold a list of captions, as JSON or as Python prints it.

    Example: lit-fast index 'cc12m/*.tar' --out cc12m_dataset
    Example: lit-fast index --relocate /old/cc12m=s3://bucket/cc12m cc12m_dataset
    """
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="files, patterns, directories, URLs, wds:NAME or noise:N")
    add("--out", metavar="D", help="directory of the dataset")
    add(
        "--seed",
        type=_whole(0),
        default=0,
        metavar="N",
        help="seed of the order of the rows (default 0); --append keeps it",
    )
    add("--captions", type=_captions, metavar="[LANG=]NAME[,...]", help="columns of captions")
    add("--image", type=_name, metavar="NAME", help="column of the image bytes or of the path")
    add("--key", metavar="NAME", help="column of unique names of the rows")
    add("--label", metavar="NAME", help="column of class numbers")
    add("--language", metavar="NAME", help="column of the captions' language")
    add(
        "--images",
        default="",
        metavar="DIR",
        help="directory that image paths are relative to (default: the table's)",
    )
    add(
        "--classnames",
        metavar="FILE",
        help="names of the classes: one per line, or a folder's name, a tab and the class name; '' keeps the sources'",
    )
    add(
        "--templates",
        metavar="FILE",
        help="prompt templates, one per line with {c} for the name; '' for none",
    )
    add(
        "--split",
        type=_split,
        metavar="NAME[+NAME...]",
        help="only rows with these values in `split`",
    )
    add("--append", action="store_true", help="add the rows of new sources to the dataset")
    add(
        "--relocate",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="the sources of the dataset SOURCE have moved from OLD to NEW, paths or URLs of files or directories; can "
        "be given several times",
    )

    return partial(_index, parser)


def _index(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.relocate:
        if len(args.source) > 1 or args.out or args.append:
            parser.error("--relocate takes one dataset and no --out: lit-fast index --relocate OLD=NEW D")
        from lit_fast.embed.relocate import relocate_sources

        relocate_sources(args.source[0], args.relocate)
        return
    if not args.out:
        parser.error("the following arguments are required: --out")
    from lit_fast.embed.class_names import ClassOptions
    from lit_fast.embed.index import index_dataset
    from lit_fast.embed.sources.interface import Columns

    given = {role: getattr(args, role) for role in ("captions", "key", "label", "language")}
    options = Columns(
        **{role: value for role, value in given.items() if value},
        image=args.image or "",
        images=args.images,
        split=args.split or "",
        declined=tuple(role for role, value in given.items() if value is not None and not value),
    )
    classes = ClassOptions(args.classnames, args.templates)
    index_dataset(args.source, args.out, seed=args.seed, options=options, append=args.append, classes=classes)


def embed(parser: argparse.ArgumentParser) -> Run:
    """Embed every image of a dataset once with a frozen vision tower.

    If the command is interrupted, the same command continues. Images that cannot be decoded keep their row
    and are marked invalid. Several machines may embed a dataset in a bucket: run the same command on each.

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
        help="architecture of a FILE.safetensors without config.json: a name of timm, or open_clip:NAME",
    )
    add("--reduced-decode", action="store_true", help="decode large JPEGs at 1/2, 1/4 or 1/8 of their size")
    add("--views", type=_whole(1), default=1, metavar="K", help="vectors per image: itself and K - 1 crops")
    add("--batch-size", type=_whole(1), metavar="N", help="images per device (default 64, 16 on CPU)")
    add("--workers", type=_whole(1), metavar="N", help="decoding threads (default: one per core)")
    add(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where the processor multiplies it"
    )
    add(
        "--max-pixels", type=_whole(1), metavar="N", help="mark larger images as invalid (default 64 000 000)"
    )
    share = "embed share I of N only, I from 0 on (default: that of this process in the JAX cluster)"
    add("--shard-of", type=_share, metavar="I/N", help=share)
    scratch = "local directory for unfinished shards of a dataset in a bucket (default: the cache)"
    add("--scratch", default="", metavar="DIR", help=scratch)

    def run(args: argparse.Namespace) -> None:
        from lit_fast.cli.options import reuse_memory, start_jax
        from lit_fast.data.images.decode import MAX_PIXELS
        from lit_fast.embed.extract import embed_dataset
        from lit_fast.runtime import process_rank

        rank = process_rank()
        reuse_memory()
        start_jax()
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
            share=args.shard_of or (None if rank == (0, 1) else rank),
            scratch=args.scratch,
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
    """Convert the captions of a dataset to token ids, with a given or a new vocabulary.

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
    add(
        "--pad-id",
        type=_whole(0),
        metavar="N",
        help="token id of padding (default: end-of-sentence; SigLIP 2: 0)",
    )
    add(
        "--model-type",
        choices=("unigram", "bpe"),
        default="unigram",
        help="kind of a new model (default unigram)",
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
    """Create a dataset from features that another program computed.

    SOURCE is .npy, .safetensors, parquet or .pt files, a directory or a pattern of them, or a URL of parquet files:
    features.npy, 'parts/*.safetensors', 'hf://datasets/OWNER/NAME/*.parquet'; or the directory that clip-retrieval
    wrote: img_emb/*.npy and optionally metadata/*.parquet, which has the captions and keys. A file holds an array of
    floats [n, width]; a parquet file has them in a column of lists, beside those of captions and keys. .pt files need
    PyTorch; nothing is unpickled.

    Rows keep the order of the files, sorted by the numbers in their names. Captions and keys may come from a table
    or dataset with one row per row of features, in the same order. A row without a key is named after its file and
    number. --captions '' and --key '' use none.
    Vectors that are zero, not finite or missing are marked invalid and counted; repeated keys are left out and
    counted. The model of the features cannot be checked: --tower names it, and features of the same name and width
    count as the same tower's. If the command is interrupted, the same command continues.

    In Python, lit_fast.embed.import_rows makes a dataset of vectors from any encoder.

    Example: lit-fast import-features laion_b32 --out laion --tower clip_b32
    """
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="files, directories, patterns or URLs with the features")
    add("--out", required=True, metavar="D", help="directory of the dataset")
    add("--tower", required=True, metavar="NAME", help="name of the model that computed the features")
    formats = ("clip-retrieval", "npy", "safetensors", "parquet", "sail")
    add("--format", default="", choices=formats, help="default: by the names of the files")
    add(
        "--features",
        default="",
        metavar="NAME",
        help="column or tensor with the features, if there are several candidates",
    )
    add(
        "--captions-table",
        metavar="FILE",
        help="captions: a .csv, .tsv, .jsonl or .parquet file, a pattern, or a dataset",
    )
    add("--captions", type=_captions, metavar="[LANG=]NAME[,...]", help="columns of captions")
    add("--key", metavar="NAME", help="column of unique names of the rows")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.embed.importers.import_features import import_features
        from lit_fast.embed.sources.interface import Columns

        declined = tuple(n for n in ("captions", "key") if getattr(args, n) in ((), ""))
        options = Columns(args.captions or (), key=args.key or "", declined=declined)
        import_features(
            args.source,
            args.out,
            args.tower,
            args.format,
            features=args.features,
            table=args.captions_table,
            options=options,
        )

    return run


def _whole(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return whole_number


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("every row needs an image; name its column, or leave the option out")
    return text


def _split(text: str) -> str:
    if not all(text.split("+")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like train or train+restval")
    return text


def _captions(text: str) -> tuple[tuple[str, str], ...]:
    if not text:
        return ()
    pairs = [part.rpartition("=")[::2] for part in text.split(",")]
    if not all(name for _, name in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like title or en=caption,de=caption_de")
    return tuple((language, name) for language, name in pairs)


def _share(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0/4")
    return int(number), int(count)
