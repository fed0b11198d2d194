"""Log lines are JSON objects with what was given and what every service's have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

CODE = """
import logging
from expert_fn.logs import configure_logging
configure_logging("info")
log = logging.getLogger("any")
log.debug("unseen")
log.warning("refused", extra={"code": "wrong_shape", "reason": ValueError("a\\nb")})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def test_lines_are_json_with_extra_fields_and_tracebacks() -> None:
    words = [sys.executable, "-c", CODE]
    done = subprocess.run(
        words, env=os.environ, capture_output=True, text=True, check=True, timeout=30
    )
    refused, failed = (json.loads(line) for line in done.stderr.splitlines())
    assert refused.pop("timestamp").endswith("+00:00")
    assert refused == {
        "service": "expert",
        "event": "refused",
        "level": "warning",
        "code": "wrong_shape",
        "reason": "a\nb",
    }
    assert "ZeroDivisionError" in failed["exception"]
