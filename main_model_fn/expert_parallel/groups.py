"""Two process groups over all ranks, so that weights under way never hold up rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["open_groups"]


def open_groups(device: torch.device) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """A group for rows and one for weights, both connected: the first batch waits for neither.

    The default group must exist, and on GPUs each process must have chosen its own.
    """
    groups = (dist.new_group(), dist.new_group())
    for group in groups:
        ranks = dist.get_world_size(group)
        ones = torch.ones(ranks, device=device)
        dist.all_reduce(ones, group=group)
        dist.all_to_all_single(torch.empty_like(ones), ones, group=group)
        if int(ones[0]) != ranks:
            raise RuntimeError(f"an all-reduce over {ranks} ranks came to {ones.tolist()}")
    return groups
