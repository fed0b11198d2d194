"""Which device a main function computes on, and how many experts its memory has room for."""

from __future__ import annotations

import torch

from main_model_fn.config import MainSettings
from main_model_fn.hot_experts import HotBudget
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError
from remoe.plan import Deployment

__all__ = ["choose_device", "hot_budget"]

# What torch's libraries, a step's intermediate results and two experts on their way take.
_WORKING_BYTES = 3 << 30


def choose_device(settings: MainSettings) -> torch.device:
    """The settings' device; raises SettingsError if there is no GPU and one is asked for."""
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise SettingsError(
            "REMOE_MAIN_DEVICE is cuda, but torch sees no GPU (nvidia-smi and "
            "`python -c 'import torch; print(torch.version.cuda)'` say why); use cpu or auto"
        )
    return torch.device("cuda" if there and settings.device != "cpu" else "cpu")


def hot_budget(
    settings: MainSettings, checkpoint: Checkpoint, deployment: Deployment, device: torch.device
) -> HotBudget | None:
    """What experts may take of a GPU that holds nothing of the model yet; None on the CPU."""
    if device.type == "cpu":
        return None
    if settings.gpu_experts_gb is not None:
        size_bytes = int(settings.gpu_experts_gb * 1e9)
    else:
        free_bytes, _ = torch.cuda.mem_get_info(device)
        cache_bytes = settings.kv_tokens * checkpoint.kv_bytes_per_token
        size_bytes = free_bytes - checkpoint.non_expert_size_bytes - cache_bytes - _WORKING_BYTES
    return HotBudget(max(0, size_bytes), deployment.profile)
