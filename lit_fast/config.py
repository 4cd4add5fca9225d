"""The configuration of a run: TOML file -> frozen dataclasses -> command-line overrides."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from lit_fast.errors import UserError
from lit_fast.models.sizes import VARIANTS, Shape


@dataclass(frozen=True)
class TextConfig:
    """The text tower; vocabulary and length come from the tokens, the output width from the features."""

    variant: str = "B"  # letter of lit_fast.models.sizes.VARIANTS
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
    # device has room for (train/cost/memory.py).
    keep: str = "auto"
    microbatches: int = 1
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
        """What `lit_fast.models.transformer.Encoder` is told to keep.

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
    shuffle_streams: int = 64  # larger ones: virtual streams that a batch is dealt from
    shuffle_window_blocks: int = 8  # blocks of 1024 rows that a stream shuffles together
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


# Which values of a configuration make sense, and which only together.


_CHOICES = {
    "text.variant": tuple(VARIANTS),
    "text.keep": ("auto", "everything", "products", "hidden", "inputs", "embeddings"),
    "text.pooling": ("last", "first", "mean", "max", "map"),
    "text.dtype": ("float32", "bfloat16"),
    "loss.name": ("sigmoid", "softmax"),
    "loss.same_image": ("positive", "mask"),
    "loss.same_caption": ("negative", "mask"),
    "loss.negatives": ("all", "random", "hardest", "easiest"),
    "loss.precision": ("default", "high", "highest"),
    "optimizer.name": ("lion", "adam", "adafactor"),
    "optimizer.schedule": ("cosine", "linear", "rsqrt"),
    "optimizer.momentum_dtype": ("float32", "bfloat16"),
    "optimizer.weight_decay_convention": ("paper", "optax"),
}
_AT_LEAST_ONE = (
    "steps", "text.microbatches", "text.pack", "loss.tile", "stream.global_batch", "stream.captions_per_image",
    "stream.shuffle_streams", "stream.shuffle_window_blocks", "optimizer.timescale",
    "checkpoint.every_steps", "checkpoint.keep",
    "log.every_steps", "plan.vocab_size",
)  # fmt: skip


def check_values(config: Config, values: dict[str, Any]) -> None:
    """Refuse what makes no sense; `values` are those of `config` by dotted name.

    Raises:
      UserError: in one line, with the key.
    """
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config key {key} must be one of {', '.join(choices)}, not {values[key]!r}")
    for key in _AT_LEAST_ONE:
        if values[key] < 1:
            raise UserError(f"config key {key} must be at least 1, not {values[key]}")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config key {key} must be a finite number, not {value}")
        if isinstance(value, int | float) and value < 0 and key != "loss.bias_init":
            raise UserError(f"config key {key} must not be negative, not {value}")
    for key, bound in {"steps": 2**31, "seed": 2**32 - 1, "stream.global_batch": 2**31}.items():
        if values[key] >= bound:
            raise UserError(f"config key {key} must be below {bound}, not {values[key]}")
    if values["plan.max_length"] < 2:
        raise UserError(f"config key plan.max_length must be at least 2, not {values['plan.max_length']}")
    for key in ("text.dropout", "optimizer.b1", "optimizer.b2", "optimizer.average_decay"):
        if values[key] >= 1:
            raise UserError(f"config key {key} must be below 1, not {values[key]}")
    for key in ("stream.corrupt_images", "stream.corrupt_texts", "stream.corrupt_alignment"):
        if values[key] > 1:
            raise UserError(f"config key {key} must be at most 1, not {values[key]}")
    if bool(config.stream.noise) != bool(config.stream.corrupt_images):
        raise UserError(
            "stream.corrupt_images above 0 and stream.noise go together: the noise is a dataset made with lit-fast "
            "index noise:1024 --out N, then lit-fast embed N with the tower of the run"
        )
    _check_loss(config.loss)
    shape = config.text.shape
    if config.text.keep == "auto" and config.text.microbatches > 1:
        raise UserError(
            'text.microbatches is chosen by text.keep = "auto"; leave it out, or set text.keep = "products"'
        )
    if config.text.pack > 1 and config.text.dropout and not config.text.mask_padding:
        raise UserError("text.pack with text.dropout needs text.mask_padding = true")
    if config.text.row_tokens and not config.text.packed:
        raise UserError("text.row_tokens needs text.pack above 1 and text.mask_padding = true")
    if shape.width % shape.heads:
        raise UserError(f"text.width {shape.width} is not a multiple of text.heads {shape.heads}")
    for key in ("warmup_steps", "cooldown_steps"):
        if getattr(config.optimizer, key) >= config.steps > 1:
            raise UserError(
                f"optimizer.{key} {getattr(config.optimizer, key)} must be below steps {config.steps}"
            )


def _check_loss(loss: LossConfig) -> None:
    if loss.temperature_init <= 0:
        raise UserError("config key loss.temperature_init must be positive")
    if 0 < loss.temperature_max < loss.temperature_init:
        raise UserError(
            f"loss.temperature_init {loss.temperature_init} is above loss.temperature_max {loss.temperature_max}"
        )
    if loss.bias_init != type(loss).bias_init and (loss.name == "softmax" or not loss.bias):
        reason = 'loss.name = "softmax"' if loss.name == "softmax" else "loss.bias = false"
        raise UserError(f"with {reason} there is no bias; leave out loss.bias_init")
    if loss.negatives == "all":
        if loss.negatives_per_positive:
            raise UserError(
                'loss.negatives_per_positive needs loss.negatives = "random", "hardest" or "easiest"'
            )
    elif loss.name == "softmax":
        raise UserError(f'loss.negatives = "{loss.negatives}" is for the sigmoid loss, not for softmax')
    elif not loss.negatives_per_positive:
        raise UserError(
            f'loss.negatives = "{loss.negatives}" needs loss.negatives_per_positive above 0, such as 1.6'
        )
