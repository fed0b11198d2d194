"""The platform on this machine as a load generator sees it: `remoe status`, once a second."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import msgspec

from knative.local.control import ask_status
from knative.local.run_dir import RunDir
from loadgen.platform import FunctionSample
from remoe.activation_totals import ActivationTotals
from remoe.errors import UnavailableError
from remoe.home import remoe_home

__all__ = ["LocalPlatformProbe", "local_probe"]

_GB = 1e9
_TIMEOUT_S = 5.0


class LocalPlatformProbe:
    """Reads a supervisor's control socket, and the planner's counters over HTTP."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._planner_url: str | None = None

    def functions(self) -> list[FunctionSample] | None:
        """Every function by its memory limit, which is what a cluster reserves and bills."""
        try:
            status = ask_status(self._run_dir.control)
        except UnavailableError:
            return None
        for function in status.functions:
            if function.name == "planner":
                self._planner_url = function.url
        return [
            FunctionSample(
                name=function.name,
                ready=sum(replica.state == "ready" for replica in function.replicas),
                starting=sum(replica.state == "starting" for replica in function.replicas),
                gb=function.memory_limit_bytes * len(function.replicas) / _GB,
                busy_gb=function.memory_limit_bytes
                * sum(replica.in_flight > 0 for replica in function.replicas)
                / _GB,
                cold_starts=function.cold_starts,
                cold_start_total_ms=function.cold_start_total_ms,
            )
            for function in status.functions
        ]

    def activations(self) -> ActivationTotals | None:
        if self._planner_url is None and self.functions() is None:
            return None
        try:
            response = httpx.get(
                f"{self._planner_url}/v1/activations", timeout=_TIMEOUT_S, trust_env=False
            )
            response.raise_for_status()
            return msgspec.json.decode(response.content, type=ActivationTotals)
        except (httpx.HTTPError, msgspec.DecodeError):
            return None


def local_probe(url: str) -> LocalPlatformProbe | None:
    """The probe of the platform behind a target's URL; None if none of this machine is."""
    run_dir = RunDir(remoe_home())
    try:
        status = ask_status(run_dir.control)
    except UnavailableError:
        return None
    target, gateway = urlsplit(url), urlsplit(status.url)
    here = target.hostname in {"127.0.0.1", "localhost", "::1", gateway.hostname}
    return LocalPlatformProbe(run_dir) if here and target.port == gateway.port else None
