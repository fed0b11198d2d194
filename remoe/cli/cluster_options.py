"""The options that `remoe deploy` and `remoe diff` share, and the release they describe."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from remoe.cli.platform_options import LayersPerFunction, MainRetention, Window
from remoe.errors import SettingsError

if TYPE_CHECKING:
    from knative.cluster.release import Release
    from knative.cluster.releases import Expectation
    from knative.deployment import DeploymentOptions
    from remoe.plan import Plan, Slo

__all__ = ["Context", "Described", "Namespace", "describes_release"]

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="The namespace to use.")]
Context = Annotated[
    str | None,
    typer.Option(help="A context of the kubeconfig.", show_default="the current one"),
]


@dataclass(frozen=True, slots=True)
class Described:
    """A release, what the cluster must offer for it, and what the planner expects of it.

    `plan` is None without a hardware profile.
    """

    release: Release
    flags: tuple[str, ...]
    plan: Plan | None
    prompt_tokens: int
    output_tokens: int
    gpus: int
    gpu_resource: str
    claims: tuple[str, ...]

    @property
    def expectation(self) -> Expectation | None:
        from knative.cluster.releases import Expectation

        if self.plan is None:
            return None
        return Expectation(
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft_s=self.plan.predicted_ttft_s,
            tpot_s=self.plan.predicted_tpot_s,
            cost_usd=self.plan.predicted_cost_usd,
        )


def describe(
    model: Annotated[
        str, typer.Argument(help="A model folder in Hugging Face format, or a hub id.")
    ],
    *,
    slo: Annotated[
        str | None, typer.Option(help="Latency to hold, in seconds: ttft=1,tpot=0.08.")
    ] = None,
    namespace: Namespace = "remoe",
    images: Annotated[
        str, typer.Option(help="The images' name, with {service} in it.")
    ] = "kind.local/remoe-{service}:v1",
    weights: Annotated[
        str,
        typer.Option(
            help="Where pods find the model: claim:NAME/folder, image:/path, node:/path or "
            "hub:owner/name@revision."
        ),
    ] = "claim:remoe-models",
    cached_from: Annotated[
        str | None, typer.Option(help="What fills claim:NAME/folder where it is empty.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="A usual prompt's length, to plan for.", min=1)
    ] = 256,
    output_tokens: Annotated[
        int, typer.Option(help="The longest answer to allow time for.", min=1)
    ] = 512,
    layers_per_function: LayersPerFunction = 5,
    window: Window = "60s",
    burst_capacity: Annotated[
        int,
        typer.Option(
            help="Calls that an expert function shall be ready for at once; beyond what its pods "
            "take the activator stays in the way. -1: always, 0: only at zero.",
            min=-1,
        ),
    ] = 0,
    main_retention: MainRetention = "10m",
    remote_ratio: Annotated[
        float,
        typer.Option(help="Most of each layer's experts that are remote.", min=0.0, max=1.0),
    ] = 0.5,
    ratio_rule: Annotated[
        Literal["cost", "largest"],
        typer.Option(
            help="Which share of remote experts that holds the SLO: the cheapest, or the largest, "
            "with the smallest main function."
        ),
    ] = "cost",
    adapt_every: Annotated[
        float | None,
        typer.Option(
            help="Seconds between the planner's reviews of which experts are remote, within the "
            "main function's memory; 0 for none. Takes a hardware profile.",
            show_default="60",
            min=0,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Cores of the main function.", min=1)] = 2,
    gpus: Annotated[int, typer.Option(help="GPUs of the main function.", min=0)] = 0,
    gpu_resource: Annotated[str, typer.Option(help="What the cluster calls one.")] = (
        "nvidia.com/gpu"
    ),
    cpu_request: Annotated[
        float | None,
        typer.Option(
            help="Cores reserved for each pod, on small clusters.",
            show_default="its limit",
            min=0.001,
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let the gateway be reached from outside.")
    ] = False,
    ledger_secret: Annotated[
        str | None,
        typer.Option(help="A Secret whose key `url` is the ledger's database URL; asks for keys."),
    ] = None,
    history_claim: Annotated[
        str | None,
        typer.Option(help="A claim for the planner's history.", show_default="not kept"),
    ] = None,
    initial_zero: Annotated[
        bool,
        typer.Option(help="Make expert functions without starting them (a cluster's setting)."),
    ] = True,
    services_at_zero: Annotated[
        bool, typer.Option("--services-at-zero", help="Let gateway and planner sleep too.")
    ] = False,
    ingress_namespace: Annotated[
        str, typer.Option(help="Where the ingress's pods are.")
    ] = "kourier-system",
    prices: Annotated[
        str | None, typer.Option(help="A price book, by name or file.", show_default="alibaba-fc")
    ] = None,
) -> Described:
    from knative.cluster.options import ClusterOptions
    from knative.cluster.release import render
    from knative.deployment import DeploymentOptions, default_deployment, model_name
    from remoe.cli.plan import parse_slo
    from remoe.cli.up import hardware_profile, price_file
    from remoe.home import remoe_home
    from remoe.model_folder import model_folder
    from remoe.prices import load_prices

    if prices is not None:
        load_prices(prices)
    folder = model_folder(model)
    wanted = parse_slo(slo)
    options = DeploymentOptions(
        model_dir=folder,
        hardware=hardware_profile(remoe_home(), model_name(folder), folder),
        threads=threads,
        layers_per_function=layers_per_function,
        window=window,
        burst_capacity=burst_capacity,
        main_retention=main_retention,
        remote_ratio=remote_ratio,
        adapt_every_s=adapt_every,
        prices=price_file(prices),
    )
    cluster = ClusterOptions(
        namespace=namespace,
        images=images,
        weights=weights,
        cached_from=cached_from,
        slo=wanted,
        max_output_tokens=output_tokens,
        gpus=gpus,
        gpu_resource=gpu_resource,
        cpu_request=cpu_request,
        public=public,
        ledger_secret=ledger_secret,
        history_claim=history_claim,
        zero_initial_scale=initial_zero,
        services_at_zero=services_at_zero,
        ingress_namespaces=(ingress_namespace,),
    )
    options, plan = _planned(options, wanted, ratio_rule, prompt_tokens, output_tokens)
    claims = [name for name in (history_claim,) if name]
    claims += [
        source.removeprefix("claim:").partition("/")[0]
        for source in (weights, cached_from or "")
        if source.startswith("claim:")
    ]
    return Described(
        render(default_deployment(options), cluster),
        cluster.flags,
        plan,
        prompt_tokens,
        output_tokens,
        gpus,
        gpu_resource,
        tuple(dict.fromkeys(claims)),
    )


def _planned(
    options: DeploymentOptions,
    slo: Slo | None,
    rule: Literal["cost", "largest"],
    prompt_tokens: int,
    output_tokens: int,
) -> tuple[DeploymentOptions, Plan | None]:
    """The share of remote experts that holds the SLO, by the rule, and its plan.

    From then on the share is fixed: it settles the main function's memory, before any prompt is
    known (the paper's pre-allocation, A.9), and each prompt decides which experts they are.
    """
    from dataclasses import replace

    from remoe.cli.offline_plan import preview_plan

    if options.hardware is None:
        return options, None
    plan = preview_plan(
        options, slo=slo, rule=rule, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )
    if slo is None:
        return options, plan
    if plan.status == "infeasible":
        told = ""
        if plan.needed is not None:
            told = (
                ": the least that plans reach, each for itself, is "
                f"ttft={1.005 * plan.needed.ttft_s:.3g} and tpot={1.005 * plan.needed.tpot_s:.3g}"
            )
        raise SettingsError(
            f"no plan holds this SLO with this machine's measured times{told}. Ask for less, or "
            "raise --threads"
        )
    experts, layers = plan.partition.experts, plan.partition.layers
    remote = max((len(plan.partition.remote[layer]) for layer in range(layers)), default=0)
    # Rounded up in the sixth place, for the planner rounds down to whole experts.
    ratio = min(1.0, math.ceil(1e6 * remote / experts) / 1e6)
    return replace(options, remote_ratio=ratio, exact_ratio=True), plan


def describes_release(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `describe`, and as its first argument what they describe."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = list(inspect.signature(describe, eval_str=True).parameters.values())

    @wraps(command)
    def run(**given: Any) -> None:
        described = describe(**{one.name: given.pop(one.name) for one in shared})
        command(described, **given)

    parameters = [*shared, *own]
    del run.__wrapped__  # whose signature is not this one's
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
