"""A hardware profile of a small machine, for tests."""

from __future__ import annotations

import msgspec

from remoe.hardware import AllocationCurve, ColdStart, ExpertRows, HardwareProfile, Spread


def some_profile(**changes: object) -> HardwareProfile:
    def spread(value_s: float) -> Spread:
        return Spread(mean_s=value_s, median_s=value_s, p95_s=2 * value_s, p975_s=2.5 * value_s)

    vcpus = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    profile = HardwareProfile(
        measured_at="2026-11-23T07:00:00Z",
        host={"cpu": "test", "cores": "2"},
        model="tiny-moe",
        model_digest="sha256:0",
        kernel="native test",
        expert=[
            ExpertRows(
                rows=rows,
                curve=AllocationCurve.of(vcpus, [one * rows**0.8 / share for share in vcpus]),
            )
            for rows, one in ((1, 1e-3), (8, 1e-3), (64, 1e-3))
        ],
        non_expert_rows=[1, 16, 64],
        non_expert_s=[0.003, 0.01, 0.04],
        non_expert_step_s=0.003,
        move_s_per_token=0.0,
        bandwidth_bytes_per_s=1e9,
        read_bytes_per_s=5e8,
        invocation=spread(4e-4),
        expert_cold_start=ColdStart(phases={"process": spread(0.01)}, total=spread(0.03)),
        main_cold_start=ColdStart(phases={"process": spread(1.0)}, total=spread(4.0)),
        main_vcpus=2.0,
    )
    return msgspec.structs.replace(profile, **changes)
