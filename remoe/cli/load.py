"""`remoe load`: replay traffic against any OpenAI-compatible server, and compare what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from remoe.cli.errors import OneLineErrors
from remoe.cli.load_results import compare, describe, parse_window, report
from remoe.errors import SettingsError

__all__ = ["load_app"]

load_app = typer.Typer(
    cls=OneLineErrors,
    invoke_without_command=True,
    rich_markup_mode="rich",
    help="Replay traffic against any OpenAI-compatible server, with a bill at the end.",
)

_TARGET, _WHAT, _WHEN, _LIMITS, _OUT = "Target", "Requests", "Arrivals", "Limits", "Results"


@load_app.callback()
def load(
    context: typer.Context,
    *,
    url: Annotated[
        str, typer.Option(help="The server's base URL, with /v1.", rich_help_panel=_TARGET)
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None,
        typer.Option(show_default="the server's only one", rich_help_panel=_TARGET),
    ] = None,
    endpoint: Annotated[
        Literal["chat", "completions"], typer.Option(rich_help_panel=_TARGET)
    ] = "chat",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["REMOE_LOAD_API_KEY", "OPENAI_API_KEY"],
            help="Never written to the results.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    ready_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the server.", rich_help_panel=_TARGET)
    ] = 60.0,
    probe: Annotated[
        bool,
        typer.Option(
            help="Find out first which fields the server takes and how it counts tokens. This wakes "
            "it: to begin from zero, use --no-probe, or --settle.",
            rich_help_panel=_TARGET,
        ),
    ] = True,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Azure LLM, Azure Functions, Mooncake, ServeGen or our own JSONL; gzipped or not.",
            show_default="two generated minutes",
            exists=True,
            dir_okay=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="Seconds of the trace to replay: 600:1200, 600: or :1200.", rich_help_panel=_WHAT
        ),
    ] = None,
    sample: Annotated[
        float,
        typer.Option(
            help="Share of the requests to keep; which ones depends on the seed.",
            min=0.0,
            max=1.0,
            rich_help_panel=_WHAT,
        ),
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(help="Most requests to send.", min=1, rich_help_panel=_WHAT)
    ] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="A trace whose token counts are used where the arrivals have none.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Every prompt so long.", min=1, rich_help_panel=_WHAT)
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(help="Every answer so long.", min=1, rich_help_panel=_WHAT)
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Cut longer prompts.", min=1, rich_help_panel=_WHAT)
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Cut longer answers.", min=1, rich_help_panel=_WHAT)
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Text for prompts: a JSONL file with prompt and topic, or a folder of "
            "prompts.jsonl(.gz).",
            show_default="a small one of twelve topics",
            exists=True,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="The model's tokenizer.json, to cut prompts exactly.",
            show_default="calibrated by the server's own counts",
            exists=True,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    characters_per_token: Annotated[
        float | None,
        typer.Option(help="Instead of calibrating.", min=0.1, rich_help_panel=_WHAT),
    ] = None,
    arrivals: Annotated[
        Literal["trace", "poisson", "gamma", "constant", "closed"],
        typer.Option(
            help="The trace's own times, or these with the trace's lengths.",
            rich_help_panel=_WHEN,
        ),
    ] = "trace",
    speedup: Annotated[
        float,
        typer.Option(
            help="10 replays an hour of the trace in six minutes.", min=1e-6, rich_help_panel=_WHEN
        ),
    ] = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second.", min=1e-6, rich_help_panel=_WHEN),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds to send for.", min=1e-3, rich_help_panel=_WHEN),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Rates one after the other: 2@60s,2..10@2m,1^16@90s (.. is a linear ramp, ^ an "
            "exponential one).",
            rich_help_panel=_WHEN,
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            help="Of gamma arrivals: 1 is Poisson, less is burstier.",
            min=1e-3,
            rich_help_panel=_WHEN,
        ),
    ] = 0.5,
    concurrency: Annotated[
        int,
        typer.Option(help="Of closed arrivals: so many at a time.", min=1, rich_help_panel=_WHEN),
    ] = 1,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Rates to run one after the other until the server does not keep up: 1,2,4,8, "
            "auto, or auto:2 (doubling). Poisson arrivals unless gamma or constant.",
            rich_help_panel=_WHEN,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of samples, arrivals and prompts.", min=0, rich_help_panel=_WHEN)
    ] = 0,
    warm_up: Annotated[
        int,
        typer.Option(help="Requests before the run, not measured.", min=0, rich_help_panel=_WHEN),
    ] = 0,
    settle: Annotated[
        float,
        typer.Option(
            help="Seconds to wait after probe and warm-up, for functions to go to sleep again.",
            min=0,
            rich_help_panel=_WHEN,
        ),
    ] = 0.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds for one request.", min=0.1, rich_help_panel=_LIMITS)
    ] = 600.0,
    drain: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for answers after the last arrival.",
            min=0,
            rich_help_panel=_LIMITS,
        ),
    ] = 120.0,
    max_in_flight: Annotated[
        int,
        typer.Option(
            help="Arrivals beyond are skipped, and counted.", min=1, rich_help_panel=_LIMITS
        ),
    ] = 4096,
    max_errors: Annotated[
        int | None,
        typer.Option(help="Stop after so many.", min=1, rich_help_panel=_LIMITS),
    ] = None,
    max_error_share: Annotated[
        float,
        typer.Option(
            help="Stop when more of the last 50 requests failed.",
            min=0.0,
            max=1.0,
            rich_help_panel=_LIMITS,
        ),
    ] = 0.5,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="An objective, several times: ttft_p99<2s, tpot<100ms (each request), goodput>95%, "
            "error_rate<1%. One that is missed ends in exit status 3.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    usd_per_hour: Annotated[
        float | None,
        typer.Option(
            help="What the server's machine costs, for a bill where replies carry none.",
            min=0.0,
            rich_help_panel=_OUT,
        ),
    ] = None,
    detailed: Annotated[
        bool,
        typer.Option(
            "--detailed",
            help="vLLM's arrays in run.json too, one entry a request.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder.", show_default="results/load-DATE-TIME", rich_help_panel=_OUT
        ),
    ] = None,
) -> None:
    """Replay traffic against any OpenAI-compatible server, with a bill at the end.

    Without options it sends two generated minutes to a Remoe on this machine.

    Examples:

    [bold]remoe load --trace AzureLLMInferenceTrace_conv.csv --speedup 10 --window 0:600[/bold]

    [bold]remoe load --url http://other:8000/v1 --arrivals poisson --rate 4 --duration 60 --slo 'ttft_p99<2s'[/bold]

    [bold]remoe load --sweep auto --duration 30[/bold]
    """
    if context.invoked_subcommand is not None:
        return
    from loadgen.config import LoadConfig
    from remoe.cli.load_run import run_in_terminal

    if rate is not None and (stages is not None or duration is None):
        raise SettingsError(
            "--rate needs --duration, and excludes --stages, which has rates and durations of its own"
        )
    if rate is not None and arrivals in {"trace", "closed"}:
        raise SettingsError(
            f"--rate has no meaning for {arrivals} arrivals; add --arrivals poisson (or gamma, or "
            "constant), or use --speedup"
        )
    if stages is not None and arrivals in {"trace", "closed"}:
        raise SettingsError(
            f"--stages has no meaning for {arrivals} arrivals; add --arrivals poisson (or gamma, or "
            "constant)"
        )
    if duration is not None and arrivals == "trace" and sweep is None:
        raise SettingsError("a trace has its own length: use --window instead of --duration")
    if sweep is not None and (duration is None or stages is not None):
        raise SettingsError("--sweep needs --duration, the seconds at each rate, and no --stages")
    start_s, end_s = parse_window(window)
    config = LoadConfig(
        url=url,
        model=model,
        endpoint=endpoint,
        trace=_path(trace),
        lengths=_path(lengths),
        corpus=_path(corpus),
        tokenizer=_path(tokenizer),
        characters_per_token=characters_per_token,
        arrivals=arrivals,
        stages=f"{rate}@{duration}s" if rate is not None else stages,
        burstiness=burstiness if arrivals == "gamma" else 1.0,
        concurrency=concurrency,
        duration_s=duration,
        requests=requests,
        start_s=start_s,
        end_s=end_s,
        sample=sample,
        speedup=speedup,
        seed=seed,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        warm_up=warm_up,
        settle_s=settle,
        probe=probe,
        ready_timeout_s=ready_timeout,
        timeout_s=timeout,
        drain_s=drain,
        max_in_flight=max_in_flight,
        max_errors=max_errors,
        max_error_share=max_error_share,
        slo=slo or [],
        usd_per_hour=usd_per_hour,
        detailed=detailed,
    )
    folder = out or Path("results") / time.strftime("load-%Y%m%d-%H%M%S")
    raise typer.Exit(run_in_terminal(config, folder, api_key=api_key, sweep=sweep))


load_app.command("compare")(compare)
load_app.command("report")(report)
load_app.command("describe")(describe)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
