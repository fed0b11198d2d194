"""All measurements of a machine and a model, in order, as one hardware profile."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from main_model_fn.dense_speed import measure_dense
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.allocations import allocations_of, measure_expert_speed
from remoe.cli.hardware.functions import (
    measure_expert_cold_start,
    measure_local_calls,
    measure_main_cold_start,
)
from remoe.cli.hardware.steps import measure_steps
from remoe.experts import ExpertId
from remoe.hardware import AllocationCurve, CallTimes, ExpertRows, HardwareProfile
from remoe.kernel.interface import open_kernel

__all__ = ["measure_hardware"]

_EXPERT_ROWS = [1, 4, 32]
_PROMPTS = [1, 32, 128]
_READ_BYTES = 64 << 20


def measure_hardware(
    model_dir: Path,
    model: str,
    *,
    seconds: float,
    report: Callable[[str], None],
    calls: CallTimes | None = None,
) -> HardwareProfile:
    """Measure for about a minute; `seconds` is spent on each expert time.

    `calls` are those of a cluster, measured there; without them local ones are measured.
    """
    checkpoint = Checkpoint.open(model_dir)
    cores = len(os.sched_getaffinity(0))
    shares = allocations_of(cores)
    by_share = []
    for share in shares:
        report(f"experts on {share:g} vCPUs")
        by_share.append(measure_expert_speed(model_dir, share, _EXPERT_ROWS, seconds=seconds))
    called_here = calls is None
    if calls is None:
        report("calls of an expert function")
        calls = measure_local_calls(model_dir)
    report("cold starts of an expert function")
    expert_cold_start = measure_expert_cold_start(model_dir)
    report("cold starts of the main function")
    main_cold_start = measure_main_cold_start(model_dir)
    report("the model without its experts")
    dense = measure_dense(model_dir, rows=_PROMPTS, seconds=2 * seconds)
    experts = [
        ExpertRows(
            rows=rows, curve=AllocationCurve.of(shares, [times[place] for times in by_share])
        )
        for place, rows in enumerate(_EXPERT_ROWS)
    ]
    step_s, invocation = dense.step_s, calls.invocation
    if dense.device == "cpu":
        report("whole steps of decoding")
        steps = measure_steps(model_dir)
        one_s = experts[0].curve.seconds(np.array([float(cores), 1.0]))
        step_s = steps.dense_s(checkpoint, local_s=float(one_s[0]))
        if called_here:
            alone_s = steps.call_s(checkpoint, dense_s=step_s, remote_s=float(one_s[1]))
            invocation = invocation.plus(max(0.0, alone_s - invocation.mean_s))
    report("reading from the disk")
    return HardwareProfile(
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        host={
            "name": platform.node(),
            "cpu": _cpu_name(),
            "cores": str(cores),
            "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f}",
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "device": dense.device,
        },
        model=model,
        model_digest=checkpoint.digest,
        kernel=open_kernel(checkpoint.expert, "auto", activation=checkpoint.activation).description,
        expert=experts,
        non_expert_rows=dense.rows,
        non_expert_s=dense.prefill_s,
        non_expert_step_s=step_s,
        move_s_per_token=dense.move_s_per_token,
        bandwidth_bytes_per_s=calls.bandwidth_bytes_per_s,
        read_bytes_per_s=_read_speed(checkpoint),
        invocation=invocation,
        expert_cold_start=expert_cold_start,
        main_cold_start=main_cold_start,
        main_vcpus=float(cores),
        main_on_gpu=dense.device == "cuda",
    )


def _read_speed(checkpoint: Checkpoint) -> float:
    """How fast the file of the experts is read when the page cache has let go of it."""
    name = checkpoint.family.expert_names(ExpertId(checkpoint.moe_layers[-1], 0))[0]
    fd = os.open(checkpoint.path_of(name), os.O_RDONLY)
    try:
        size = min(_READ_BYTES, os.fstat(fd).st_size)
        os.posix_fadvise(fd, 0, size, os.POSIX_FADV_DONTNEED)
        before = time.perf_counter()
        done = 0
        while done < size:
            done += len(os.pread(fd, 1 << 20, done))
        return size / (time.perf_counter() - before)
    finally:
        os.close(fd)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
