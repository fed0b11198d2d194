"""MoE layers over several GPUs: plain expert parallelism, EPLB, and MoEless, on the same batches.

    python bench/expert_parallel.py --out results            # one rank a GPU, Mixtral's shapes
    python bench/expert_parallel.py --device cpu --ranks 2 --hidden 64 --inner 128 --tokens 64

Random weights; routing is Zipf's, popularity by layer, and drifts: every few batches two experts
of each layer change places. EPLB places by the loads of the batches before the first drift;
MoEless by a prediction a layer ahead that gets `--accuracy` of the routes right. All hold as many
expert weights, but plain, which has no use for more. Oracle spreads routes evenly whatever the
router says, which is another model's answer: the bound. A layer's time is the slowest rank's,
planning and whatever transfers could not hide included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

# A GPU's settings are its host's: multicast over NVLink stays off.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.routing_scenarios import HISTORY, Scenario, recorded_routing, zipf_routing
from main_model_fn.expert_parallel.balancer import next_placement
from main_model_fn.expert_parallel.groups import open_groups
from main_model_fn.expert_parallel.layer import ExpertParallelLayer
from main_model_fn.expert_parallel.replica_store import ExpertShape, ReplicaStore
from remoe.moeless.baselines import expert_parallel
from remoe.moeless.eplb import eplb
from remoe.moeless.placement import Placement

_POLICIES = ("plain", "eplb", "moeless", "oracle")
_CHECKED = 64


class Bench:
    """One rank's side of it."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.rank = dist.get_rank()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape = ExpertShape(args.hidden, args.inner, dtype)
        self.rows, self.weights = open_groups(device)
        generator = torch.Generator(device).manual_seed(args.seed + self.rank)
        self.hidden = torch.randn(args.tokens, args.hidden, generator=generator, device=device)
        gates = torch.rand(args.tokens, args.top_k, generator=generator, device=device)
        self.hidden = self.hidden.to(dtype)
        self.gates = (gates / gates.sum(-1, keepdim=True)).to(dtype)
        self.plain_out = torch.zeros(0)

    def read(self, layer: int, expert: int) -> torch.Tensor:
        """The same weights on every rank, [numel], scaled so that rows keep their size."""
        seed = self.args.seed + 1 + layer * self.args.experts + expert
        generator = torch.Generator(self.device).manual_seed(seed)
        flat = torch.randn(
            self.shape.numel, generator=generator, device=self.device, dtype=self.shape.dtype
        )
        gate_up, down = self.shape.matrices(flat)
        gate_up /= self.args.hidden**0.5
        down /= self.args.inner**0.5
        return flat

    def layers(self, policy: str, scenario: Scenario) -> list[ExpertParallelLayer]:
        """A layer's ranks have `slots` each: as many as experts a rank, and the spare ones."""
        args = self.args
        own = -(-args.experts // args.ranks)
        slots = own + (args.slots if policy in {"eplb", "moeless"} else 0)

        def first_placement(layer: int) -> Placement:
            if policy != "eplb":
                return expert_parallel(args.experts, args.ranks)
            seen = scenario.experts[:HISTORY, layer].ravel()
            loads = np.bincount(seen, minlength=args.experts).astype(float)
            return eplb(loads, slots=slots * args.ranks, gpus=args.ranks)

        return [
            ExpertParallelLayer(
                ReplicaStore(
                    self.shape,
                    first_placement(layer),
                    slots=slots,
                    read=partial(self.read, layer),
                    device=self.device,
                    group=self.weights,
                ),
                experts=args.experts,
                group=self.rows,
            )
            for layer in range(args.layers)
        ]

    def chosen(self, policy: str, scenario: Scenario) -> torch.Tensor:
        """This rank's routes on the device: [batches, layers, tokens, top_k]."""
        args = self.args
        part = slice(self.rank * args.tokens, (self.rank + 1) * args.tokens)
        own = scenario.experts[:, :, part]
        if policy == "oracle":
            own = np.broadcast_to(
                np.arange(own[0, 0].size).reshape(own.shape[2:]) % args.experts, own.shape
            )
        return torch.from_numpy(np.ascontiguousarray(own)).to(self.device)

    def predictions(self, scenario: Scenario) -> torch.Tensor:
        """Loads that this rank predicts, int64 [batches, layers, experts].

        So many routes as `accuracy` leaves wrong are drawn by popularity instead.
        """
        args = self.args
        random = np.random.default_rng(args.seed + 1000 + self.rank)
        part = slice(self.rank * args.tokens, (self.rank + 1) * args.tokens)
        own = scenario.experts[:, :, part]
        loads = np.zeros((*own.shape[:2], args.experts), np.int64)
        for batch, layer in np.ndindex(own.shape[:2]):
            flat = own[batch, layer].ravel()
            wrong = random.random(flat.size) > args.accuracy
            drawn = random.choice(args.experts, wrong.sum(), p=scenario.popularity[batch, layer])
            loads[batch, layer] = np.bincount(flat[~wrong], minlength=args.experts)
            loads[batch, layer] += np.bincount(drawn, minlength=args.experts)
        return torch.from_numpy(loads).to(self.device)

    def rebalance(self, store: ReplicaStore, loads: NDArray[np.intp]) -> int:
        wanted = next_placement(
            loads.astype(float),
            store.placement,
            warm=store.book.warm,
            slots=store.slots,
            warm_slack=self.args.warm_slack,
        )
        return store.change(wanted) if wanted is not store.placement else 0

    def now(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def run(self, policy: str, scenario: Scenario) -> dict[str, float]:  # noqa: C901
        """All batches under one policy; figures are of those after the history's."""
        args = self.args
        layers = self.layers(policy, scenario)
        chosen = self.chosen(policy, scenario)
        predicted = self.predictions(scenario) if policy == "moeless" else None
        marks: list[list[object]] = []
        balance, attached, replicas, plan_s = [], 0, [], []
        last: list[NDArray[np.intp] | None] = [None] * args.layers

        def plan(layer: int, loads: NDArray[np.intp] | None) -> None:
            nonlocal attached
            began = time.perf_counter()
            if policy == "moeless" and loads is not None:
                attached += self.rebalance(layers[layer].store, loads)
            plan_s.append(time.perf_counter() - began)

        with torch.inference_mode():
            for batch in range(len(chosen)):
                if batch == HISTORY:
                    attached, plan_s = 0, []
                x = self.hidden
                marks.append([self.now()])
                for layer in range(min(args.distance, args.layers)):
                    plan(layer, last[layer])  # nothing runs before it: what it had last time
                for index, layer in enumerate(layers):
                    target = index + args.distance
                    ahead = None
                    if predicted is not None and target < args.layers:
                        ahead = predicted[batch, target]
                    out = layer.forward(x, chosen[batch, index], self.gates, ahead=ahead)
                    last[index] = layer.loads.experts
                    if ahead is not None:
                        plan(target, layer.loads.ahead)
                    x = functional.rms_norm(x + out, (args.hidden,))
                    marks[-1].append(self.now())
                    if batch >= HISTORY:
                        balance.append(layer.loads.ranks.max() / layer.loads.ranks.mean())
                        replicas.append(len(layer.store.placement.expert))
        times_s = self.slowest(marks[HISTORY:])
        result = {
            "layer_p50_ms": float(np.median(times_s)) * 1e3,
            "layer_mean_ms": float(times_s.mean()) * 1e3,
            "layer_p95_ms": float(np.quantile(times_s, 0.95)) * 1e3,
            "balance": float(np.mean(balance)),
            "replicas": float(np.mean(replicas)),
            "attached_per_layer": attached / times_s.size,
            "plan_ms": float(np.median(plan_s)) * 1e3,
            **self.check(policy, layers[0], chosen[-1, 0]),
        }
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def slowest(self, marks: list[list[object]]) -> NDArray[np.float64]:
        """Seconds of each layer of each batch on its slowest rank: [batches, layers]."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            spans = [
                [a.elapsed_time(b) / 1e3 for a, b in pairwise(row)]  # type: ignore[attr-defined]
                for row in marks
            ]
        else:
            spans = [[b - a for a, b in pairwise(row)] for row in marks]  # type: ignore[operator]
        times = torch.tensor(spans, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times.cpu().numpy()

    def check(
        self, policy: str, layer: ExpertParallelLayer, chosen: torch.Tensor
    ) -> dict[str, float]:
        """The first layer's output, as it is placed at the end: the worst rank's relative errors.

        Against float32 arithmetic on some tokens, and against what the plain policy gave on all.
        """
        with torch.inference_mode():
            out = layer.forward(self.hidden, chosen, self.gates).float()
            if policy == "oracle":
                return {}
            if policy == "plain":
                self.plain_out = out
            some = out[:_CHECKED]
            expected = torch.zeros_like(some)
            rows, index = self.hidden[:_CHECKED].float(), chosen[:_CHECKED]
            for expert in range(self.args.experts):
                token, slot = (index == expert).nonzero(as_tuple=True)
                gate_up, down = self.shape.matrices(self.read(0, expert).float())
                gate, up = (rows[token] @ gate_up.T).chunk(2, dim=-1)
                one = (functional.silu(gate) * up) @ down.T
                expected.index_add_(0, token, one * self.gates[token, slot, None].float())
            errors = torch.stack(
                [
                    (some - expected).norm() / expected.norm(),
                    (out - self.plain_out).norm() / self.plain_out.norm(),
                ]
            )
            dist.all_reduce(errors, op=dist.ReduceOp.MAX)
        return {"error": float(errors[0]), "unlike_plain": float(errors[1])}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    header = (
        f"{'routing':<18}{'policy':<9}{'p50 ms':>8}{'mean':>8}{'p95':>8}{'vs plain':>10}"
        f"{'vs eplb':>9}{'max/mean':>10}{'replicas':>10}{'attached':>10}{'plan ms':>9}{'error':>10}"
        f"{'unlike plain':>14}"
    )
    lines = [header]
    for scenario, policies in results.items():
        for policy, figures in policies.items():
            against = [
                f"{figures['layer_mean_ms'] / policies[base]['layer_mean_ms'] - 1:+.1%}"
                for base in ("plain", "eplb")
            ]
            lines.append(
                f"{scenario:<18}{policy:<9}{figures['layer_p50_ms']:8.3f}"
                f"{figures['layer_mean_ms']:8.3f}{figures['layer_p95_ms']:8.3f}"
                f"{against[0]:>10}{against[1]:>9}{figures['balance']:10.3f}"
                f"{figures['replicas']:10.1f}{figures['attached_per_layer']:10.3f}"
                f"{figures['plan_ms']:9.3f}{figures.get('error', float('nan')):10.1e}"
                f"{figures.get('unlike_plain', float('nan')):14.1e}"
            )
    return "\n".join(lines)


def run_rank(rank: int, args: argparse.Namespace, address: str | None) -> None:
    """One process: its device first, then the group, then everything else."""
    cuda = args.device == "cuda"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=address or "env://",
        rank=rank,
        world_size=args.ranks,
        timeout=timedelta(seconds=60),
    )
    began = time.perf_counter()
    bench = Bench(args, device)
    results: dict[str, dict[str, dict[str, float]]] = {}
    cases: list[Callable[[], Scenario]] = (
        [partial(recorded_routing, args)]
        if args.routing
        else [
            partial(zipf_routing, args, skew, drift)
            for skew in args.zipf
            for drift in ((args.drift, 0) if skew == args.zipf[0] else (args.drift,))
        ]
    )
    for case in cases:
        scenario = case()
        results[scenario.name] = {p: bench.run(p, scenario) for p in _POLICIES}
        if rank == 0:
            report(args, device, results, time.perf_counter() - began)
    if rank == 0:
        print(f"{time.perf_counter() - began:.1f} s in all", flush=True)
    dist.destroy_process_group()


def report(
    args: argparse.Namespace,
    device: torch.device,
    results: dict[str, dict[str, dict[str, float]]],
    wall_s: float,
) -> None:
    """Written after each scenario, so that what was measured outlives whatever comes."""
    text = table(results)
    header, *rows = text.splitlines()
    print(*[header][: len(results) == 1], *rows[-len(_POLICIES) :], sep="\n", flush=True)
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "wall_s": wall_s,
        "results": results,
    }
    (args.out / "expert_parallel.json").write_text(json.dumps(facts, indent=2) + "\n")
    (args.out / "expert_parallel.txt").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    gpus = torch.cuda.device_count()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    parser.add_argument("--ranks", type=int, default=max(gpus, 2))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14_336)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank, in each batch")
    parser.add_argument("--batches", type=int, default=32, help="measured, after eight others")
    parser.add_argument("--slots", type=int, default=2, help="replicas beside a rank's own experts")
    parser.add_argument("--zipf", type=float, nargs="+", default=[1.0, 0.5, 1.5])
    parser.add_argument("--drift", type=int, default=8, help="batches between drifts; 0 for none")
    parser.add_argument("--accuracy", type=float, default=0.9, help="of the load prediction")
    parser.add_argument("--distance", type=int, default=1, help="layers that it looks ahead")
    parser.add_argument(
        "--warm-slack", type=float, default=0.05, help="load over the mean for a warm place's sake"
    )
    parser.add_argument(
        "--routing",
        type=Path,
        help="recorded routes instead of Zipf's: a folder of `remoe profile gates --keep-recording`",
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON and as a table")
    args = parser.parse_args()
    if args.device == "cuda" and gpus < args.ranks:
        parser.error(f"{args.ranks} ranks need as many GPUs, {gpus} are here; or use --device cpu")
    if "RANK" in os.environ:  # torchrun
        args.ranks = int(os.environ["WORLD_SIZE"])
        run_rank(int(os.environ["RANK"]), args, None)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    mp.spawn(run_rank, args=(args, address), nprocs=args.ranks)


if __name__ == "__main__":
    main()
