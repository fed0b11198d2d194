"""`python -m remoe.cli`: the same as `remoe`."""

from __future__ import annotations

from remoe.cli import app

if __name__ == "__main__":
    app(prog_name="remoe")
