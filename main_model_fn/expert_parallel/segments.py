"""Rows in segments, and the index that puts the segments into another order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["reordered"]


def reordered(
    sizes: NDArray[np.intp], order: NDArray[np.intp], device: torch.device
) -> torch.Tensor:
    """Rows' indices, [sum of sizes], such that `rows[index]` has its segments in `order`.

    `sizes` [segments] are in the rows' present order; `order` is a permutation of the segments.
    """
    starts = np.cumsum(sizes) - sizes
    moved = sizes[order]
    shift = starts[order] - (np.cumsum(moved) - moved)
    total = int(moved.sum())
    lengths = torch.from_numpy(np.stack([shift, moved]).astype(np.int64)).to(device)
    shifts = torch.repeat_interleave(lengths[0], lengths[1], output_size=total)
    return torch.arange(total, device=device) + shifts
