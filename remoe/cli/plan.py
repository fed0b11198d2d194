"""`remoe plan`: what the running platform would do with a prompt, what that costs, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from remoe.errors import InvalidRequestError, UnavailableError

if TYPE_CHECKING:
    from remoe.plan import Slo
    from remoe.planning_messages import Explanation, PreviewRequest, PriceOverride

__all__ = ["parse_pairs", "parse_slo", "plan"]

_TIMEOUT_S = 30.0
_Message = TypeVar("_Message")


def plan(
    prompt: Annotated[str, typer.Argument(help="The prompt, as a user's message.")],
    *,
    slo: Annotated[
        str | None, typer.Option(help="Latency to ask for, in seconds: ttft=1,tpot=0.08.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.", min=1)] = 200,
    ratio: Annotated[
        float | None,
        typer.Option(help="What if this share of experts were remote?", min=0.0, max=1.0),
    ] = None,
    rule: Annotated[
        Literal["fixed", "largest", "cost", "per-layer"] | None,
        typer.Option(help="What if the share were chosen so?"),
    ] = None,
    platform: Annotated[
        Literal["proportional", "lambda", "cloud-run", "fargate"] | None,
        typer.Option(help="What if functions had this platform's memory and vCPUs?"),
    ] = None,
    granularity: Annotated[
        Literal["expert", "layer", "block"] | None,
        typer.Option(help="What if a function held this?"),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="What if the prompt had so many tokens?", min=1)
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="What if a GB·s cost so many USD: cpu=2e-5,gpu=1e-4.")
    ] = None,
    policy: Annotated[
        Literal["remoe", "moeless", "joint"] | None,
        typer.Option(
            help="What would this policy do with such prompts, and which would the planner choose?"
        ),
    ] = None,
    streams: Annotated[
        int, typer.Option(help="How many of them side by side, for --policy.", min=1)
    ] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write everything as one self-contained page.")
    ] = None,
) -> None:
    """Ask the running platform for its plan of a prompt; nothing is run, and nothing changes.

    Shows which experts would be remote and why, the expected times and cost, what the request
    would cost served otherwise, and every expert's expected use as a heat map.

    Examples:

    [bold]remoe plan "How do vaccines work?"[/bold]

    [bold]remoe plan "How do vaccines work?" --slo ttft=1,tpot=0.08 --html plan.html[/bold]
    """
    import msgspec

    from knative.local.run_dir import RunDir
    from remoe.home import remoe_home
    from remoe.planning_messages import PreviewRequest
    from remoe.topology import Topology

    run_dir = RunDir(remoe_home())
    if run_dir.running_pid() is None or not run_dir.topology.exists():
        raise UnavailableError(
            "Remoe is not running here, so nobody can plan. Start it with `remoe up`; another "
            "one's REMOE_HOME must be set to ask it."
        )
    topology = Topology.load(run_dir.topology)
    request = PreviewRequest(
        model=topology.model,
        prompt_tokens=_tokens(Path(topology.model_dir), prompt),
        max_new_tokens=max_tokens,
        slo=parse_slo(slo),
        ratio=ratio,
        rule=rule,
        platform=platform,
        granularity=granularity,
        prompt_length=length,
        prices=_prices(price),
        streams=None if policy is None else streams,
    )
    told = _explained(topology.planner_url, request)
    if html is not None:
        from remoe.cli.plan_page import page

        html.write_text(page(told, prompt), encoding="utf-8")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(told), indent=2))
        return
    from rich.console import Console

    from remoe.cli.plan_table import plan_table

    console = Console()
    console.print(plan_table(told, console.width))
    if policy is not None:
        from remoe.cli.plan_policy import policy_sentences

        for sentence in policy_sentences(policy, told.plan, topology, streams=streams):
            console.print(sentence)
        if not told.plan.policies:
            console.print(
                "What each policy would take, and which the planner would choose, needs a hardware "
                "profile; `remoe profile hardware` makes one."
            )
    if html is not None:
        typer.echo(f"page: {html}")


def parse_pairs(text: str, option: str, names: tuple[str, ...]) -> dict[str, float]:
    """Read `a=1,b=2`; raises InvalidRequestError that shows how it is written."""
    example = ",".join(f"{name}=1" for name in names)
    found: dict[str, float] = {}
    for part in text.split(","):
        name, separator, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not separator or name not in names or number <= 0 or name in found:
            raise InvalidRequestError(
                f"--{option} is {text!r}; write it as {example}, with numbers above 0."
            )
        found[name] = number
    return found


def parse_slo(text: str | None) -> Slo | None:
    """Read `ttft=1,tpot=0.08`, in seconds; raises InvalidRequestError."""
    if text is None:
        return None
    from remoe.plan import Slo

    given = parse_pairs(text, "slo", ("ttft", "tpot"))
    # What is not asked for is not limited: a day is as good as no limit.
    return Slo(ttft_s=given.get("ttft", 86_400.0), tpot_s=given.get("tpot", 86_400.0))


def _prices(text: str | None) -> PriceOverride | None:
    if text is None:
        return None
    from remoe.planning_messages import PriceOverride

    given = parse_pairs(text, "price", ("cpu", "gpu"))
    return PriceOverride(cpu_usd_per_gb_s=given.get("cpu"), gpu_usd_per_gb_s=given.get("gpu"))


def _tokens(model_dir: Path, prompt: str) -> list[int]:
    """The prompt as the gateway would send it."""
    import asyncio

    from gateway.text import TextModel

    text = TextModel.load(model_dir)
    if text.chat_template is None:
        return asyncio.run(text.encode(prompt, special_tokens=True, param="PROMPT"))
    rendered = text.chat_template.render([{"role": "user", "content": prompt}])
    return asyncio.run(text.encode(rendered, special_tokens=False, param="PROMPT"))


def _explained(url: str, request: PreviewRequest) -> Explanation:
    import httpx
    import msgspec

    from remoe.plan import Plan
    from remoe.planning_messages import Explanation

    try:
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as http:
            made = _read(http.post("/v1/plan:preview", content=msgspec.json.encode(request)), Plan)
            return _read(http.get(f"/v1/explain/{made.plan_id}"), Explanation)
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"the planner at {url} does not answer ({error}); `remoe status` shows its state, and "
            "`remoe logs planner` why."
        ) from error


def _read(response: object, kind: type[_Message]) -> _Message:
    import httpx
    import msgspec

    assert isinstance(response, httpx.Response)  # noqa: S101  # httpx is imported lazily
    if response.is_success:
        return msgspec.json.decode(response.content, type=kind)
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the planner answered {response.status_code}"
    raise InvalidRequestError(str(message))
