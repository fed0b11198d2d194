"""torch's types as the native kernel numbers them (remoe/kernel/native/kernel.h)."""

from __future__ import annotations

import torch

__all__ = ["KERNEL_DTYPES"]

KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
