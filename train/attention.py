"""Choose the attention of a run: XLA's form, or the Pallas kernels where they agree with it on this device.

With `text.attention = "auto"` on a TPU, both forms compute embeddings, loss and all gradients of the first batch before
training. The kernels are used if they and the whole step compile and every difference is within `TOLERANCES`; otherwise
XLA's form is. All processes of a job choose the same. The choice is recorded in the run directory, and a resumed run
keeps it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from lit_fast.config import Config, TextConfig
from lit_fast.errors import UserError, first_line
from lit_fast.models import packed_attention
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import Params
from lit_fast.runtime import (
    REPLICATED,
    SHARDED,
    all_agree,
    broadcast_text,
    platform_of,
    replicated,
    shard_map,
)
from lit_fast.storage.files import is_file
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_object, write_json
from lit_fast.train.step import State, loss_and_grads
from lit_fast.train.text_pass import DeviceBatch, equal_captions, kernel_refusal
from lit_fast.utils.output import status

# Both forms round to bfloat16 at the same places, with sums in another order. Each is 0.004 to 0.020 from float32 in
# every gradient and 0.01 in an embedding, and two correct ones are at most 0.015 and 0.012 apart (measured at widths 32
# and 128). A kernel that halves one gradient of one head is 0.4 apart, wrong weights in a single row 1 in an embedding.
TOLERANCES = {"embedding": 0.05, "loss": 0.01, "gradient": 0.1}
_FILE = "attention.json"
T = TypeVar("T")
_XLA_TOKENS = 8192  # of a microbatch of XLA's form, whose scores are in memory


@dataclass(frozen=True)
class AttentionChoice:
    """The form of attention of a run."""

    form: str  # "xla" or "pallas"
    why: str = ""  # the reason for XLA's form
    pending: bool = False  # the kernels must agree with XLA's form first
    # The largest, by the keys of TOLERANCES; empty: the forms were not compared.
    differences: dict[str, float] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The entry of the receipt."""
        # JSON has no NaN.
        differences = {k: v if math.isfinite(v) else None for k, v in self.differences.items()}
        record = {"form": self.form, "why": self.why, "differences": differences, "tolerances": TOLERANCES}
        return record | _machine()


def propose_attention(
    text: TextConfig, model: TextTower, mesh: Mesh, workdir: StrPath | None = None
) -> AttentionChoice:
    """Choose the form to compile for, before anything has run on the devices.

    Args:
      text: with `row_tokens`, if packed by true lengths.
      model: the tower of `text`.
      mesh: the devices; they may be absent.
      workdir: of the run, whose recorded choice is kept; None: of no run, as for a plan.

    Raises:
      UserError: `text.attention` is "pallas" and the kernels cannot be used.
    """
    platform = platform_of(mesh)
    refusal = kernel_refusal(model, text.row_tokens if text.packed else 0)
    if text.attention == "xla":
        return AttentionChoice("xla", 'text.attention is "xla"')
    if text.attention == "pallas":
        if platform == "gpu":
            refusal = "the kernels are for TPUs"
        if refusal:
            raise UserError(f'text.attention "pallas" cannot be used: {refusal}; set it to "auto"')
        if platform == "cpu":
            status("attention: Pallas kernels, interpreted: many times slower than XLA's form, for tests")
        return AttentionChoice("pallas")
    recorded = _recorded(workdir) if workdir else {}
    return _propose_automatically(platform, refusal, recorded)


def _propose_automatically(platform: str, refusal: str, recorded: dict[str, Any]) -> AttentionChoice:
    before = recorded.get("form")
    if before == "xla":  # for the same bits
        if platform == "tpu":
            status("attention: XLA's form, as when this run started")
        return AttentionChoice("xla", str(recorded.get("why", "")), differences=_numbers(recorded))
    if platform != "tpu" or refusal:
        why = refusal if platform == "tpu" else f"the devices are {platform.upper()}s"
        if platform == "tpu":
            status(f"attention: XLA's form; {why}")
        if before:
            status(
                "attention: this run has used the Pallas kernels so far; XLA's form differs from them by rounding"
            )
        return AttentionChoice("xla", why)
    if not before:
        return AttentionChoice("pallas", pending=True)
    if all(recorded.get(key) == value for key, value in _machine().items()):
        return AttentionChoice("pallas", differences=_numbers(recorded))
    status(
        "attention: this run has used the Pallas kernels on other devices or versions; they are compared again"
    )
    return AttentionChoice("pallas", pending=True)


def compile_kernels(
    choice: AttentionChoice, text: TextConfig, model: TextTower, mesh: Mesh
) -> AttentionChoice:
    """Return the choice, or XLA's form if the kernels do not compile for the devices of this process.

    Raises:
      UserError: they do not, and `text.attention` is "pallas".
    """
    if choice.form == "xla" or (platform_of(mesh) == "cpu" and not choice.pending):
        return choice
    return with_kernels(choice, text.attention, lambda: _compile_kernels(text, model, mesh))[0]


def with_kernels(
    choice: AttentionChoice, requested: str, compute: Callable[[], T]
) -> tuple[AttentionChoice, T | None]:
    """Return the choice and the result of `compute`, which compiles kernels; if that fails, XLA's form and None.

    Args:
      choice: the form that `compute` uses.
      requested: `text.attention` of the configuration.

    Raises:
      UserError: it fails, and "pallas" is requested.
    """
    if choice.form == "xla":
        return choice, compute()
    result, problem = None, ""
    try:
        result = compute()
    except UserError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__} {first_line(error)}"
    if all_agree(not problem):
        return choice, result
    why = f"the Pallas kernels do not compile here: {problem or 'in another process'}"
    if requested == "pallas":
        raise UserError(f'text.attention "pallas" cannot be used: {why}; set it to "auto"')
    status(f"attention: XLA's form; {why}")
    return AttentionChoice("xla", why, differences=choice.differences), None


def _compile_kernels(text: TextConfig, model: TextTower, mesh: Mesh) -> None:
    heads, width = model.shape.heads, model.shape.width
    tokens = text.row_tokens if text.packed else model.pack * model.max_length
    sharding = SingleDeviceSharding(mesh.local_devices[0])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def kernels(
        qkv: jax.Array, captions: jax.Array, g: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        layout = equal_captions(model) or captions
        return (
            packed_attention.forward(qkv, layout, heads),
            packed_attention.backward(qkv, layout, heads, g, bias),
        )

    arguments = (
        array(8, 3 * width, tokens),
        array(8, tokens, dtype=jnp.int32),
        array(8, width, tokens),
        array(3 * width, dtype=jnp.float32),
    )
    jax.jit(kernels).lower(*arguments).compile()


def compare_attention(
    choice: AttentionChoice,
    config: Config,
    text: TextConfig,
    build: Callable[[TextConfig], TextTower],
    mesh: Mesh,
    state: State,
    batch: DeviceBatch,
    image: ImageTower | None = None,
) -> AttentionChoice:
    """Compare both forms on a batch, if the choice is pending, and return the one to train with.

    Args:
      text: with remat policy and microbatches of the step.
      build: the constructor of the text tower.
      state: before the batch.
      batch: the global batch, on the devices.
      image: the image tower, if it is trained.
    """
    if not choice.pending:
        return choice
    status("attention: comparing the Pallas kernels with XLA's form on the first batch")
    try:
        differences, where = compare_forms(config, text, build, mesh, state, batch, image)
        problem = _excess(differences, where)
    except Exception as error:
        differences, problem = {}, f"failed on the first batch: {type(error).__name__} {first_line(error)}"
    if all_agree(not problem):
        listed = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
        status(f"attention: Pallas kernels; largest differences from XLA's form: {listed}")
        return AttentionChoice("pallas", differences=differences)
    why = f"the Pallas kernels {problem or 'failed in another process'}"
    status(f"attention: XLA's form; {why}")
    return AttentionChoice("xla", why, differences=differences)


def _excess(differences: dict[str, float], where: str) -> str:
    """Return which difference exceeds its tolerance or is no number; empty: none."""
    for name, value in differences.items():
        if not value <= TOLERANCES[name]:
            what = f"{name} of {where}" if name == "gradient" else name
            return f"differ from XLA's form on the first batch: {what} by {value:.2g}, more than {TOLERANCES[name]}"
    return ""


def compare_forms(
    config: Config,
    text: TextConfig,
    build: Callable[[TextConfig], TextTower],
    mesh: Mesh,
    state: State,
    batch: DeviceBatch,
    image: ImageTower | None = None,
) -> tuple[dict[str, float], str]:
    """Return the largest differences between the forms, as in TOLERANCES, and the parameter of the gradient's.

    "embedding" is the largest distance of two normalized embeddings; "loss" is relative to the loss; "gradient" is the
    largest, over the parameters, of the norm of the difference relative to the gradient's norm.
    """
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    smaller = _smaller_microbatches(text, build(text), batch, mesh)
    forms = replace(text, attention="pallas"), replace(smaller, attention="xla")
    # All processes compile before any of them runs a program in which they communicate.
    programs, problem = [], None
    try:
        for form in forms:
            program = forward_and_backward(config, form, build(form), mesh, image)
            programs.append(program.lower(state.params, batch, key).compile())
    except Exception as error:
        problem = error
    if not all_agree(problem is None):
        raise problem or RuntimeError("another process cannot compile them")
    results = []
    for compiled in programs:
        embeddings, loss, on_devices = compiled(state.params, batch, key)
        results.append((embeddings, float(loss), jax.device_get(on_devices)))
        del on_devices  # a device may have no room for the gradients of both
    (embeddings, loss, grads), (xla_embeddings, xla_loss, xla_grads) = results
    distance = jax.jit(lambda a, b: jnp.linalg.norm(a - b, axis=1).max(), out_shardings=replicated(mesh))
    of_gradients = gradient_differences(grads, xla_grads, xla_loss)
    where = max(of_gradients, key=lambda name: np.nan_to_num(of_gradients[name], nan=np.inf))
    differences = {
        "embedding": float(distance(embeddings, xla_embeddings)),
        "loss": abs(loss - xla_loss) / abs(xla_loss),
        "gradient": of_gradients[where],
    }
    return differences, where


def gradient_differences(grads: Params, reference: Params, loss: float) -> dict[str, float]:
    """Return the norm of the difference of each parameter's gradient, relative to the norm of the reference.

    Some references are near zero. Softmax ignores the bias of keys, whose gradient is therefore rounding alone: its
    difference is relative to the gradient of the queries' bias. That of a single number, temperature or bias, is
    relative to the loss.
    """
    ours, theirs = _by_name(grads), _by_name(reference)
    result = {}
    for name, a in theirs.items():
        difference = float(np.linalg.norm(ours[name] - a))
        of_queries = name.removesuffix("key/bias") + "query/bias"
        measure = theirs[of_queries] if name.endswith("key/bias") else a
        norm = float(np.linalg.norm(measure)) if a.size > 1 else abs(loss)
        result[name] = difference / norm if norm else difference
    return result


def _by_name(params: Params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(a) for path, a in leaves}


def forward_and_backward(
    config: Config, text: TextConfig, model: TextTower, mesh: Mesh, image: ImageTower | None = None
) -> jax.stages.Wrapped:
    """Return the function (params, batch, key) -> (embeddings, loss, gradients)."""
    config, platform = replace(config, text=text), platform_of(mesh)

    def run(params: Params, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Params]:
        loss, grads, _, embeddings = loss_and_grads(
            model, config, mesh.size, platform, params, batch, key, image
        )
        return embeddings, loss, grads

    specs = (REPLICATED, SHARDED, REPLICATED), (SHARDED, REPLICATED, REPLICATED)
    return jax.jit(shard_map(run, mesh, *specs))


def _smaller_microbatches(text: TextConfig, model: TextTower, batch: DeviceBatch, mesh: Mesh) -> TextConfig:
    """Return `text` with at most _XLA_TOKENS tokens per microbatch, as far as the rows can be divided."""
    rows = len(batch["ids"]) // mesh.size // (1 if "lengths" in batch else model.pack)
    tokens = rows * (batch["ids"].shape[1] * (1 if "lengths" in batch else model.pack))
    counts = [m for m in range(text.microbatches, rows + 1, text.microbatches) if rows % m == 0]
    return replace(text, microbatches=next((m for m in counts if tokens // m <= _XLA_TOKENS), counts[-1]))


# --- the record in the run directory


def write_attention(workdir: StrPath, choice: AttentionChoice) -> None:
    """Record the choice of a run; the first process calls this."""
    write_json(join(workdir, _FILE), choice.record)


def _recorded(workdir: StrPath) -> dict[str, Any]:
    """Return the record of a run, that of the first process in all processes; empty: there is none."""
    text = ""
    if jax.process_index() == 0 and is_file(join(workdir, _FILE)):
        try:
            text = json.dumps(read_object(join(workdir, _FILE), "form", form=str, why=str, differences=dict))
        except UserError as error:
            status(f"{error.problem}; the attention is chosen again")
    text = broadcast_text(text, 4096)
    return dict(json.loads(text)) if text else {}


def _numbers(recorded: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in recorded.get("differences", {}).items() if isinstance(v, float)}


def _machine() -> dict[str, str]:
    """Return what the kernels' results depend on."""
    try:
        compiler = version("libtpu")
    except PackageNotFoundError:
        compiler = ""
    return {"device_kind": jax.devices()[0].device_kind, "jax": jax.__version__, "libtpu": compiler}
