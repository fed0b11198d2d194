"""The planner's plan for a deployment that does not run yet: same code, no service."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from knative.deployment import DeploymentOptions
    from remoe.plan import Plan, Slo

__all__ = ["preview_plan"]

_PREFIX = "REMOE_PLANNER_"


def preview_plan(
    options: DeploymentOptions,
    *,
    slo: Slo | None,
    prompt_tokens: int,
    output_tokens: int,
    rule: Literal["cost", "largest", "fixed"] = "cost",
) -> Plan:
    """Plan a usual request before any prompt: its profile is the history's mean.

    `rule` chooses the share of remote experts, up to the options' (`planner.config`).

    The main function is taken to be awake: an SLO that held through its cold start would be one of
    minutes. Latency of what wakes it is shown apart, when it happens (`x_remoe.cold_start_ms`).
    Raises SettingsError if the hardware profile is another model's.
    """
    from knative.deployment import default_deployment
    from planner.config import PlannerSettings
    from planner.planning import Planner
    from remoe.planning_messages import PreviewRequest

    deployment = default_deployment(options)
    env = deployment.planner.env
    given = {
        name.removeprefix(_PREFIX).lower(): value
        for name, value in env.items()
        if name.startswith(_PREFIX)
    }
    given.pop("history_dir", None)  # which another process may be writing
    shared = {name: value for name, value in env.items() if name == "REMOE_PRICES"}
    urls = {spec.name: f"http://{spec.name}" for spec in deployment.functions}
    topology = deployment.topology(urls)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "topology.json"
        topology.save(path)
        settings = PlannerSettings.model_validate(
            {"REMOE_TOPOLOGY": path, "predictor": "mean", **given, **shared}
        )
        planner = Planner.load(settings)
        planner.claim()
        return planner.preview(
            PreviewRequest(
                model=topology.model,
                prompt_tokens=[0],
                prompt_length=prompt_tokens,
                decode_tokens=float(output_tokens),
                max_new_tokens=output_tokens,
                slo=slo,
                ratio=options.remote_ratio,
                rule=rule,
            )
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What the service would log is nobody's here, errors excepted."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    try:
        yield
    finally:
        structlog.configure(**before)
