"""Eight streams on the platform: replicas fixed at one a function, and MoEless' policies.

    python bench/moeless_live.py --model-dir DIR --prompts ../shared/data/prompts.jsonl

Each contender is a platform of its own on this machine. All are up, and asked in turns, so that
what else the machine does is the same for all of them; those that wait compute nothing. `fixed` is the
`remoe` policy with one replica of every expert function kept up, `moeless` and `joint` are the
policies, and `inside` is a platform without remote experts, which is what the policies may end at
under load. After a warm-up, which is also when the policies see the load, streams run side by side,
each asking the next prompt when its answer is done; so prompts are read while others decode.
Printed are the requests' times per output token and the memory held, by limit, as the resident
ledger counts it: the gateway, planner and main function are in it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from knative.local.control import ask_status
from remoe.errors import UnavailableError
from remoe.runtime_status import RuntimeStatus

_POLICIES = {"fixed": "remoe", "moeless": "moeless", "joint": "joint", "inside": "remoe"}
_QUESTIONS = (
    "How do vaccines work?",
    "Write a short poem about the sea in winter.",
    "Explain what a hash table is, with an example.",
    "What should I cook with rice, eggs and spinach?",
    "Summarise the causes of the French Revolution.",
    "My bicycle's chain keeps slipping. What can I do?",
    "What is the difference between a virus and a bacterium?",
    "Give me three ideas for a birthday present for my father.",
    "How does interest on a loan accumulate over the years?",
    "Describe how a sailing boat can go against the wind.",
    "Why is the sky blue in the day and red in the evening?",
    "Write a Python function that reverses a list.",
)


@dataclass
class Figures:
    """Of one contender, over all its rounds; seconds, and GB of memory held while requests ran."""

    tpot_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    held_gb: list[float] = field(default_factory=list)
    expert_replicas: list[int] = field(default_factory=list)
    remote_calls: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    turns_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        held_gb = float(np.mean(self.held_gb))
        return {
            "tpot_p50_ms": float(np.quantile(self.tpot_s, 0.5)) * 1e3,
            "tpot_p95_ms": float(np.quantile(self.tpot_s, 0.95)) * 1e3,
            "ttft_p50_ms": float(np.quantile(self.ttft_s, 0.5)) * 1e3,
            "tokens_per_s": self.tokens / self.wall_s,
            "held_gb": held_gb,
            "resident_gb_s_per_token": held_gb * self.wall_s / self.tokens,
            "expert_replicas": float(np.mean(self.expert_replicas)),
            "calls_per_token": self.remote_calls / self.tokens,
        }


@contextmanager
def platform(policy: str, args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """A running platform: its URL and control socket."""
    with tempfile.TemporaryDirectory(prefix="remoe-live-") as home, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "remoe.cli", "up", "--model-dir", str(args.model_dir)]
        command += ["--port", str(port), "--policy", _POLICIES[policy]]
        ratio = 0.0 if policy == "inside" else args.remote_ratio
        command += ["--remote-ratio", str(ratio), "--window", args.window]
        command += ["--threads", str(args.threads)]
        # Fixed replicas are never let go: an idle function's window is longer than the run.
        if policy == "fixed":
            command[command.index("--window") + 1] = "1h"
        process = subprocess.Popen(
            command,
            env={**os.environ, "REMOE_HOME": home},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            control = Path(home) / "run" / "control.sock"
            wait_for(lambda: is_up(f"http://127.0.0.1:{port}/readyz"), 300)
            yield f"http://127.0.0.1:{port}", control
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(happened: object, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():  # type: ignore[operator]
        if time.monotonic() > deadline:
            sys.exit(f"the platform was not ready within {timeout_s:g} s")
        time.sleep(0.2)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except OSError:
        return False


def ask(url: str, prompt: str, tokens: int) -> dict[str, object]:
    """One answer of exactly so many tokens; the last event's `x_remoe`."""
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body["model"] = models(url)[0]
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    receipt: dict[str, object] = {}
    with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                receipt = event.get("x_remoe") or receipt
    return receipt


def models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:  # noqa: S310
        return [model["id"] for model in json.load(reply)["data"]]


def held_gb(status: RuntimeStatus) -> tuple[float, int]:
    """Memory by limit of all live replicas, and how many of them compute experts."""
    held = sum(one.memory_limit_bytes * len(one.replicas) for one in status.functions) / 1e9
    experts = sum(len(one.replicas) for one in status.functions if "-experts-" in one.name)
    return held, experts


def watch(control: Path, figures: Figures, done: threading.Event) -> None:
    while not done.wait(0.5):
        try:
            held, experts = held_gb(ask_status(control))
        except UnavailableError:
            continue
        figures.held_gb.append(held)
        figures.expert_replicas.append(experts)


@dataclass(frozen=True)
class Contender:
    url: str
    control: Path
    figures: Figures = field(default_factory=Figures)

    def turn(self, pool: concurrent.futures.Executor, prompts: list[str], tokens: int) -> None:
        """As many streams as the pool has threads, until all prompts are answered."""
        into, done = self.figures, threading.Event()
        watcher = threading.Thread(target=watch, args=(self.control, into, done))
        watcher.start()
        began = time.monotonic()
        for receipt in pool.map(lambda prompt: ask(self.url, prompt, tokens), prompts):
            into.tpot_s.append(float(receipt["tpot_ms"]) / 1e3)  # type: ignore[arg-type]
            into.ttft_s.append(float(receipt["ttft_ms"]) / 1e3)  # type: ignore[arg-type]
            into.remote_calls += int(receipt["remote_calls"])  # type: ignore[call-overload]
            into.tokens += tokens
        into.wall_s += time.monotonic() - began
        into.turns_s.append(time.monotonic() - began)
        done.set()
        watcher.join()


def read_prompts(args: argparse.Namespace, count: int) -> list[str]:
    texts = list(_QUESTIONS)
    if args.prompts:
        rows = [json.loads(line) for line in args.prompts.read_text().splitlines() if line]
        texts = [str(row.get("prompt") or row.get("text")) for row in rows]
        np.random.default_rng(args.seed).shuffle(texts)
    return [texts[index % len(texts)] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="JSON lines with a `prompt` or `text` each")
    parser.add_argument("--policies", nargs="+", choices=[*_POLICIES], default=[*_POLICIES])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="measured, in each turn")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contender")
    parser.add_argument("--remote-ratio", type=float, default=0.5)
    parser.add_argument("--window", default="60s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for every figure")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    prompts = read_prompts(args, args.streams + args.requests)
    with ExitStack() as running, concurrent.futures.ThreadPoolExecutor(args.streams) as pool:
        contenders = {
            policy: Contender(*running.enter_context(platform(policy, args)))
            for policy in args.policies
        }
        for one in contenders.values():
            list(pool.map(lambda p, url=one.url: ask(url, p, args.tokens), prompts[: args.streams]))
        for number in range(args.rounds):
            # Each is first in turn.
            for place in range(len(contenders)):
                policy = args.policies[(number + place) % len(contenders)]
                contenders[policy].turn(pool, prompts[args.streams :], args.tokens)
            results = {policy: one.figures for policy, one in contenders.items()}
            if args.out is not None:
                raw = {policy: asdict(figures) for policy, figures in results.items()}
                args.out.write_text(json.dumps(raw, indent=1) + "\n")
        report(results)


def report(results: dict[str, Figures]) -> None:
    """A line for each contender, and what the policies change."""
    print(
        f"{'policy':<9}{'TPOT p50':>10}{'p95':>9}{'TTFT p50':>10}{'tok/s':>8}{'held GB':>9}"
        f"{'GB·s/token':>12}{'expert replicas':>17}{'calls/token':>13}"
    )
    summary = {policy: figures.summary() for policy, figures in results.items()}
    for policy, one in summary.items():
        print(
            f"{policy:<9}{one['tpot_p50_ms']:7.1f} ms{one['tpot_p95_ms']:6.1f} ms"
            f"{one['ttft_p50_ms']:7.0f} ms{one['tokens_per_s']:8.1f}{one['held_gb']:9.2f}"
            f"{one['resident_gb_s_per_token']:12.4f}{one['expert_replicas']:17.1f}"
            f"{one['calls_per_token']:13.2f}"
        )
    for policy, one in summary.items():
        if policy != "fixed" and "fixed" in summary:
            median, tail, cost = (
                one[name] / summary["fixed"][name] - 1
                for name in ("tpot_p50_ms", "tpot_p95_ms", "resident_gb_s_per_token")
            )
            print(
                f"{policy}: TPOT p50 {median:+.1%}, p95 {tail:+.1%}, resident a token {cost:+.1%}"
            )


if __name__ == "__main__":
    main()
