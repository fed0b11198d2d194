"""Where Remoe keeps what outlives a run: models, the ledger, and the run directory."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_ledger_url", "remoe_home"]


def remoe_home() -> Path:
    """`$REMOE_HOME`, or `~/.cache/remoe`."""
    home = os.environ.get("REMOE_HOME")
    return Path(home).expanduser().resolve() if home else Path.home() / ".cache" / "remoe"


def default_ledger_url() -> str:
    """The embedded ledger that `remoe up`, `remoe bill` and `remoe key` share."""
    return f"sqlite:///{remoe_home() / 'ledger.db'}"
