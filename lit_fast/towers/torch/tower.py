"""A tower whose forward pass is a traced PyTorch module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lit_fast.errors import UserError, first_line
from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.torch import trace
from lit_fast.towers.torch.packages import package_version
from lit_fast.weights.parameters import Params


@dataclass(frozen=True)
class Body:
    """The PyTorch part of a tower.

    Attributes:
      module: frozen, evaluating, float32, on the CPU.
      options: keyword arguments of its forward pass.
      pooled: picks the features [n, width] from its output.
    """

    module: Any
    options: dict[str, Any]
    pooled: Callable[[Any], Any]


@dataclass(frozen=True)
class TorchTower(FrozenTower):
    """A frozen tower of timm, open_clip or transformers.

    Attributes:
      body: what computes the features.
      recipe: `architecture`, the name of the library, and what it builds the module from; JSON values.
    """

    body: Body
    recipe: dict[str, Any]

    @cached_property
    def width(self) -> int:
        """Return the length of a feature vector.

        Raises:
          UserError: JAX cannot trace the module, or it gives no vector per image.
        """
        size = self.preprocess.size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        return int(jax.eval_shape(self.embed, self.params, images).shape[1])

    @property
    def stored_params(self) -> Params:
        """Return the float32 arrays that an exported directory stores; the others follow from the recipe."""
        return {name: self.params[name] for name in stored_shapes(self.body.module)}

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that compute the features."""
        library = self.recipe["architecture"]
        packages = dict.fromkeys(("torch", "torchax", "timm", library))
        return super().versions | {name: package_version(name) for name in packages}

    def record(self) -> dict[str, Any]:
        """Return everything that affects the features, but for the dtype."""
        return {
            "sha256": self.sha256,
            **self.recipe,
            "width": self.width,
            "preprocess": self.preprocess.to_dict(),
        }

    def features(self, params: Params, images: jax.Array, dtype: Any) -> jax.Array:
        """Compute features of any float type [n, width] of normalized images float32 [n, size, size, 3]."""
        try:
            out = self.body.pooled(trace.run(self.body.module, params, images, dtype, self.body.options))
        except Exception as error:  # whatever the module's code or torchax raises
            reason = f"{type(error).__name__}: {first_line(error, 160)}"
            raise UserError(
                f"tower {self.source} cannot be traced by JAX at {self.preprocess.size} pixels ({reason}); "
                "give another --resolution or another model"
            ) from None
        if not isinstance(out, jax.Array) or out.ndim != 2:
            raise UserError(
                f"tower {self.source} gives no vector per image; give another --pool or another model"
            )
        return out


def stored_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a module's float parameters and buffers that a file stores."""
    return {
        name: tuple(value.shape) for name, value in module.state_dict().items() if value.is_floating_point()
    }


def fill(module: Any, values: dict[str, np.ndarray]) -> None:
    """Copy arrays of the names of `stored_shapes` into a module."""
    import torch

    module.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()}, strict=False)
