"""A hardware profile as a picture: expert time by vCPUs, with its fit, and where a start goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from remoe.errors import SettingsError
from remoe.hardware import HardwareProfile

__all__ = ["draw"]


def draw(profile: HardwareProfile, path: Path) -> None:
    """Write the picture, in the format of its suffix; raises SettingsError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SettingsError("a plot needs matplotlib: `pip install 'remoe[plots]'`") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    times, starts = figure.subplots(1, 2)
    for index, one in enumerate(profile.expert):
        curve, colour = one.curve, f"C{index}"
        vcpus = np.linspace(curve.vcpus[0], curve.vcpus[-1], 200)
        how = "table" if curve.fit is None else f"fit, R² {curve.fit.r_squared:.3f}"
        times.plot(
            vcpus,
            1e3 * curve.seconds(vcpus),
            color=colour,
            label=f"{one.rows} row{'s' * (one.rows > 1)} ({how})",
        )
        times.plot(curve.vcpus, 1e3 * np.array(curve.measured_s), "o", color=colour)
    times.set(xlabel="vCPUs", ylabel="ms", title="One expert", yscale="log")
    times.legend()
    for place, start in enumerate((profile.expert_cold_start, profile.main_cold_start)):
        left, labels = 0.0, []
        for index, (phase, spread) in enumerate(start.phases.items()):
            starts.barh(place, spread.median_s, left=left, color=f"C{2 * place + index}")
            labels.append(f"{phase} {spread.median_s:.2f} s")
            left += spread.median_s
        starts.annotate(" + ".join(labels), (0, place - 0.55), fontsize=8)
    starts.set(xlabel="s, median", title="Cold start", yticks=[0, 1], ylim=(-0.8, 1.6))
    starts.set_yticklabels(["expert\nfunction", "main\nfunction"])
    invocation = profile.invocation
    figure.suptitle(
        f"{profile.model} on {profile.host.get('cpu', '?')}, {profile.measured_at}: warm call "
        f"{1e3 * invocation.median_s:.2f} ms (P95 {1e3 * invocation.p95_s:.2f}), dense part "
        f"{1e3 * profile.non_expert_step_s:.1f} ms a token",
        fontsize=9,
    )
    figure.savefig(path)
