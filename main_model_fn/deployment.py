"""Ask the planner what to load, and tell it when this replica is gone."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import quote

import msgspec
import structlog

from remoe.checkpoint import Checkpoint
from remoe.experts import Partition
from remoe.plan import Deployment

__all__ = ["claim_deployment", "release_deployment"]

_log = structlog.get_logger()


def claim_deployment(
    planner_url: str, checkpoint: Checkpoint, *, main_memory_gb: float, timeout_s: float = 15.0
) -> Deployment:
    """The planner's deployment; without a planner a static one, so that users are served.

    The static one keeps the lower half of each layer's experts here: nothing is known of prompts.
    """
    try:
        body = _post(f"{planner_url}/v1/deployment:claim", timeout_s)
        return msgspec.json.decode(body, type=Deployment)
    except (OSError, msgspec.DecodeError) as error:
        _log.error("planner_unavailable", error=repr(error), consequence="static partition")
        upper = tuple(range((checkpoint.experts + 1) // 2, checkpoint.experts))
        remote = tuple(
            upper if layer in checkpoint.moe_layers else () for layer in range(checkpoint.layers)
        )
        return Deployment(
            plan_id="static",
            model_digest=checkpoint.digest,
            partition=Partition(experts=checkpoint.experts, remote=remote),
            main_memory_gb=main_memory_gb,
            origin="static",
        )


def release_deployment(planner_url: str, plan_id: str, *, timeout_s: float = 1.0) -> None:
    """Tell the planner that a claimed deployment is no longer loaded; best effort."""
    try:
        _post(f"{planner_url}/v1/deployment:release?plan_id={quote(plan_id)}", timeout_s)
    except OSError as error:
        _log.info("deployment_not_released", error=repr(error))


def _post(url: str, timeout_s: float) -> bytes:
    request = urllib.request.Request(url, data=b"{}", method="POST")  # noqa: S310
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        body: bytes = response.read()
    return body
