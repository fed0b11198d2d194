"""What the main function holds against what its plan says, at several shares of remote experts.

    python bench/memory.py --tokens 64

Runs the platform once for each share, sends one request, and reads the main function's memory
from the system (Linux). Own memory is anonymous; weights that lie where the checkpoint's files
are mapped are counted apart, as the system counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from main_model_fn.config import MainSettings
from remoe.checkpoint import Checkpoint
from remoe.cli.model import built_model
from remoe.experts import Partition
from remoe.home import remoe_home

_MIB = 1 << 20
_READY_S = 120


def fetch(url: str, body: dict[str, object] | None = None, timeout_s: float = 300) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        answer: bytes = response.read()
    return answer


def memory_of(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed bytes of a process."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if ":" in line
    )
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def measure(share: float, model_dir: Path, args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(model_dir)
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").symlink_to(remoe_home() / "models")
        env = {**os.environ, "REMOE_HOME": home}
        command = [sys.executable, "-m", "remoe.cli"]
        up = [*command, "up", "--port", str(args.port), "--remote-ratio", str(share)]
        platform = subprocess.Popen(up, env=env, stdout=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{args.port}"
            until = time.monotonic() + _READY_S
            while True:
                try:
                    fetch(f"{address}/readyz")
                    break
                except (urllib.error.URLError, OSError):
                    if platform.poll() is not None or time.monotonic() > until:
                        raise SystemExit("the platform did not start") from None
                    time.sleep(0.5)
            prompt = "Explain how a rainbow comes about, and why it is curved."
            body: dict[str, object] = {
                "messages": [{"role": "user", "content": prompt}],
                "model": json.loads(fetch(f"{address}/v1/models"))["data"][0]["id"],
                "max_tokens": args.tokens,
                "temperature": 0,
            }
            fetch(f"{address}/v1/chat/completions", body)
            status = json.loads(
                subprocess.run(
                    [*command, "status", "--json"], env=env, capture_output=True, check=True
                ).stdout
            )
            main = next(f for f in status["functions"] if f["name"].endswith("-main"))
            own, mapped = memory_of(main["replicas"][0]["pid"])
            # The planner's deployment says which experts this replica holds.
            claimed = json.loads(fetch(f"{main['url']}/v1/deployment"))["partition"]
            partition = Partition(
                experts=claimed["experts"], remote=tuple(tuple(r) for r in claimed["remote"])
            )
        finally:
            platform.send_signal(signal.SIGINT)
            platform.wait(60)
    resident = checkpoint.expert_count - partition.remote_count
    experts = resident * checkpoint.expert_size_bytes
    dense = checkpoint.non_expert_size_bytes
    cached = MainSettings.model_fields["kv_tokens"].default * checkpoint.kv_bytes_per_token
    rest = own + mapped - experts - dense - cached
    cells = [experts, dense, cached, own, mapped, own + mapped, rest]
    print(f"| {share:.0%} | {resident} | " + " | ".join(f"{c / _MIB:,.0f}" for c in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, help="default: the built default model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--port", type=int, default=8393)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    args = parser.parse_args()
    model_dir = args.model_dir or built_model()
    print("MiB of the main function, by formula and as the system counts it\n")
    print("| remote | experts here | their weights | dense | cache | own | mapped | all | rest |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for share in args.shares:
        measure(share, model_dir, args)


if __name__ == "__main__":
    main()
