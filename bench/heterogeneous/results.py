"""What is known so far, on the screen and in a file; and the table of it in the end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BEGAN", "Results", "table"]


@dataclass
class Results:
    """What is known so far, on the screen and in the file."""

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        text = " ".join(f"{name}={_short(value)}" for name, value in row.items())
        print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1))


BEGAN = time.perf_counter()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(results: Results) -> None:
    """Figures by contender, and what the targets ask for."""
    print(
        "\n| model | | decode, tokens/s | of the floors | prefill, ms | on CPU / GPU / streamed |"
    )
    print("|---|---|--:|--:|--:|--:|")
    rates = [r for r in results.rows if r["what"] == "rates"]
    floors = {
        r["model"]: (r["floor_tokens_per_s"], r["floor_together_tokens_per_s"]) for r in rates
    }
    for name, who in dict.fromkeys((r["model"], r["who"]) for r in results.rows if "who" in r):
        rows = [r for r in results.rows if (r.get("model"), r.get("who")) == (name, who)]
        decode = next((r for r in rows if r["what"] == "decode"), None)
        prefill = [f"{r['seconds'] * 1e3:.0f}" for r in rows if r["what"].startswith("prefill")]
        speed = decode["tokens_per_s"] if decode else float("nan")
        kinds = ("share_cpu", "share_resident", "share_streamed")
        shares = [f"{decode[k]:.0%}" for k in kinds if k in decode] if decode else []
        of = ""
        if name in floors and "Remoe" in who:
            of = " / ".join(f"{speed / floor:.0%}" for floor in floors[name])
        cells = [name, who, f"{speed:.1f}", of, " / ".join(prefill), " / ".join(shares)]
        print("| " + " | ".join(cells) + " |", flush=True)
