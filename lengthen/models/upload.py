"""Numbers of the host, on their way to a GPU: the host does not wait for them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def pinned(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the host; pinned where `device` is a GPU, so that a copy from them is queued after what runs there."""
    # Through NumPy: torch takes a list number by number, in milliseconds for a long one.
    numbers = torch.from_numpy(np.asarray(values)).to(dtype)
    return numbers.pin_memory() if device.type == "cuda" else numbers


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, queued after what runs there."""
    return pinned(values, dtype, device).to(device, non_blocking=True)
