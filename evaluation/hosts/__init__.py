"""Machines as the cost model sees them: a few measured figures, and what is assumed beside them.

The files say which figures were measured and which were not.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from evaluation.shapes import Shape
from planner.optimise.expert_times import ExpertTimes
from planner.optimise.specs import SpecTable
from planner.optimise.system import System
from remoe.errors import SettingsError
from remoe.hardware import AllocationCurve

__all__ = ["DEFAULT_HOST", "Host", "load_host"]

DEFAULT_HOST = Path(__file__).parent / "h100-16-cores.json"
_GB = 1e9
_BYTES_PER_NUMBER = 3.0  # a row goes out in bfloat16 and comes back as float32
_PREFILL_ROWS = (1.0, 128.0, 1024.0, 8192.0)


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`expert_s` is [rows, vCPUs]: one expert of `expert_bytes`; others' times are in proportion.

    `gpu_layer_overhead_s` is what a layer's kernels take to launch, `gpu_expert_overhead_s` an
    expert's. `round_trip_s` is of `round_trip_bytes` from the GPU to the CPU and back.
    """

    name: str
    measured: list[str]
    assumed: list[str]
    cores: int
    expert_bytes: float
    expert_rows: list[int]
    expert_vcpus: list[float]
    expert_s: list[list[float]]
    gpu_bytes_per_s: float
    gpu_flops: float
    gpu_layer_overhead_s: float
    gpu_expert_overhead_s: float
    cpu_bytes_per_s: float
    copy_bytes_per_s: float
    round_trip_s: float
    round_trip_bytes: float
    invocation_s: float
    network_bytes_per_s: float
    disk_bytes_per_s: float

    def __post_init__(self) -> None:
        shape = (len(self.expert_rows), len(self.expert_vcpus))
        if np.shape(self.expert_s) != shape:
            raise ValueError(f"expert_s must be {shape[0]} rows of {shape[1]} allocations")

    def expert_times(self, shape: Shape) -> ExpertTimes:
        """τ^c of a shape's expert, without a fit: the table as it is."""
        scale = shape.expert_bytes / self.expert_bytes
        return ExpertTimes(
            np.array(self.expert_rows, np.float64),
            tuple(
                AllocationCurve(vcpus=self.expert_vcpus, measured_s=[scale * one for one in row])
                for row in self.expert_s
            ),
        )

    def gpu_dense_s(self, shape: Shape, tokens: float) -> float:
        """Σ τ^f on the GPU: weights read once, or computed with, and launches."""
        reading = shape.non_expert_bytes / self.gpu_bytes_per_s
        computing = tokens * shape.non_expert_bytes / self.gpu_flops
        return max(reading, computing) + shape.layers * self.gpu_layer_overhead_s

    def cpu_dense_s(self, shape: Shape, tokens: float) -> float:
        """The same on all cores of the CPU: as fast per byte as an expert of as many rows."""
        whole = shape.non_expert_bytes / shape.expert_bytes
        rows = np.array([float(tokens)])
        return whole * float(self.expert_times(shape).seconds(rows, float(self.cores))[0])

    def gpu_expert_s(self, shape: Shape, rows: float) -> float:
        """One expert on the GPU, its weights there."""
        reading = shape.expert_bytes / self.gpu_bytes_per_s
        return max(reading, rows * shape.expert_bytes / self.gpu_flops) + self.gpu_expert_overhead_s

    def move_s_per_token(self, shape: Shape) -> float:
        """τ^sw: half a round trip, by bytes of a hidden vector."""
        return self.round_trip_s / 2 * (2 * shape.hidden) / self.round_trip_bytes

    def system(self, shape: Shape, *, cpu_usd_per_gb_s: float, gpu_price_ratio: float) -> System:
        """The paper's platform: the dense part on a GPU, 1 GB = 1 vCPU, its bill (A.2 to A.4)."""
        whole_gb = shape.experts_bytes / _GB + 2.0
        step_gb = 0.1 if whole_gb < 100 else 1.0
        main_gb = step_gb * np.arange(10, int(whole_gb / step_gb) + 12, dtype=np.float64)
        layer_gb = shape.experts * shape.expert_bytes / _GB
        remote_gb = np.linspace(1.0, max(5.0, np.ceil(layer_gb) + 1.0), 41)
        return System(
            experts=shape.experts,
            top_k=shape.top_k,
            moe_layers=tuple(range(shape.moe_layers)),
            token_bytes=_BYTES_PER_NUMBER * shape.hidden,
            bandwidth_bytes_per_s=self.network_bytes_per_s,
            invocation_s=self.invocation_s,
            non_expert_rows=_PREFILL_ROWS,
            non_expert_s=tuple(self.gpu_dense_s(shape, rows) for rows in _PREFILL_ROWS),
            non_expert_step_s=self.gpu_dense_s(shape, 1.0),
            move_s_per_token=self.move_s_per_token(shape),
            expert_times=self.expert_times(shape),
            remote=SpecTable(remote_gb, remote_gb, cpu_usd_per_gb_s * remote_gb),
            main=SpecTable(main_gb, main_gb, cpu_usd_per_gb_s * main_gb),
            expert_gb=shape.expert_bytes / _GB,
            expert_runtime_gb=0.1,
            main_fixed_gb=1.0,
            gpu_fixed_gb=shape.non_expert_bytes / _GB,
            kv_gb_per_token=shape.kv_bytes_per_token / _GB,
            kv_on_gpu=True,
            gpu_usd_per_gb_s=gpu_price_ratio * cpu_usd_per_gb_s,
        )


def load_host(path: Path) -> Host:
    """Read a file of figures; raises SettingsError that says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Host)
    except OSError as error:
        raise SettingsError(f"cannot read the host's figures {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SettingsError(
            f"{path} does not hold a host's figures: {error}. {DEFAULT_HOST} is an example."
        ) from error
