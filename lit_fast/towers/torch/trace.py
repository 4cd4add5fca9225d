"""Run a PyTorch module as a function of JAX arrays, through torchax."""

from __future__ import annotations

import copy
import sys
import warnings
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torchax import amp
from torchax.interop import JittableModule, extract_all_buffers, torch_view
from torchax.tensor import Environment, Tensor
from torchax.view import View

_CACHE = type(lru_cache(len))  # also of functools.cache

_FULL_PRECISION = (
    torch.ops.aten._softmax.default,
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_group_norm.default,
)


class _Environment(Environment):
    """An environment of torchax that takes tensors which a model makes while it is traced (BEiT of transformers)."""

    def t2j_iso(self, torchtensors: Any) -> Any:
        """Return the JAX arrays of tensors; those of PyTorch itself are constants of the program."""
        return super().t2j_iso(jax.tree.map(self._with_constants, torchtensors))

    def _with_constants(self, value: Any) -> Any:
        is_plain = isinstance(value, torch.Tensor) and not isinstance(value, Tensor | View)
        # torchax reads those of one value as numbers, which do not widen the other argument.
        return Tensor(self.t2j_copy(value), self) if is_plain and value.numel() > 1 else value


def arrays(module: torch.nn.Module) -> dict[str, Any]:
    """Return the parameters, buffers and other tensors of a module as numpy arrays, which share its memory."""
    return {name: tensor.detach().numpy() for name, tensor in _tensors(module).items()}


def run(
    module: torch.nn.Module, params: dict[str, Any], images: jax.Array, dtype: Any, options: dict[str, Any]
) -> Any:
    """Compute the output of a module; a pure function for `jax.jit`.

    Args:
      module: evaluating, frozen, on the CPU.
      params: the arrays of `arrays(module)`.
      images: float32 [n, size, size, 3].
      dtype: of the products; LayerNorm and softmax are float32 whatever it is.
      options: keyword arguments of the module.

    Returns:
      The module's output, with JAX arrays instead of tensors.
    """
    environment = _environment()
    # A copy for every trace: some models (TinyViT, LeViT) keep tensors that they computed, here tracers. The weights
    # are not copied.
    shared = {id(tensor): tensor for tensor in _tensors(module).values()}
    traced = JittableModule(copy.deepcopy(module, shared), dedup_parameters=False)
    values = jax.tree.map(jnp.asarray, params)
    x, tensors = environment.j2t_iso((jnp.transpose(images, (0, 3, 1, 2)), values))
    with (
        warnings.catch_warnings(action="ignore"),  # integers are of 32 bits
        environment.override_property(autocast_dtype=torch.bfloat16 if dtype == jnp.bfloat16 else None),
        environment,
    ):
        _clear_caches(module)
        try:
            out = traced.functional_call("forward", tensors, {}, x, **options)
        finally:
            _clear_caches(module)  # they would keep tracers
    return environment.t2j_iso(out)


def _clear_caches(module: torch.nn.Module) -> None:
    """Clear the caches of functions and methods in the source files of a module's classes (DINOv3, BEiT)."""
    for name in {type(part).__module__ for part in module.modules()}:
        found = dict(vars(sys.modules[name]))
        for kind in [value for value in found.values() if isinstance(value, type)]:
            found |= {f"{kind.__name__}.{key}": value for key, value in vars(kind).items()}
        for value in found.values():
            function = getattr(value, "__func__", value)
            for inner in (function, *_closed_over(function)):
                if isinstance(inner, _CACHE):
                    inner.cache_clear()


def _closed_over(function: Any) -> list[Any]:
    """Return what a decorated function refers to, [] for other values."""
    cells = getattr(function, "__closure__", None) or ()
    try:
        return [cell.cell_contents for cell in cells]
    except ValueError:  # a cell without contents
        return []


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters, buffers = extract_all_buffers(module)
    return {**buffers, **parameters}


def _environment() -> Any:
    """Return an environment of torchax with the operators that it has wrong.

    Every trace needs a new one, since the random key in it would keep a tracer.
    """
    environment = _Environment()
    aten = torch.ops.aten
    # torchax's own function has other names of arguments than F.linear.
    environment.override_op_definition(F.linear, aten.linear.default)
    # torchax reads the kernels of jax.image, which JAX 0.10 keeps in another form.
    for operator, method in (
        (aten._upsample_bicubic2d_aa, "cubic"),
        (aten._upsample_bilinear2d_aa, "linear"),
    ):
        for overload in (operator, *(getattr(operator, name) for name in operator.overloads())):
            environment.override_op_definition(overload, torch_view(_antialiased_resize(method)))
    # Convolutions are cast before torch compares the dtypes of image and bias.
    environment.override_op_definition(F.conv2d, aten.conv2d)
    amp.autocast_policy[F.conv2d] = amp.CastPolicy.LOWER_PRECISION_FP
    amp.autocast_policy.update(dict.fromkeys(_FULL_PRECISION, amp.CastPolicy.FP32))
    # Their policy fails on lists of tensors; JAX promotes by itself.
    for overload in (aten.cat.default, aten.stack.default):
        amp.autocast_policy.pop(overload, None)
    return environment


def _antialiased_resize(method: str) -> Any:
    def resize(
        image: jax.Array, size: Any, align_corners: bool, *scales: Any, **named_scales: Any
    ) -> jax.Array:
        """Resize [n, channels, height, width] to `size`; scales follow from the sizes."""
        if align_corners:
            raise NotImplementedError("antialiased resizing with aligned corners")
        factors = [s for s in (*scales, *named_scales.values()) if s is not None]
        if size is None:  # one list of both factors
            size = [int(n * f) for n, f in zip(image.shape[2:], factors[0], strict=True)]
        return jax.image.resize(image, (*image.shape[:2], *size), method, antialias=True)

    return resize
