"""The planner, seen from the gateway: it helps when it can and never stops a request."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import aiohttp
import msgspec
import structlog

from gateway.outbox import Outbox, UndeliverableError
from gateway.replies import ModelState
from remoe.plan import Observation, Plan, PlanRequest
from remoe.tracing import current_span, outgoing_headers

__all__ = ["PlannerClient"]

_log = structlog.get_logger()
_plan_decoder = msgspec.json.Decoder(Plan)
_JSON = {"content-type": "application/json"}
_OBSERVATION_TIMEOUT_S = 10.0
_LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
# An observation, and the trace that it belongs to.
_Report = tuple[Observation, dict[str, str]]
_STATE_TIMEOUT_S = 0.5


class PlannerClient:
    """Asks for plans within a limit of time, and reports what requests really did."""

    def __init__(self, http: aiohttp.ClientSession, url: str, *, timeout_s: float) -> None:
        self._http = http
        self._url = url
        self._timeout_s = timeout_s
        self._reports = Outbox(self._report, name="observations")

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
        """Report a finished request soon, and again later if the planner cannot take it now."""
        self._reports.put((observation, outgoing_headers()))

    async def close(self) -> None:
        """Give reports that wait a moment to leave."""
        await self._reports.close()

    async def _report(self, report: _Report) -> None:
        observation, headers = report
        try:
            async with asyncio.timeout(_OBSERVATION_TIMEOUT_S):
                await self._post("/v1/observations", observation, headers)
        except aiohttp.ClientResponseError as error:
            passes = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status in _LATER
            if not passes:
                raise UndeliverableError(f"{observation.plan_id}: {error.status}") from error
            raise

    async def _post(self, path: str, message: msgspec.Struct, headers: dict[str, str]) -> bytes:
        body = msgspec.json.encode(message)
        url = f"{self._url}{path}"
        async with self._http.post(url, data=body, headers=_JSON | headers) as response:
            response.raise_for_status()
            return await response.read()
