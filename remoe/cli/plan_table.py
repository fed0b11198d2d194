"""A plan in the terminal: figures, functions, reasons, and a heat map of layers and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remoe.planning_messages import Explanation, LayerExplanation

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["colour", "expected_shares", "plan_table"]

_LOCAL = ((255, 244, 230), (217, 72, 1))
_REMOTE = ((232, 240, 254), (8, 69, 148))


def plan_table(told: Explanation, width: int) -> RenderableType:
    """Everything a person wants to know of a plan, from top to bottom."""
    from rich.console import Group
    from rich.text import Text

    plan = told.plan
    status = {"feasible": "green", "infeasible": "bold red", "unknown": "yellow"}[plan.status]
    remote = plan.partition.remote_count
    total = len(told.layers) * plan.partition.experts
    head = Text.assemble(
        (f"{plan.model}  ", "bold"),
        (plan.status, status),
        f"  {told.prompt_tokens} tokens read, {told.decode_tokens:.0f} written, "
        f"{remote} of {total} experts remote, main function {plan.main_memory_gb:.2f} GB",
    )
    parts: list[RenderableType] = [head, Text(), _costs(told)]
    assumed = sorted({other.assumes for other in told.baselines if other.assumes})
    parts += [*(Text(f"* assumes {what}") for what in assumed), Text()]
    if plan.policies:
        parts += [_policies(told), Text()]
    if plan.functions:
        parts += [_functions(told), Text()]
    parts += [Text("Why", "bold"), *(Text(f"  {sentence}") for sentence in told.why), Text()]
    if told.neighbours:
        parts += [_neighbours(told), Text()]
    return Group(*parts, *_heat_map(told, width))


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _costs(told: Explanation) -> Table:
    plan = told.plan
    table = _table("served by", "TTFT", "TPOT", "cost", "to the plan")
    cost = plan.predicted_cost_usd
    table.add_row(
        "this plan",
        _seconds(plan.predicted_ttft_s),
        _seconds(plan.predicted_tpot_s),
        _usd(cost),
        "",
        style="bold",
    )
    if plan.slo_ttft_s is not None:
        table.add_row(
            "  in 97.5 %, cold starts included",
            _seconds(plan.slo_ttft_s),
            _seconds(plan.slo_tpot_s),
            "",
            "",
        )
    for other in told.baselines:
        against = f"{other.cost_usd / cost:.2f} x" if cost else "-"
        table.add_row(
            f"{other.name} *" if other.assumes else other.name,
            _seconds(other.ttft_s),
            _seconds(other.tpot_s),
            _usd(other.cost_usd),
            against,
        )
    return table


def _policies(told: Explanation) -> Table:
    plan = told.plan
    table = _table("policy", "TTFT", "TPOT", "cost", "of memory held", "held", "moved in")
    for one in plan.policies:
        table.add_row(
            f"{one.policy} (chosen)" if one.policy == plan.policy else one.policy,
            _seconds(one.ttft_s),
            "-" if one.tpot_s is None else _seconds(one.tpot_s),
            _usd(one.cost_usd),
            _usd(one.resident_usd),
            f"{one.held_gb:.2f} GB",
            f"{one.moved_in} experts",
            style="bold" if one.policy == plan.policy else "",
        )
    return table


def _functions(told: Explanation) -> Table:
    table = _table("function", "routes", "calls", "memory", "vCPUs", "replicas")
    for one in told.plan.functions:
        table.add_row(
            one.name,
            f"{one.expected_routes:.0f}",
            "-" if one.expected_calls is None else f"{one.expected_calls:.0f}",
            f"{one.memory_gb:.2f} GB",
            "-" if one.vcpus is None else f"{one.vcpus:.2g}",
            str(one.replicas),
        )
    return table


def _neighbours(told: Explanation) -> Table:
    table = _table("similar prompts", "similarity", "weight")
    for one in told.neighbours[:5]:
        table.add_row(one.topic, f"{one.similarity:.3f}", f"{one.weight:.3f}")
    return table


def expected_shares(told: Explanation, layer: LayerExplanation) -> list[float]:
    """Each expert's share of the layer's routes over the whole request."""
    read, written = told.prompt_tokens, told.decode_tokens
    whole = max(read + written, 1e-9)
    return [
        (read * a + written * b) / whole
        for a, b in zip(layer.prefill_shares, layer.decode_shares, strict=True)
    ]


def colour(heat: float, *, remote: bool) -> tuple[int, int, int]:
    """From pale to full: orange for local experts, blue for remote ones."""
    low, high = _REMOTE if remote else _LOCAL
    red, green, blue = (round(a + (b - a) * heat) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _heat_map(told: Explanation, width: int) -> list[RenderableType]:
    from rich.text import Text

    experts = told.plan.partition.experts
    cell = max(1, min(3, (width - 6) // max(experts, 1)))
    shown = min(experts, max(1, (width - 6) // cell))
    title = "Expected use: layers down, experts across; orange stays local, blue is remote"
    if shown < experts:
        title += f" (the first {shown} of {experts}; --html shows all)"
    lines: list[RenderableType] = [Text(title, "bold")]
    for layer in told.layers:
        shares = expected_shares(told, layer)
        most = max(shares) or 1.0
        remote = {one.expert for one in layer.remote}
        line = Text(f"{layer.layer:>4}  ")
        for expert in range(shown):
            is_remote = expert in remote
            red, green, blue = colour(shares[expert] / most, remote=is_remote)
            # Without colours the letter tells, and a dot for those hardly used.
            mark = ("r" if is_remote else "L") if shares[expert] > most / 4 else "·"
            line.append(mark.center(cell), f"black on rgb({red},{green},{blue})")
        lines.append(line)
    return lines


def _seconds(value: float | None) -> str:
    if value is None:
        return "not known yet"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _usd(value: float | None) -> str:
    return "not known yet" if value is None else f"{value:.3g} USD"
