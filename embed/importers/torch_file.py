"""Read tensors from PyTorch's files; nothing in them is run."""

from __future__ import annotations

import pickle
from typing import Any

from lit_fast.data.features import BFLOAT16
from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import local_path
from lit_fast.storage.paths import StrPath

_FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


def read_torch_file(path: StrPath) -> Any:
    """Return the content of a file: an array, or a list or dict with arrays.

    PyTorch reads it with `weights_only=True`, which makes nothing but tensors and containers. The arrays map the file.
    Other values in a list or dict are returned as they are.

    Raises:
      UserError: PyTorch is not installed, the file is damaged, of the format before PyTorch 1.6, or holds anything but
        tensors of floats in lists and dicts.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is read by PyTorch, which is not installed; run: pip install torch"
        ) from None

    def to_array(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.detach()
        if str(tensor.dtype) not in _FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path} holds a tensor of {tensor.dtype}; save features as dense floats")
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()

    try:
        value = torch.load(local_path(path), map_location="cpu", weights_only=True, mmap=True)
        # One level only: nested containers may refer to each other and grow without bound.
        if isinstance(value, list | tuple):
            return [to_array(item) for item in value]
        if isinstance(value, dict):
            return {key: to_array(item) for key, item in value.items()}
        return to_array(value)
    except UserError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors in lists and dicts and is not unpickled; save only the features with "
            "torch.save(TENSOR, FILE)"
        ) from None
    except Exception as error:  # damage makes PyTorch raise many kinds
        if "_use_new_zipfile_serialization" in str(error):
            raise UserError(
                f"{path} is of torch's old format, or is damaged; convert it with: torch.save(torch.load(FILE), FILE)"
            ) from None
        raise UserError(
            f"{path} is damaged: {type(error).__name__} {first_line(error)}; restore it"
        ) from None
