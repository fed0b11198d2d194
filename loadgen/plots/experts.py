"""Which experts were used: layer by expert, as predicted, as it came, and the difference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadgen.plots.style import Plot, figure, label
from loadgen.results import RunResult

__all__ = ["expert_heat_maps"]


def expert_heat_maps(result: RunResult) -> Plot:
    """Shares of each layer's routes; rows sum to 1 in the first two maps, to 0 in the third."""
    title = "Experts: predicted, actual, difference"
    totals = result.target.activations
    if totals is None or totals.requests == 0:
        return Plot(
            title,
            "Nothing to draw: predictions and routes are known for a Remoe platform on this machine "
            "(its planner counts them), and only of requests that had a plan.",
            None,
        )
    predicted, actual = _shares(totals.predicted), _shares(totals.actual)
    used = np.flatnonzero(actual.sum(axis=1))  # dense layers have no experts
    layers, experts = len(used), actual.shape[1]
    height = min(8.0, max(2.8, 0.9 + 0.13 * layers))
    drawn, axes = figure(1, 3, height=height)
    most = float(max(predicted.max(), actual.max()))
    difference = (actual - predicted)[used]
    limit = float(np.abs(difference).max()) or 1e-9
    maps: list[tuple[str, NDArray[np.float64], str, float, float]] = [
        ("predicted", predicted[used], "viridis", 0.0, most),
        ("actual", actual[used], "viridis", 0.0, most),
        ("actual - predicted", difference, "RdBu_r", -limit, limit),
    ]
    for axis, (name, values, colours, low, high) in zip(axes, maps, strict=True):
        image = axis.imshow(
            values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest"
        )
        axis.grid(visible=False)
        label(axis, "expert", "layer" if name == "predicted" else "", name)
        step = max(1, layers // 10)
        axis.set_yticks(range(0, layers, step), [str(layer) for layer in used[::step]])
        axis.set_xticks(range(0, experts, max(1, experts // 8)))
        bar = drawn.colorbar(image, ax=axis, shrink=0.9)
        bar.set_label("share of the layer's routes", fontsize=8)
    divergence = float(np.abs(difference).sum(axis=1).mean() / 2)
    return Plot(
        title,
        f"Of n = {totals.requests} requests, {layers} layers of {experts} experts. On average "
        f"{divergence:.1%} of a layer's routes went to other experts than predicted for all "
        "requests together (total variation).",
        drawn,
    )


def _shares(counts: list[list[float]]) -> NDArray[np.float64]:
    table = np.array(counts, dtype=np.float64)  # [layers, experts]
    sums = table.sum(axis=1, keepdims=True)
    return table / np.where(sums > 0, sums, 1)
