"""The planner, seen from the gateway: it helps when it can and never stops a request."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import aiohttp
import msgspec
import structlog

from gateway.background import Background
from gateway.replies import ModelState
from remoe.plan import Observation, Plan, PlanRequest
from remoe.tracing import current_span, outgoing_headers

__all__ = ["PlannerClient"]

_log = structlog.get_logger()
_plan_decoder = msgspec.json.Decoder(Plan)
_JSON = {"content-type": "application/json"}
_OBSERVATION_TIMEOUT_S = 10.0
_STATE_TIMEOUT_S = 0.5


class PlannerClient:
    """Asks for plans within a limit of time, and reports what requests really did."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, background: Background, *, timeout_s: float
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
                body = await self._post("/v1/plan", request, outgoing_headers(span))
            plan = _plan_decoder.decode(body)
            span.set({"remoe.plan_id": plan.plan_id})
            return plan
        except TimeoutError:
            span.fail("late")
            _log.warning("going on without a plan", reason="late", limit_s=self._timeout_s)
        except (aiohttp.ClientError, msgspec.DecodeError) as error:
            span.fail(type(error).__name__)
            _log.warning("going on without a plan", reason=repr(error))
        finally:
            span.end()
        return None

    async def model_state(self) -> ModelState:
        """Whether a main function has claimed its deployment, which it gives back on leaving."""
        try:
            async with asyncio.timeout(_STATE_TIMEOUT_S):
                async with self._http.get(f"{self._url}/v1/deployment") as response:
                    status = response.status
        except (aiohttp.ClientError, TimeoutError):
            return "unknown"
        if status == HTTPStatus.OK:
            return "ready"
        return "zero" if status == HTTPStatus.NOT_FOUND else "unknown"

    def observe(self, observation: Observation) -> None:
        """Report a finished request in the background; the loss of a report is logged."""
        if not self._background.start(self._observe(observation)):
            _log.warning("lost an observation", reason="too many reports under way")

    async def _observe(self, observation: Observation) -> None:
        try:
            async with asyncio.timeout(_OBSERVATION_TIMEOUT_S):
                await self._post("/v1/observations", observation, outgoing_headers())
        except (aiohttp.ClientError, TimeoutError) as error:
            _log.warning("lost an observation", plan_id=observation.plan_id, reason=repr(error))

    async def _post(self, path: str, message: msgspec.Struct, headers: dict[str, str]) -> bytes:
        body = msgspec.json.encode(message)
        url = f"{self._url}{path}"
        async with self._http.post(url, data=body, headers=_JSON | headers) as response:
            response.raise_for_status()
            return await response.read()
