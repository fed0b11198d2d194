"""`remoe up`: start everything, say how to use it, and tell what happens until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from remoe.cli.bill import LedgerUrl, ledger_option
from remoe.cli.platform_options import LayersPerFunction, MainRetention, Window
from remoe.errors import CheckpointError, SettingsError

__all__ = ["hardware_profile", "price_file", "up"]


def up(
    *,
    model_dir: Annotated[
        str | None,
        typer.Option(
            help="A model folder in Hugging Face format, or a hub id (owner/name[@revision]).",
            show_default="the default model, built at first use",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The gateway's port.", min=1, max=65535)] = 8000,
    host: Annotated[
        str, typer.Option(help="The gateway's IP address; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    auth: Annotated[
        Literal["auto", "required", "off"] | None,
        typer.Option(
            help="Who needs an API key (`remoe key create`).",
            show_default="nobody on loopback, everybody else",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="A certificate with its chain, PEM: serve HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may call the gateway; may be given again."),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            help="A price book: alibaba-fc, aws-lambda, azure-container-apps, gcp-cloud-run, or a "
            "JSON file.",
            show_default="alibaba-fc",
        ),
    ] = None,
    ledger: LedgerUrl = None,
    layers_per_function: LayersPerFunction = 5,
    window: Window = "60s",
    main_retention: MainRetention = "10m",
    remote_ratio: Annotated[
        float,
        typer.Option(help="Share of each layer's experts that is remote.", min=0.0, max=1.0),
    ] = 0.5,
    policy: Annotated[
        Literal["remoe", "moeless", "joint"],
        typer.Option(
            help="Who decides where experts are computed: the planner, loads foretold in flight, "
            "or both."
        ),
    ] = "remoe",
    threads: Annotated[
        int | None, typer.Option(help="Cores to use.", min=1, show_default="all")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="What the model computes in; auto is the checkpoint's own."),
    ] = "auto",
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        typer.Option(
            help="Where the model is computed; with a GPU, experts on it and on the CPU. auto is "
            "the GPU if there is one."
        ),
    ] = "auto",
    main_memory: Annotated[
        int | None,
        typer.Option(
            help="Memory limit of the main function, in MiB.",
            min=256,
            show_default="what the whole model needs",
        ),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Of every function.")
    ] = "info",
    keep_logs: Annotated[
        Path | None,
        typer.Option(help="Copy the logs here at the end.", show_default="logs are removed"),
    ] = None,
) -> None:
    """Run the whole platform on this machine until Ctrl-C.

    Builds the default model first if it is missing.

    Afterwards no process, no open port and no file is left but the model, the ledger and the history.

    Examples:

    [bold]remoe up[/bold]

    [bold]remoe up --port 9000 --window 30s --layers-per-function 10[/bold]
    """
    import os

    from knative.deployment import DeploymentOptions, default_deployment, model_name
    from knative.local.listening import check_port
    from knative.local.run_dir import RunDir
    from remoe.cli.foreground import run_foreground
    from remoe.cli.front_door import FrontDoor
    from remoe.cli.native_warning import warn_without_native_kernel
    from remoe.home import remoe_home
    from remoe.model_folder import model_folder
    from remoe.prices import load_prices

    run_dir = RunDir(remoe_home())
    running = run_dir.running_pid()
    if running is not None:
        raise SettingsError(
            f"Remoe is running already (process {running}). See it with `remoe status`, stop it "
            "with `remoe down`; another one needs its own REMOE_HOME and --port."
        )
    if not run_dir.path.exists():  # else what a killed run left may still hold the port a moment
        check_port(port, host)
    warn_without_native_kernel()
    gateway_env = FrontDoor(
        host=host,
        auth=auth,
        tls_cert=tls_cert,
        tls_key=tls_key,
        cors_origins=tuple(cors_origin or ()),
        ledger=ledger_option(ledger),
    ).environment()
    if prices is not None:
        load_prices(prices)
    folder = model_folder(model_dir) if model_dir else _built_model().absolute()
    deployment = default_deployment(
        DeploymentOptions(
            model_dir=folder,
            hardware=hardware_profile(remoe_home(), model_name(folder), folder),
            threads=threads or len(os.sched_getaffinity(0)),
            port=port,
            layers_per_function=layers_per_function,
            window=window,
            main_retention=main_retention,
            main_memory_mib=main_memory,
            remote_ratio=remote_ratio,
            policy=policy,
            dtype=dtype,
            device=device,
            log_level=log_level,
            host=host,
            gateway_env=gateway_env,
            prices=price_file(prices),
            history_dir=remoe_home() / "history",
        )
    )
    raise typer.Exit(run_foreground(deployment, run_dir, keep_logs=keep_logs))


def price_file(prices: str | None) -> str | None:
    """A path as the services will find it, whatever their working directory."""
    return str(Path(prices).absolute()) if prices and Path(prices).is_file() else prices


def hardware_profile(home: Path, model: str, model_dir: Path) -> Path | None:
    """The newest profile of this very model; one of other weights would mislead the planner."""
    from remoe.checkpoint import Checkpoint
    from remoe.hardware import HardwareProfile, newest_profile

    path = newest_profile(home, model)
    if path is None:
        return None
    if HardwareProfile.load(path).model_digest != Checkpoint.open(model_dir).digest:
        typer.echo(f"{path} is of other weights; `remoe profile hardware` measures anew", err=True)
        return None
    return path


def _built_model() -> Path:
    """Build in a process of its own, whose libraries this one then never holds in memory."""
    import subprocess
    import sys

    built = subprocess.run(
        [sys.executable, "-m", "remoe.cli", "model", "build"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if built.returncode:
        raise CheckpointError(
            "the default model could not be built (see above). Try `remoe model build`, or pass a "
            "model folder with --model-dir."
        )
    return Path(built.stdout.strip().splitlines()[-1])
