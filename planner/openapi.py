"""The OpenAPI document: messages are msgspec's, so their schemas and examples are added here."""

from __future__ import annotations

from typing import TypedDict

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from planner.epoch import EpochReview
from planner.lessons import HistoryStats, Noted
from remoe.plan import Deployment, Observation, Plan, PlanRequest, Slo
from remoe.planning_messages import (
    Explanation,
    PlanDiff,
    PlanDiffRequest,
    PreviewRequest,
    PriceOverride,
)

__all__ = ["describe", "described"]

_REF = "#/components/schemas/{name}"
_MESSAGES = (
    *(Plan, PlanRequest, PreviewRequest, PlanDiff, PlanDiffRequest, Explanation, EpochReview),
    *(Deployment, Observation, Noted, HistoryStats),
)
_TOKENS = [1, 9690, 198, 4093, 506, 260, 3575, 282, 4649, 47, 2, 198]
_EXAMPLES: dict[type, dict[str, object]] = {
    PlanRequest: {
        "with an SLO": PlanRequest(
            model="smollm2-8x135m",
            prompt_tokens=_TOKENS,
            max_new_tokens=200,
            slo=Slo(ttft_s=1.0, tpot_s=0.08),
        )
    },
    PreviewRequest: {
        "dearer GPUs, a tighter SLO, a quarter remote": PreviewRequest(
            model="smollm2-8x135m",
            prompt_tokens=_TOKENS,
            max_new_tokens=200,
            slo=Slo(ttft_s=0.5, tpot_s=0.05),
            ratio=0.25,
            prices=PriceOverride(gpu_usd_per_gb_s=1.2e-4),
        ),
        "a long prompt on Lambda, a function for each layer": PreviewRequest(
            model="smollm2-8x135m",
            prompt_tokens=_TOKENS,
            max_new_tokens=200,
            prompt_length=1024,
            platform="lambda",
            granularity="layer",
            rule="per-layer",
        ),
    },
    PlanDiffRequest: {
        "two recent plans": PlanDiffRequest(
            before="plan-1kd2m8x4q-7f3k", after="preview-1kd2m8x9r-2h8s"
        )
    },
}


class _Route(TypedDict):
    openapi_extra: dict[str, object]
    responses: dict[int | str, dict[str, object]]
    status_code: int


def described(reply: type, body: type | None = None, *, status: int = 200) -> _Route:
    """What a route takes and gives, for its decorator."""
    extra: dict[str, object] = {}
    if body is not None:
        content: dict[str, object] = {"schema": {"$ref": _REF.format(name=body.__name__)}}
        if body in _EXAMPLES:
            content["examples"] = {
                name: {"value": msgspec.to_builtins(example)}
                for name, example in _EXAMPLES[body].items()
            }
        extra["requestBody"] = {"required": True, "content": {"application/json": content}}
    schema = {"$ref": _REF.format(name=reply.__name__)}
    return _Route(
        openapi_extra=extra,
        responses={
            status: {"description": "Done", "content": {"application/json": {"schema": schema}}}
        },
        status_code=status,
    )


def describe(app: FastAPI) -> dict[str, object]:
    """Build the document once, with all messages among its components."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, components = msgspec.json.schema_components(_MESSAGES, ref_template=_REF)
        document.setdefault("components", {})["schemas"] = components
        app.openapi_schema = document
    return app.openapi_schema
