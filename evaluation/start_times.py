"""Starts of real processes: a main function as it is deployed, an expert function, a whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import msgspec

from evaluation.page_cache import drop
from main_model_fn.call_times import expert_call
from main_model_fn.http_transport import HttpTransport
from main_model_fn.native_model import NativeShape
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.functions import FunctionProcess, layers_env, libraries_s
from remoe.errors import SettingsError

__all__ = ["Start", "start_main_function", "start_whole_model"]


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds by stage, in order, and of the whole; `beside` runs at the same time as the others."""

    stages: dict[str, float]
    beside: dict[str, float] = {}
    cached: float = 0.0

    @property
    def total_s(self) -> float:
        return max(sum(self.stages.values()), sum(self.beside.values()))


def start_main_function(model_dir: Path, remote_ratio: float, *, cold: bool) -> Start:
    """The main function of a deployment that a real planner decides, and an expert function."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"REMOE_PLANNER_REMOTE_RATIO": str(remote_ratio)}
        history = model_dir / "history.npz"
        if history.exists():
            env["REMOE_PLANNER_HISTORY"] = str(history)
        with FunctionProcess("planner", model_dir, Path(folder), env) as planner:
            planner.start()
            plan_s = _plan_s(planner.url, Checkpoint.open(model_dir))
            native = NativeShape.of(Checkpoint.open(model_dir)) is not None
            imports_s = libraries_s(native=native)
            if cold:
                drop(model_dir)  # what the planner read
            with FunctionProcess(
                "main_model_fn", model_dir, Path(folder), {}, planner_url=planner.url
            ) as main:
                main_s = main.start()
        beside = {"plan": plan_s}
        if remote_ratio > 0:
            if cold:
                drop(model_dir)  # what the main function read
            beside |= _expert_function(model_dir, Path(folder))
    return Start(
        # Imported apart from the function's own start, which alone is the whole.
        stages={
            "libraries": min(imports_s, main_s),
            "model and cache": max(0.0, main_s - imports_s),
        },
        beside=beside,
    )


def _plan_s(planner_url: str, checkpoint: Checkpoint) -> float:
    """CALCULATE: a plan for a prompt of 125 tokens and 200 to write, or what the model holds."""
    most = checkpoint.context_length // 4
    tokens = [token % checkpoint.vocab_size for token in range(min(125, most))]
    body = json.dumps(
        {"model": "profiled", "prompt_tokens": tokens, "max_new_tokens": min(200, most)}
    ).encode()
    before = time.perf_counter()
    request = urllib.request.Request(  # noqa: S310  # our own address
        f"{planner_url}/v1/plan", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        response.read()
    return time.perf_counter() - before


def _expert_function(model_dir: Path, folder: Path) -> dict[str, float]:
    checkpoint = Checkpoint.open(model_dir)
    env = layers_env(checkpoint)
    with FunctionProcess("expert_fn", model_dir, folder, env) as function:
        process_s = function.start()
        transport = HttpTransport(function.topology, timeout_s=30.0)
        try:
            before = time.perf_counter()
            transport.send(expert_call(checkpoint, checkpoint.moe_layers[0], 1)).result()
            first_s = time.perf_counter() - before
        finally:
            transport.close()
    return {"remote: process": process_s, "remote: first call": first_s}


def start_whole_model(model_dir: Path, device: str) -> Start:
    before = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.whole_model", device, str(model_dir)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    whole_s = time.perf_counter() - before
    if done.returncode:
        raise SettingsError(f"the whole model did not start: {done.stderr.strip()[-500:]}")
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return Start(stages={"process": max(0.0, whole_s - sum(stages.values())), **stages})
