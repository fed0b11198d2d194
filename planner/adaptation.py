"""Change a running main function's partition when a review says that it pays.

The main function changes between two layers and drops no stream (docs/adr/0008-native-main-function.md).
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from planner.epoch import EpochReview
from remoe.errors import RemoeError
from remoe.plan import Deployment

__all__ = ["Adapter", "put_deployment"]

_log = structlog.get_logger()
_TIMEOUT_S = 120.0  # as long as reading all its experts may take


class Adapter:
    """Reviews, and applies what a review recommends.

    `review` says what to do, `running` which plan runs, `put` hands a deployment to the main
    function in place of the named plan's, and `adapted` notes that it has taken it.
    """

    def __init__(
        self,
        *,
        review: Callable[[], Awaitable[EpochReview]],
        running: Callable[[], Deployment | None],
        put: Callable[[Deployment, str], None],
        adapted: Callable[[Deployment, str], Awaitable[None]],
    ) -> None:
        self._review = review
        self._running = running
        self._put = put
        self._adapted = adapted

    async def once(self) -> bool:
        """Review once; says whether the partition changed."""
        running = self._running()
        if running is None:
            return False
        review = await self._review()
        if review.candidate is None:
            return False
        wanted = review.candidate
        try:
            await asyncio.to_thread(self._put, wanted, running.plan_id)
        except OSError as error:
            # It has stopped, or another has started since, and the next review will see.
            _log.warning("partition_not_changed", plan_id=wanted.plan_id, reason=str(error))
            return False
        await self._adapted(wanted, running.plan_id)
        _log.info("partition_changed", plan_id=wanted.plan_id, why=review.why)
        return True

    async def forever(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.once()
            except RemoeError as error:
                _log.warning("review_failed", reason=error.message)


def put_deployment(main_url: str, deployment: Deployment, instead_of: str) -> None:
    """Have the main function run `deployment` if it runs plan `instead_of`; raises OSError."""
    request = urllib.request.Request(  # noqa: S310
        f"{main_url}/v1/deployment",
        data=msgspec.json.encode(deployment),
        method="PUT",
        headers={"Content-Type": "application/json", "If-Match": f'"{instead_of}"'},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:  # noqa: S310
        reply.read()
