"""The configuration of a run: TOML file -> frozen dataclasses -> command-line overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from lit_fast.config_checks import check_values
from lit_fast.errors import UserError
from lit_fast.variants import VARIANTS, Shape


@dataclass(frozen=True)
class TextConfig:
    """The text tower; vocabulary and length come from the tokens, the output width from the features."""

    variant: str = "B"  # letter of lit_fast.variants.VARIANTS
    width: int = 0  # 0: as the variant says; likewise below
    depth: int = 0
    mlp_dim: int = 0
    heads: int = 0
    pooling: str = "last"  # or "first", "mean", "max", "map" (attention pooling)
    mask_padding: bool = False  # hide padding from attention and pooling; the paper attends to it
    embedding_width: int = 0  # of the token table, projected to width; 0: as wide. 96 suits 250 000 pieces
    head: bool = True  # projection to the features' width; false: none, text and features are equally wide
    # A text tower of SigLIP or big_vision to start from: FILE.npz:txt, a directory with model.safetensors, or a
    # name like hf:OWNER/NAME. The keys above must describe it. With its head come its temperature and bias.
    init: str = ""
    dropout: float = 0.0
    dtype: str = "bfloat16"  # of the matrix products; parameters stay float32
    # Memory. A device works through its texts in equal parts. For the backward pass the layers keep "everything",
    # their matrix "products", of these the "hidden" ones of the MLP, or their "inputs" alone; or a part keeps its
    # "embeddings" alone. The rest is worked out again: 0, 0, 9, 22 or 33 % more work. The less is kept, the larger
    # the batch; with "embeddings" it hardly takes memory. "auto" chooses both keys, the fastest way that the
    # device has room for (train/memory.py).
    keep: str = "auto"
    parts: int = 1
    # Captions that share a row of the encoder, side by side, none seeing the others: fewer, larger products. With
    # mask_padding they lie there by their true lengths, so that hardly any padding is worked on; the loss is the same.
    pack: int = 1
    row_tokens: int = 0  # of a row by true lengths; 0: what the captions of the dataset need

    @property
    def packed(self) -> bool:
        """Whether rows hold several captions by their true lengths."""
        return self.pack > 1 and self.mask_padding

    @property
    def layers_keep(self) -> str:
        """What `lit_fast.transformer.Encoder` is told to keep.

        A part that is worked out again keeps its layers' products while it is in hand.
        """
        return {"embeddings": "products", "auto": "everything"}.get(self.keep, self.keep)

    @property
    def shape(self) -> Shape:
        """Variant with the overrides applied."""
        base = VARIANTS[self.variant]
        width = self.width or base.width
        # A changed width keeps the variant's proportions unless told otherwise.
        mlp_dim = self.mlp_dim or (4 * width if self.width else base.mlp_dim)
        heads = self.heads or (max(1, width // 64) if self.width else base.heads)
        return Shape(width, self.depth or base.depth, mlp_dim, heads)


@dataclass(frozen=True)
class LossConfig:
    """The loss over all pairs of a batch."""

    name: str = "sigmoid"  # or "softmax" (CLIP, LiT), which has no bias
    temperature_init: float = 10.0
    temperature_max: float = 0.0  # the temperature is cut down to it after each update; 0: no limit
    bias: bool = True  # add a learnt bias to the logits of the sigmoid loss
    bias_init: float = -10.0
    center: bool = False  # subtract the dataset's mean feature before normalising; helps small sets
    # A linear map of the image features, width x width, trained too; it begins as the identity, so that the run
    # begins as one without it and the cosines between the features are kept.
    image_head: bool = False
    # Pairs of one dataset row at two places of a batch: "positive", or "mask": left out. Several captions at
    # one place are positives of their image either way.
    same_image: str = "positive"
    # A text that equals, id by id, one of the captions that another image came with: "negative", or "mask".
    same_caption: str = "negative"
    # The negatives that count: "all", or a number of them per text, "random", "hardest" or "easiest" (section 4.8
    # of the paper, where the hardest lose least). Its "matched pairs" need no key of their own: raise `steps` by
    # the factor by which the pairs become fewer.
    negatives: str = "all"
    negatives_per_positive: float = 0.0  # the paper's strongest masking: 1.6
    tile: int = 512  # images of one tile of pairs, by twice as many texts; memory is that of a few tiles
    # Of the similarity products: default, high or highest. At temperature 100 a cosine's error of 1e-3 is 0.1
    # in a logit. "high" is three bfloat16 passes on TPU, exact on CPU; on GPUs it may mean TF32: take "highest".
    precision: str = "high"


@dataclass(frozen=True)
class StreamConfig:
    """What a batch is made of."""

    global_batch: int = 32_768  # images per step, over all devices
    captions_per_image: int = 1  # texts per image and step, all of them positives of the image
    memory_gib: float = 4.0  # a dataset up to this size is held in memory and shuffled exactly
    streams: int = 64  # larger ones: virtual streams that a batch is dealt from
    window_blocks: int = 8  # blocks of 1024 rows that a stream shuffles together
    # Corrupted data, to see how well a loss bears it (section 4.10 of the paper). Probabilities of an image
    # becoming noise and of a text becoming random tokens, and the share of a batch whose texts change places.
    corrupt_images: float = 0.0
    corrupt_texts: float = 0.0
    corrupt_alignment: float = 0.0
    noise: str = ""  # dataset of the noise: lit-fast index noise:1024, embedded by the same tower


@dataclass(frozen=True)
class OptimizerConfig:
    """Clipping, the optimizer, decoupled weight decay, warm-up and decay of the learning rate."""

    name: str = "lion"  # or "adam", "adafactor" (ScalingViT-Adafactor: b2 caps the second moment's decay)
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.99
    momentum_dtype: str = "float32"
    weight_decay: float = 1e-7
    # "paper": scaled by the schedule alone, as in big_vision and the paper; "optax": also by learning_rate.
    weight_decay_convention: str = "paper"
    clip_norm: float = 1.0  # global norm of the gradients; 0: off
    average_decay: float = 0.0  # of an average of the weights that is kept and evaluated beside them; 0: none
    schedule: str = "cosine"  # to zero, or "linear", or "rsqrt" with timescale and cooldown_steps
    warmup_steps: int = 6_500
    cooldown_steps: int = 0  # linear to zero at the end, on top of the schedule
    timescale: int = 10_000  # steps, of rsqrt
    # Rules on the parameters' names, REGEX=FACTOR; the first that matches counts, and each must match.
    learning_rate_scale: tuple[str, ...] = ()
    weight_decay_scale: tuple[str, ...] = ("(.*/)?kernel=1",)  # what no rule matches does not decay
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training, and after the last step; image work was done when the sets were embedded.

    The intervals may be combined; 0: none.
    """

    every_steps: int = 0
    every_examples: int = 0  # images seen
    every_share: float = 0.0  # of the run: 0.1 evaluates ten times
    zero_shot: tuple[str, ...] = ()  # datasets
    retrieval: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save; the last step is always saved."""

    every_steps: int = 1_000
    keep: int = 2  # the last ones
    keep_every: int = 0  # and every so many steps, for good; 0: none
    best: str = ""  # and the best by a figure of the evaluation, such as "dev/image_retrieval_recall@1"


@dataclass(frozen=True)
class LogConfig:
    """Metrics."""

    every_steps: int = 50
    wandb: str = ""  # a project of Weights & Biases to send them to as well; empty: none


@dataclass(frozen=True)
class PlanConfig:
    """What `lit-fast plan` assumes of data that are not here; a dataset's own figures take their place."""

    tower: str = "augreg/B_8"  # a name of `lit-fast towers`, or a plain ViT of 224 pixels such as "g/14"
    vocab_size: int = 32_000
    max_length: int = 16  # tokens
    caption_tokens: float = 0.0  # true length on average, which text.pack may go by; 0: max_length
    rows: int = 0  # of the dataset; 0: not known


@dataclass(frozen=True)
class Config:
    """A run. Every field can be overridden on the command line: `--optimizer.learning_rate 3e-4`."""

    dataset: str = ""  # directory with features and tokens
    tower: str = ""  # name of the features; empty: the only ones there are
    tokenizer: str = ""  # name of the tokens; empty: the only ones there are
    steps: int = 65_000
    examples: int = 0  # images to see; if not 0, steps = examples / stream.global_batch
    seed: int = 0
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


# What may change between the parts of one run: it does not touch the parameters, or is known by identity.
FREE = (
    "evaluate",
    "checkpoint",
    "log",
    "plan",
    "dataset",
    "tower",
    "tokenizer",
    "stream.noise",
    "text.row_tokens",
)

# Keys of earlier versions, and what to do instead.
REMOVED = {
    "text.kept_parts": "text.keep says what is kept, and by itself chooses what the device has room for",
}


def load_config(path: Path, overrides: Sequence[str] = (), ignored: Collection[str] = ()) -> Config:
    """Read a TOML file and apply `--section.key value` overrides; `ignored` keys may stand in it.

    Raises:
      UserError: unreadable file, unknown key (the nearest known one is named), wrong type or value.
    """
    known = flatten(Config())
    given = _pairs(overrides, known)
    try:
        values = flatten_toml(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    values = {key: value for key, value in values.items() if key not in ignored}
    for key in values:
        _check_known(key, known, f"in {path}")
    for key, text in given:
        values[key] = _parse(key, text, known[key])
    return build_config(values, f"in {path}")


def build_config(values: dict[str, Any], where: str) -> Config:
    """The config of values by dotted name; `where` they stand is for messages.

    Raises:
      UserError: unknown key, wrong type or value.
    """
    known = flatten(Config())
    for key in values:
        _check_known(key, known, where)
    config = _build(Config, "", values)
    if config.examples > 0 and config.stream.global_batch > 0:
        config = dataclasses.replace(config, steps=max(1, config.examples // config.stream.global_batch))
    check_values(config, flatten(config))
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields by dotted name."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = value
    return out


def flatten_toml(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values of a parsed TOML file by dotted name, whether they are keys of a config or not."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flatten_toml(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, every field in it."""
    sections: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        # JSON's strings, numbers, booleans and lists of them are TOML's, once DEL is escaped as well.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        sections.setdefault(section, []).append(f"{name} = {text}")
    parts = [(f"[{section}]\n" if section else "") + "\n".join(lines) for section, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def _pairs(arguments: Sequence[str], known: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}; overrides are written --section.key value")
        key, equals, text = flag[2:].partition("=")
        _check_known(key, known, "on the command line")
        if not equals:
            if not rest:
                raise UserError(f"{flag} needs a value")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def _check_known(key: str, known: dict[str, Any], where: str) -> None:
    if key in known:
        return
    if key in REMOVED:
        raise UserError(f"config key {key} {where} is no more; leave it out: {REMOVED[key]}")
    # The last part alone often tells what was meant: "learning_rate" for "optimizer.learning_rate".
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]] or near
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown config key {key!r} {where}{hint}")


def _parse(key: str, text: str, default: Any) -> Any:
    """A command-line value in the type of the field's default; lists are separated by commas."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        return [part for part in text.split(",") if part]
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key} must be true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return int(text.replace("_", "")) if isinstance(default, int) else float(text)
    except (ValueError, OverflowError):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f"{key} must be {kind}, not {text!r}") from None


def _build(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(hint):
            out[f.name] = _build(hint, key + ".", values)  # type: ignore[arg-type]
        elif key in values:
            out[f.name] = _typed(key, values[key], hint)
    return cls(**out)


def _typed(key: str, value: Any, hint: Any) -> Any:
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if (
        isinstance(value, list)
        and all(isinstance(v, str) for v in value)
        and hint not in (int, float, bool, str)
    ):
        return tuple(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise UserError(f"config key {key} must be {names.get(hint, 'a list of strings')}, not {value!r}")
