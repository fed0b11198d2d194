"""The planner, seen from the gateway: it helps when it can and never stops a request."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
import structlog

from gateway.background import Background
from remoe.plan import Observation, Plan, PlanRequest
from remoe.tracing import current_span, outgoing_headers

__all__ = ["PlannerClient"]

_log = structlog.get_logger()
_JSON = {"content-type": "application/json"}
_OBSERVATION_TIMEOUT_S = 10.0


class PlannerClient:
    """Asks for plans within a limit of time, and reports what requests really did."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, background: Background, *, timeout_s: float
    ) -> None:
        self._http = http
        self._url = url
        self._background = background
        self._timeout_s = timeout_s

    async def plan(self, request: PlanRequest) -> Plan | None:
        """Return the plan, or None when the planner is down, late, or not understood."""
        span = current_span().child("plan")
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.post(
                    f"{self._url}/v1/plan",
                    content=msgspec.json.encode(request),
                    headers=_JSON | outgoing_headers(span),
                )
            response.raise_for_status()
            plan = msgspec.json.decode(response.content, type=Plan)
            span.set({"remoe.plan_id": plan.plan_id})
            return plan
        except TimeoutError:
            span.fail("late")
            _log.warning("going on without a plan", reason="late", limit_s=self._timeout_s)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            span.fail(type(error).__name__)
            _log.warning("going on without a plan", reason=repr(error))
        finally:
            span.end()
        return None

    def observe(self, observation: Observation) -> None:
        """Report a finished request in the background; the loss of a report is logged."""
        if not self._background.start(self._observe(observation)):
            _log.warning("lost an observation", reason="too many reports under way")

    async def _observe(self, observation: Observation) -> None:
        try:
            async with asyncio.timeout(_OBSERVATION_TIMEOUT_S):
                response = await self._http.post(
                    f"{self._url}/v1/observations",
                    content=msgspec.json.encode(observation),
                    headers=_JSON | outgoing_headers(),
                )
            response.raise_for_status()
        except (httpx.HTTPError, TimeoutError) as error:
            _log.warning("lost an observation", plan_id=observation.plan_id, reason=repr(error))
