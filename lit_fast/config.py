"""The configuration: frozen dataclasses; fields carry help, choices and bounds."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from lit_fast.models.sizes import VARIANTS, Shape

T = TypeVar("T")


def setting(default: T, help: str, *, choices: tuple[str, ...] = (), **bounds: float) -> T:
    """Declare a key of the configuration.

    Args:
      default: the value where no file and no flag sets it; its type is the type of the key.
      help: description for `--help` and docs/configuration.md.
      choices: the values of a string, besides the default; empty: any.
      bounds: minimum, above, maximum or below of a number; without one of them the minimum is 0.
    """
    return field(
        default=default, metadata={"help": help, "choices": choices, "bounds": bounds or {"minimum": 0}}
    )


@dataclass(frozen=True)
class TextConfig:
    """The text tower. Vocabulary and length come from the tokens, the output width from the features."""

    variant: str = setting("B", "size: width, depth, MLP width and heads of a ViT", choices=tuple(VARIANTS))
    width: int = setting(0, "model width; 0: that of the variant, otherwise MLP and heads scale with it")
    depth: int = setting(0, "number of layers; 0: that of the variant")
    mlp_dim: int = setting(0, "width of the MLP; 0: that of the variant")
    heads: int = setting(0, "number of attention heads; 0: that of the variant")
    pooling: str = setting(
        "last",
        "token that becomes the text embedding, or a reduction over tokens; map: attention pooling",
        choices=("last", "first", "mean", "max", "map"),
    )
    mask_padding: bool = setting(
        False, "exclude padding from attention and pooling; the paper attends to padding"
    )
    embedding_width: int = setting(
        0, "width of the token table, projected to the model width; 0: model width. 96 suits 250 000 pieces"
    )
    head: bool = setting(
        True, "project to the width of the features; false: text tower and features have the same width"
    )
    init: str = setting(
        "",
        "pretrained text tower of SigLIP, big_vision or open_clip: FILE.npz:txt, a directory with safetensors, or "
        "hf:OWNER/NAME. The keys above must describe it. Temperature and bias are loaded together with its head. Or a "
        "run, with its temperature, bias, mean and image head",
    )
    dropout: float = setting(0.0, "dropout rate", minimum=0, below=1)
    dtype: str = setting(
        "auto",
        "dtype of matrix products; parameters are float32. auto: bfloat16 on accelerators and on CPUs that multiply it "
        "(flags amx_bf16 or avx512_bf16), else float32; a run keeps what it started with",
        choices=("auto", "float32", "bfloat16"),
    )
    keep: str = setting(
        "auto",
        "remat policy: what is stored for the backward pass. products: the outputs of matrix products; hidden: the "
        "same without queries, keys and values; inputs: the inputs of layers; embeddings: only the embeddings of a "
        "microbatch. Recomputation adds about 1, 9, 22 or 33 % FLOPs, more with pack. auto: the first policy, in this "
        "order, whose step fits in device memory; it also sets microbatches",
        choices=("auto", "products", "hidden", "inputs", "embeddings"),
    )
    microbatches: int = setting(1, "equal parts in which a device embeds its texts", minimum=1)
    pack: int = setting(
        1,
        "captions per row of the encoder, masked from each other: fewer and larger matrix products, the same loss. "
        "With mask_padding, captions are packed by their true lengths, with little padding, and pack is about the mean",
        minimum=1,
    )
    row_tokens: int = setting(
        0,
        "tokens per row when captions are packed by true length; 0: near pack captions of mean length, above 64 a "
        "multiple of 128",
        minimum=0,
    )
    rows: int = setting(
        0,
        "rows of a step, of all devices, when captions are packed by true length; 0: as the dataset's captions require",
        minimum=0,
    )
    attention: str = setting(
        "auto",
        "attention of packed rows in training: XLA's form, or Pallas kernels for TPUs. auto: on a TPU the kernels, if "
        "they fit and agree with XLA's form on the first batch; else xla. pallas: without this comparison; on CPUs the "
        "kernels are interpreted, which is slow",
        choices=("auto", "xla", "pallas"),
    )

    @property
    def packed(self) -> bool:
        """Whether rows hold several captions by their true lengths."""
        return self.pack > 1 and self.mask_padding

    @property
    def shape(self) -> Shape:
        """The variant with the overrides applied; a changed width keeps the variant's proportions."""
        base = VARIANTS[self.variant]
        width = self.width or base.width
        mlp_dim = self.mlp_dim or (4 * width if self.width else base.mlp_dim)
        heads = self.heads or (max(1, width // 64) if self.width else base.heads)
        return Shape(width, self.depth or base.depth, mlp_dim, heads)


@dataclass(frozen=True)
class ImageConfig:
    """The image tower. Frozen: the features of the dataset are the images, and no other key here applies."""

    train: str = setting(
        "frozen",
        "frozen: train the text tower on stored features (SigLiT). unlocked: train a pretrained image tower too, on "
        "the dataset's images (SigLIP); by default with a tenth of the learning rate and without weight decay. "
        "scratch: train an image tower with random weights",
        choices=("frozen", "unlocked", "scratch"),
    )
    tower: str = setting(
        "",
        "image tower to start from, as in lit-fast embed --tower; empty: that of the dataset's features. scratch: "
        "only its architecture and preprocessing",
    )
    arch: str = setting("", "scratch: size and patch in pixels, such as B/16, instead of a tower")
    pool: str = setting(
        "",
        "pooling of the tokens; empty: the tower's own, with arch map",
        choices=("tok", "gap", "map", "projection"),
    )
    resolution: int = setting(0, "side of the images in pixels; 0: the tower's own, with arch 224")
    preprocess: str = setting(
        "",
        "resizing of the images; empty: the tower's own, with arch tf-squash",
        choices=("pil-crop", "pil-squash", "hf-crop", "tf-squash"),
    )
    gelu: str = setting(
        "",
        "form of the GELU; empty: the tower's own, with arch tanh",
        choices=("exact", "tanh", "quick"),
    )
    crop: bool = setting(False, "random-resized crops of the images, those of lit-fast embed --views")
    flip: bool = setting(False, "mirror half of the images; captions with left and right are then wrong")
    reduced_decode: bool = setting(
        False,
        "decode JPEGs much larger than needed at 1/2, 1/4 or 1/8 of their size, as lit-fast embed --reduced-decode; "
        "not with tf-squash",
    )
    workers: int = setting(0, "threads that decode images in each process; 0: one per core")
    dtype: str = setting(
        "auto",
        "dtype of matrix products; parameters are float32. auto: that of text.dtype",
        choices=("auto", "float32", "bfloat16"),
    )
    keep: str = setting(
        "auto",
        "remat policy of the image tower, see text.keep; auto also sets image.microbatches",
        choices=("auto", "products", "hidden", "inputs", "embeddings"),
    )
    microbatches: int = setting(1, "equal parts in which a device embeds its images", minimum=1)

    @property
    def trained(self) -> bool:
        """Whether the image tower is trained."""
        return self.train != "frozen"


@dataclass(frozen=True)
class LossConfig:
    """The loss over all image-text pairs of a batch."""

    name: str = setting(
        "sigmoid", "pairwise sigmoid loss, or softmax (CLIP, LiT)", choices=("sigmoid", "softmax")
    )
    temperature_init: float = setting(10.0, "initial temperature, the factor of the cosine", above=0)
    temperature_max: float = setting(
        0.0, "upper limit, applied to the temperature after each update; 0: no limit"
    )
    bias: bool = setting(True, "add a learned bias to the logits of the sigmoid loss")
    bias_init: float = setting(-10.0, "initial bias", minimum=-math.inf)
    center: bool = setting(
        False, "subtract the dataset's mean feature before normalizing; helps small datasets"
    )
    image_head: bool = setting(
        False, "train a linear map of the image features, width x width, initialized to the identity"
    )
    same_caption: str = setting(
        "negative",
        "texts that equal a caption of another image, id by id: negatives, or excluded (mask)",
        choices=("negative", "mask"),
    )
    near_duplicates: str = setting(
        "negative",
        "an image and a text of another image that is nearly the same: negatives, excluded (mask), or positives; for "
        "stream.neighbours",
        choices=("negative", "mask", "positive"),
    )
    near_duplicate_cosine: float = setting(
        0.95,
        "images are near-duplicates from this cosine of their features on, which are centered where center is true; "
        "the product of all features costs about as much as that of images and texts",
        minimum=-1,
        maximum=1,
    )
    negatives: str = setting(
        "all",
        "negative pairs in the sigmoid loss: all, or negatives_per_positive of them per text (section 4.8 of the "
        "SigLIP paper; for its matched-pairs setting raise steps by the factor by which the pairs decrease)",
        choices=("all", "random", "hardest", "easiest"),
    )
    negatives_per_positive: float = setting(
        0.0, "number of negatives per text; 1.6 is the paper's strongest masking"
    )
    tile: int = setting(
        0,
        "images per tile of pairs, with twice as many texts; memory is that of a few tiles. 0: 2048 on TPUs, 4096 on "
        "GPUs, 512 on CPUs",
        minimum=0,
    )
    precision: str = setting(
        "high",
        "precision of the similarity products. high: three bfloat16 passes on TPU, exact on CPU, possibly TF32 on GPU, "
        "where highest is advised: at temperature 100 an error of 1e-3 in a cosine is 0.1 in a logit",
        choices=("default", "high", "highest"),
    )


@dataclass(frozen=True)
class StreamConfig:
    """The batches: size, shuffling and corruption of the data."""

    global_batch: int = setting(32_768, "images per step over all devices", minimum=1, below=2**31)
    captions_per_image: int = setting(
        1, "texts per image and step, all of them positives of the image", minimum=1
    )
    memory_gib: float = setting(
        4.0,
        "largest dataset that is held in memory and shuffled exactly, GiB; larger ones are streamed, as are those that "
        "need more than three quarters of the machine's or container's memory",
    )
    shuffle_streams: int = setting(
        64, "streamed datasets: independent streams that contribute rows to each batch", minimum=1
    )
    shuffle_window_blocks: int = setting(
        8, "streamed datasets: blocks of 1024 rows that a stream shuffles together", minimum=1
    )
    neighbours: int = setting(
        0,
        "compose batches of groups of K to 2 K - 1 images that are near each other by their features: harder negatives "
        "(section 4.8 of the SigLIP paper). Every epoch has other groups. For datasets that are held in memory; the "
        "nearest images are searched once and stored with the features. 0: random batches",
        minimum=0,
        maximum=256,
    )
    corrupt_images: float = setting(
        0.0,
        "probability that an image is replaced by noise, to test robustness (section 4.10 of the SigLIP paper)",
        minimum=0,
        maximum=1,
    )
    corrupt_texts: float = setting(
        0.0, "probability that a text is replaced by random tokens", minimum=0, maximum=1
    )
    corrupt_alignment: float = setting(
        0.0, "share of the texts of a batch that are permuted", minimum=0, maximum=1
    )
    noise: str = setting(
        "", "dataset with the noise: lit-fast index noise:1024, embedded with the tower of the run"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Gradient clipping, optimizer, decoupled weight decay and learning-rate schedule."""

    name: str = setting(
        "lion",
        "optimizer. adafactor: that of Scaling Vision Transformers, with b2 as upper limit of its decay. adamw, muon, "
        "schedule_free: those of optax. muon orthogonalizes the kernels of each layer, scaled to Adam's update, and "
        "uses Adam for all other parameters; b1 is the momentum of both, usually 0.95. schedule_free is AdamW with a "
        "running average of the weights instead of a decay, interpolation b1; it needs schedule = constant. The "
        "average is evaluated, saved and exported",
        choices=("lion", "adam", "adafactor", "adamw", "muon", "schedule_free"),
    )
    learning_rate: float = setting(1e-4, "peak learning rate")
    b1: float = setting(0.9, "decay rate of the first moment", minimum=0, below=1)
    b2: float = setting(0.99, "decay rate of the second moment; in Lion of the momentum", minimum=0, below=1)
    momentum_dtype: str = setting(
        "float32", "dtype of the first moment or momentum", choices=("float32", "bfloat16")
    )
    weight_decay: float = setting(
        1e-7,
        "decoupled weight decay. The default is the paper's for Lion; by the convention of optax, where 1e-3 to 1e-1 "
        "are usual, it has hardly any effect",
    )
    weight_decay_convention: str = setting(
        "auto",
        "paper: decay is scaled by the schedule only, as in big_vision; optax: also by learning_rate, as in optax and "
        "PyTorch; auto: optax for adamw, muon and schedule_free, paper for the others",
        choices=("auto", "paper", "optax"),
    )
    clip_norm: float = setting(1.0, "global norm to which gradients are clipped; 0: no clipping")
    average_decay: float = setting(
        0.0,
        "decay rate of an exponential moving average of the weights, which is saved and evaluated too; 0: no average",
        minimum=0,
        below=1,
    )
    schedule: str = setting(
        "cosine",
        "learning-rate schedule after warm-up: cosine or linear to zero, rsqrt with timescale and cooldown_steps, or "
        "constant",
        choices=("cosine", "linear", "rsqrt", "constant"),
    )
    warmup_steps: int = setting(6_500, "steps of linear warm-up")
    cooldown_steps: int = setting(0, "steps of linear decay to zero at the end, multiplied by the schedule")
    timescale: int = setting(10_000, "time scale of rsqrt in steps", minimum=1)
    learning_rate_scale: tuple[str, ...] = setting(
        (),
        "factors of the learning rate by parameter name, REGEX=FACTOR; the first match applies. With image.train = "
        "unlocked the default is img/(?!head/).*=0.1 (section 4.5 of the SigLIP paper)",
    )
    weight_decay_scale: tuple[str, ...] = setting(
        ("(.*/)?kernel=1",),
        "factors of weight decay by parameter name, REGEX=FACTOR; parameters without a match do not decay. With "
        "image.train = unlocked the default has img/(?!head/).*=0 before it (figure 4 of the SigLIP paper)",
    )
    freeze: tuple[str, ...] = setting((), "regular expressions of the names of frozen parameters")

    @property
    def decay_convention(self) -> str:
        """The convention that weight_decay is in, "paper" or "optax"."""
        if self.weight_decay_convention != "auto":
            return self.weight_decay_convention
        return "optax" if self.name in ("adamw", "muon", "schedule_free") else "paper"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training and after the last step. Intervals can be combined; 0 disables one."""

    every_steps: int = setting(0, "interval in steps")
    every_examples: int = setting(0, "interval in images seen")
    every_share: float = setting(0.0, "interval as a share of the run; 0.1 evaluates ten times")
    zero_shot: tuple[str, ...] = setting((), "datasets for zero-shot classification")
    retrieval: tuple[str, ...] = setting((), "datasets for image-text retrieval")
    few_shot: tuple[str, ...] = setting(
        (),
        "pairs TRAIN=TEST of datasets with labels for few-shot classification; for a trained image tower only, as the "
        "figures of a frozen one are constant (lit-fast eval --few-shot)",
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints. The last step is always saved."""

    every_steps: int = setting(1_000, "interval in steps", minimum=1)
    keep: int = setting(2, "number of most recent checkpoints to keep", minimum=1)
    keep_every: int = setting(0, "interval in steps of checkpoints that are never deleted; 0: none")
    best: str = setting(
        "", 'metric of the evaluation whose best checkpoint is kept, such as "dev/image_retrieval_recall@1"'
    )


TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class LogConfig:
    """Metrics of the training."""

    every_steps: int = setting(50, "interval in steps", minimum=1)
    report_to: str = setting(
        "tensorboard",
        "trackers that receive the metrics, separated by commas: tensorboard, wandb, trackio; empty: none. "
        "metrics.jsonl is always written",
    )
    project: str = setting(
        "lit-fast", "project at wandb and trackio; WANDB_PROJECT and TRACKIO_PROJECT override it"
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in report_to, without repetitions."""
        return tuple(dict.fromkeys(name for part in self.report_to.split(",") if (name := part.strip())))


@dataclass(frozen=True)
class PlanConfig:
    """Properties of data that `lit-fast plan` assumes; where `dataset` is set, its own replace them."""

    tower: str = setting(
        "augreg/B_8", "vision tower: a name of lit-fast towers, or a ViT at 224 pixels such as g/14"
    )
    vocab_size: int = setting(32_000, "vocabulary size", minimum=1)
    max_length: int = setting(16, "tokens per caption with padding", minimum=2)
    caption_tokens: float = setting(
        0.0, "mean true length of a caption in tokens, used by text.pack; 0: max_length"
    )
    rows: int = setting(0, "rows of the dataset; 0: unknown")


@dataclass(frozen=True)
class Config:
    """The run. Each key is also a flag, `--optimizer.learning_rate 3e-4`.

    A default applies where CONFIG does not set the key. Booleans are true or false, lists are separated by commas.
    """

    dataset: str = setting("", "directory of a dataset with features and tokens")
    tower: str = setting("", "name of the features; empty: the only ones of the dataset")
    tokenizer: str = setting("", "name of the tokens; empty: the only ones of the dataset")
    steps: int = setting(65_000, "number of training steps", minimum=1, below=2**31)
    examples: int = setting(0, "images to train on; if not 0, steps = examples / stream.global_batch")
    seed: int = setting(
        0, "seed of initialization, data order, dropout and corruption", minimum=0, below=2**32 - 1
    )
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


# Rules of the optimizer for pretrained image weights, where the configuration sets none: a tenth of the learning rate
# and no weight decay (section 4.5 and figure 4 of the SigLIP paper). The image head is not pretrained.
UNLOCKED_DEFAULTS: dict[str, tuple[str, ...]] = {
    "optimizer.learning_rate_scale": ("img/(?!head/).*=0.1",),
    "optimizer.weight_decay_scale": ("img/(?!head/).*=0", "(.*/)?kernel=1"),
}

# Keys and sections that may change when a run is resumed: the parameters do not depend on them, or what they name is
# compared by its contents.
MAY_CHANGE_ON_RESUME = (
    "evaluate",
    "checkpoint",
    "log",
    "plan",
    "dataset",
    "tower",
    "tokenizer",
    "stream.noise",
    "text.row_tokens",
    "text.rows",
    "image.tower",
    "image.workers",
)


@cache
def sections() -> dict[str, Any]:
    """Return the dataclass of each section by name; "" is the name of `Config` itself."""
    nested: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config) if not f.metadata}
    return {"": Config} | nested


@cache
def settings() -> dict[str, dataclasses.Field[Any]]:
    """Return the field of every key by dotted name."""
    return {
        f"{section}.{f.name}".lstrip("."): f
        for section, cls in sections().items()
        for f in dataclasses.fields(cls)
        if f.metadata  # sections have none
    }


def flatten(config: Config) -> dict[str, Any]:
    """Return the values of all keys by dotted name."""
    return {key: operator.attrgetter(key)(config) for key in settings()}
