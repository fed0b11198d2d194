"""Plans made lately, so that they can be explained and compared.

Ours.
"""

from __future__ import annotations

from collections import OrderedDict

from planner.explaining import PlanRecord
from remoe.errors import NotFoundError

__all__ = ["RecentPlans"]

_KEPT = 256


class RecentPlans:
    """The newest 256 plans and previews."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, PlanRecord] = OrderedDict()

    def add(self, record: PlanRecord) -> None:
        self._records[record.plan.plan_id] = record
        if len(self._records) > _KEPT:
            self._records.popitem(last=False)

    def get(self, plan_id: str) -> PlanRecord:
        """Raises NotFoundError for a plan that is unknown, or too old."""
        try:
            return self._records[plan_id]
        except KeyError:
            raise NotFoundError(
                f"There is no plan {plan_id!r} among the last {_KEPT}; plan again to explain it."
            ) from None
