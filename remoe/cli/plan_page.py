"""A plan as one self-contained HTML page: no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from remoe.cli.plan_table import colour, expected_shares
from remoe.planning_messages import Explanation

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin-top: 1.8rem }
table { border-collapse: collapse } th, td { padding: .25rem .9rem .25rem 0; text-align: right }
th { font-weight: 600; border-bottom: 1px solid #c5ccd6 } th:first-child, td:first-child
{ text-align: left } tr.plan { font-weight: 600 } .feasible { color: #14732f }
.infeasible { color: #b3261e } .unknown { color: #8a6100 } .prompt { color: #4a5565 }
.map { display: grid; gap: 1px; font-size: 11px } .map span { height: 14px; line-height: 14px;
text-align: right; padding-right: .4rem; color: #4a5565 } .map i { height: 14px; border-radius: 2px }
.map i.r { outline: 1px solid #08458f33 } .key i { display: inline-block; width: 14px; height: 14px;
border-radius: 2px; vertical-align: -2px; margin: 0 .3rem 0 .9rem }
"""


def page(told: Explanation, prompt: str) -> str:
    """The whole page."""
    plan = told.plan
    remote, total = plan.partition.remote_count, len(told.layers) * plan.partition.experts
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>Plan {escape(plan.plan_id)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(plan.model)}: <span class={plan.status}>{plan.status}</span></h1>"
        f"<p class=prompt>“{escape(prompt)}”</p>"
        f"<p>{told.prompt_tokens} tokens read, {told.decode_tokens:.0f} written; {remote} of "
        f"{total} experts remote; main function {plan.main_memory_gb:.2f} GB.</p>"
        f"<h2>Time and cost</h2>{_costs(told)}"
        f"<h2>Why</h2>{''.join(f'<p>{escape(sentence)}</p>' for sentence in told.why)}"
        f"{_policies(told)}{_functions(told)}{_neighbours(told)}"
        f"<h2>Expected use of every expert</h2>{_map(told)}</html>\n"
    )


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], first: str = "") -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr{first if index == 0 else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _costs(told: Explanation) -> str:
    plan = told.plan
    cost = plan.predicted_cost_usd
    rows = [
        (
            "this plan",
            _number(plan.predicted_ttft_s, "s"),
            _number(plan.predicted_tpot_s, "s"),
            _number(cost, "USD"),
            "",
        )
    ]
    if plan.slo_ttft_s is not None:
        tail = (_number(plan.slo_ttft_s, "s"), _number(plan.slo_tpot_s, "s"))
        rows.append(("97.5 % below, cold starts included", *tail, "", ""))
    rows += [
        (
            f"{other.name} (assumes {other.assumes})" if other.assumes else other.name,
            _number(other.ttft_s, "s"),
            _number(other.tpot_s, "s"),
            _number(other.cost_usd, "USD"),
            f"{other.cost_usd / cost:.2f} x" if cost else "",
        )
        for other in told.baselines
    ]
    return _rows(("served by", "TTFT", "TPOT", "cost", "against the plan"), rows, " class=plan")


def _policies(told: Explanation) -> str:
    plan = told.plan
    if not plan.policies:
        return ""
    rows = [
        (
            f"{one.policy} (chosen)" if one.policy == plan.policy else one.policy,
            _number(one.ttft_s, "s"),
            "" if one.tpot_s is None else _number(one.tpot_s, "s"),
            _number(one.cost_usd, "USD"),
            _number(one.resident_usd, "USD"),
            f"{one.held_gb:.2f} GB",
            f"{one.moved_in} experts",
        )
        for one in plan.policies
    ]
    head = ("policy", "TTFT", "TPOT", "cost", "cost of memory held", "held", "moved in")
    return f"<h2>Policies</h2>{_rows(head, rows)}"


def _functions(told: Explanation) -> str:
    if not told.plan.functions:
        return ""
    rows = [
        (
            one.name,
            f"{one.expected_routes:.0f}",
            _number(one.expected_calls, ""),
            f"{one.memory_gb:.2f} GB",
            _number(one.vcpus, ""),
            str(one.replicas),
        )
        for one in told.plan.functions
    ]
    head = ("function", "routes", "calls", "memory", "vCPUs", "replicas")
    return f"<h2>Expert functions</h2>{_rows(head, rows)}"


def _neighbours(told: Explanation) -> str:
    if not told.neighbours:
        return ""
    rows = [(one.topic, f"{one.similarity:.3f}", f"{one.weight:.3f}") for one in told.neighbours]
    return f"<h2>Similar prompts</h2>{_rows(('topic', 'similarity', 'weight'), rows)}"


def _map(told: Explanation) -> str:
    experts = told.plan.partition.experts
    size = "minmax(3px, 26px)" if experts > 32 else "26px"
    cells = ["<span></span>"]
    few = experts <= 32
    cells += [f"<span>{expert if few else ''}</span>" for expert in range(experts)]
    for layer in told.layers:
        shares = expected_shares(told, layer)
        most = max(shares) or 1.0
        remote = {one.expert for one in layer.remote}
        cells.append(f"<span>{layer.layer}</span>")
        for expert, share in enumerate(shares):
            is_remote = expert in remote
            red, green, blue = colour(share / most, remote=is_remote)
            where = "remote" if is_remote else "local"
            cells.append(
                f'<i class={"r" if is_remote else "l"} style="background:rgb({red},{green},{blue})"'
                f' title="layer {layer.layer}, expert {expert}: {share:.1%}, {where}"></i>'
            )
    key = (
        "<p class=key><i style='background:rgb(217,72,1)'></i>local, used most"
        "<i style='background:rgb(255,244,230)'></i>local, hardly used"
        "<i style='background:rgb(8,69,148)'></i>remote, used most"
        "<i style='background:rgb(232,240,254)'></i>remote, hardly used</p>"
    )
    grid = f"grid-template-columns: 3rem repeat({experts}, {size})"
    return f'{key}<div class=map style="{grid}">{"".join(cells)}</div>'


def _number(value: float | None, unit: str) -> str:
    return "not known yet" if value is None else f"{value:.3g} {unit}".strip()
