"""Read the tensors of `.safetensors` for PyTorch; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lit_fast.errors import UserError
from lit_fast.weights.reader import WeightsFile

Tensors = dict[str, torch.Tensor]


def read_tensors(file: WeightsFile, wanted: Callable[[str], object] = lambda name: True) -> Tensors:
    """Return the tensors of the names that are wanted; those of floats are float32.

    Raises:
      UserError: a tensor cannot be read or holds values that are not finite.
    """
    found = {}
    for name, shape in file.shapes.items():
        if wanted(name):
            array = file.read(name) if 0 in shape else file.take(name)
            found[name] = torch.from_numpy(np.array(array))
    return found


def check_size(module: torch.nn.Module, tensors: Tensors, name: str) -> None:
    """Check that a module, which has no memory yet, is not much larger than the tensors for it.

    Raises:
      UserError: it is.
    """
    needed = sum(value.numel() for value in module.state_dict().values())
    given = sum(tensor.numel() for tensor in tensors.values())
    if needed > 2 * given + 10_000_000:
        raise UserError(
            f"the weights do not fit {name}: they have {given:,} values, the model {needed:,}; give the "
            "architecture that they are of"
        )
