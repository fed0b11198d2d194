"""A hardware profile as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remoe.hardware import HardwareProfile, Spread

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["profile_table"]


def profile_table(profile: HardwareProfile) -> RenderableType:
    """Expert times by vCPUs, then everything else, a line each."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    experts = Table(title="One expert, ms", title_justify="left", box=None, pad_edge=False)
    experts.add_column("rows", justify="right")
    for share in profile.expert[0].curve.vcpus:
        experts.add_column(f"{share:g} vCPU", justify="right")
    experts.add_column("by")
    for one in profile.expert:
        fit = one.curve.fit
        how = "table" if fit is None else f"exponential, R² {fit.r_squared:.3f}"
        values = (f"{1e3 * value:.3f}" for value in one.curve.measured_s)
        experts.add_row(str(one.rows), *values, how)
    prompts = ", ".join(
        f"{rows}: {1e3 * value:.1f}"
        for rows, value in zip(profile.non_expert_rows, profile.non_expert_s, strict=True)
    )
    speeds = (
        f"bandwidth          {profile.bandwidth_bytes_per_s / 1e6:.0f} MB/s, "
        f"disk {profile.read_bytes_per_s / 1e6:.0f} MB/s"
    )
    lines = [
        f"kernel             {profile.kernel}",
        f"dense part         {1e3 * profile.non_expert_step_s:.2f} ms a token; prompts, ms: {prompts}",
        f"warm call          {_spread(profile.invocation)}",
        speeds,
    ]
    for name, start in (
        ("expert cold start", profile.expert_cold_start),
        ("main cold start", profile.main_cold_start),
    ):
        phases = ", ".join(f"{phase} {1e3 * s.median_s:.0f}" for phase, s in start.phases.items())
        lines.append(f"{name:<18} {_spread(start.total)}: {phases}")
    return Group(experts, Text(), *(Text(line) for line in lines))


def _spread(spread: Spread) -> str:
    return f"{1e3 * spread.median_s:.2f} ms median, {1e3 * spread.p95_s:.2f} P95"
