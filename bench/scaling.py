"""Time of one layer, half of whose experts are remote: against rows, experts and functions.

    python bench/scaling.py --plot docs/performance/scaling.svg

A layer is all that a decoding step has of it (attention, router, the call to an expert function,
the experts that are here), natively and through real functions on the same processors. Models are
random ones of Mixtral's shape, all with as many experts in all, so that their weights come from
memory alike: of more experts a layer there are fewer layers. Figures are medians of steps, by layer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils.logging import disable_progress_bar

from main_model_fn.http_transport import HttpTransport
from main_model_fn.loading import load_split_model
from main_model_fn.local_experts import NativeResidents
from main_model_fn.metering import StepMeter
from main_model_fn.native_attention import Paged
from main_model_fn.native_stack import DecoderLayer, NativeStack
from main_model_fn.split import SplitModule
from remoe.checkpoint import Checkpoint
from remoe.experts import Partition
from remoe.kernel.native_library import NativePool
from remoe.logs import configure_logging
from remoe.topology import ExpertEndpoint, Topology

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXPERTS = (8, 16, 32, 64, 128, 256)
FUNCTIONS = (1, 2, 4, 8, 16, 32)
ALL_EXPERTS = 256
HIDDEN, INNER, TOP_K = 576, 512, 2


class Series(NamedTuple):
    """Microseconds a layer by what was varied; `here` is the same with all experts here."""

    varied: str
    values: tuple[int, ...]
    remote_us: list[float]
    here_us: list[float]


def random_checkpoint(folder: Path, experts: int) -> Checkpoint:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=ALL_EXPERTS // experts,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        dtype="bfloat16",
    )
    target = folder / str(experts)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return Checkpoint.open(target)


@contextlib.contextmanager
def expert_functions(checkpoint: Checkpoint, count: int, threads: int) -> Iterator[Topology]:
    """So many expert functions, of as many layers each."""
    each = checkpoint.layers // count
    ports = [free_port() for _ in range(count)]
    endpoints = [
        ExpertEndpoint(
            name=f"e{n}",
            url=f"http://127.0.0.1:{port}",
            first_layer=n * each,
            last_layer=(n + 1) * each - 1,
            memory_gb=1,
        )
        for n, port in enumerate(ports)
    ]
    topology = Topology(
        model="bench",
        model_dir=str(checkpoint.model_dir),
        gateway_url="",
        planner_url="",
        main_url="",
        main_memory_gb=1,
        experts=endpoints,
    )
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "topology.json"
        topology.save(path)
        for endpoint, port in zip(endpoints, ports, strict=True):
            settings = {
                "PORT": str(port),
                "REMOE_TOPOLOGY": str(path),
                "REMOE_LOG_LEVEL": "warning",
                "REMOE_EXPERT_FIRST_LAYER": str(endpoint.first_layer),
                "REMOE_EXPERT_LAST_LAYER": str(endpoint.last_layer),
                "REMOE_EXPERT_THREADS": str(threads),
            }
            function = subprocess.Popen(
                [sys.executable, "-m", "expert_fn"], env=os.environ | settings
            )
            stack.callback(function.wait)
            stack.callback(function.terminate)
        for endpoint in endpoints:
            await_ready(endpoint.url)
        yield topology


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def await_ready(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=1).close()  # noqa: S310
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"{url} did not start")


class Layers:
    """A model's layers, with a share of the experts of each behind a topology's functions."""

    def __init__(
        self, checkpoint: Checkpoint, topology: Topology, pool: NativePool, share: float
    ) -> None:
        remote = tuple(range(round(checkpoint.experts * share)))
        meter = StepMeter(layers=checkpoint.layers, experts=checkpoint.experts, main_memory_gb=1)
        self._transport = HttpTransport(topology, timeout_s=10, hedge_floor_s=10)
        model = load_split_model(
            checkpoint.model_dir,
            partition=Partition(experts=checkpoint.experts, remote=(remote,) * checkpoint.layers),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            transport=self._transport,
            function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 1.0),
            meter=meter,
            pool=pool,
        )
        body = model.base_model
        layers = [DecoderLayer.of(module) for module in body.get_submodule("layers").children()]
        self._layers = [layer for layer in layers if layer is not None]
        assert len(self._layers) == checkpoint.layers
        self._modules = [cast("SplitModule", layer.experts) for layer in self._layers]
        self._stack = NativeStack(self._layers, pool)
        self._rotary = body.get_submodule("rotary_emb")

    def microseconds(self, rows: int, steps: int) -> float:
        """A layer's, of steps in which each of `rows` streams has one new token."""
        attention = self._layers[0].attention.call
        shape = (rows, attention.groups, attention.width)
        caches = [
            (torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
            for _ in self._layers
        ]
        places, ends = torch.arange(rows), torch.arange(rows + 1, dtype=torch.int32)
        paged = Paged(*caches[0], places, ends, ends, places)
        residents = [cast("NativeResidents", m.remoe.local.residents) for m in self._modules]
        generator = torch.Generator().manual_seed(rows)
        took = []
        with torch.inference_mode():
            for _ in range(steps + 3):
                hidden = torch.randn((rows, HIDDEN), generator=generator).to(torch.bfloat16)
                angles = self._rotary(hidden[None], torch.zeros((1, rows), dtype=torch.int64))
                began = time.perf_counter()
                self._stack.use(caches, residents)
                self._stack.run(
                    hidden,
                    angles,
                    paged,
                    lambda place, stop: self._modules[place].remoe.answer(
                        self._modules[place], stop
                    ),
                    beside=True,
                )
                took.append(time.perf_counter() - began)
        return 1e6 * statistics.median(took[3:]) / len(self._layers)

    def close(self) -> None:
        self._transport.close()


def measure(threads: int, steps: int) -> list[Series]:
    pool = NativePool(threads=threads, spins=2000)
    by_experts: list[tuple[float, float]] = []
    by_functions: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        first = random_checkpoint(Path(folder), EXPERTS[0])

        def both(
            checkpoint: Checkpoint, functions: int, rows: tuple[int, ...]
        ) -> list[tuple[float, float]]:
            """With half of the experts remote, and none, for each number of rows."""
            found = []
            with expert_functions(checkpoint, functions, threads) as topology:
                for share in (0.5, 0.0):
                    layers = Layers(checkpoint, topology, pool, share)
                    found.append(
                        [layers.microseconds(n, max(5, steps // (1 + n // 8))) for n in rows]
                    )
                    layers.close()
            return list(zip(*found, strict=True))

        by_rows = both(first, 1, ROWS)
        for functions in FUNCTIONS:
            by_functions += both(first, functions, (1,))
        for experts in EXPERTS:
            checkpoint = (
                first if experts == EXPERTS[0] else random_checkpoint(Path(folder), experts)
            )
            by_experts += both(checkpoint, 1, (1,))
    return [
        Series(varied, values, [r for r, _ in found], [h for _, h in found])
        for varied, values, found in (
            ("rows", ROWS, by_rows),
            ("experts a layer", EXPERTS, by_experts),
            ("functions", FUNCTIONS, by_functions),
        )
    ]


def report(series: Series) -> None:
    print(f"\n| {series.varied} | " + " | ".join(map(str, series.values)) + " |")
    print("|---|" + "--:|" * len(series.values))
    for name, times in (("half remote", series.remote_us), ("all here", series.here_us)):
        print(f"| {name}, us a layer | " + " | ".join(f"{t:.0f}" for t in times) + " |")
    extra = np.subtract(series.remote_us, series.here_us)
    print("| a remote half adds, us | " + " | ".join(f"{t:.0f}" for t in extra) + " |", flush=True)


def draw(all_series: list[Series], path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, series in zip(figure.subplots(1, len(all_series)), all_series, strict=True):
        axes.plot(series.values, series.remote_us, "o-", label="half of the experts remote")
        axes.plot(series.values, series.here_us, "s--", label="all experts here")
        axes.set_xscale("log", base=2)
        axes.set_xticks(series.values, [str(value) for value in series.values])
        axes.set_xlabel(series.varied)
        if series.varied == "rows":
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylabel("microseconds a layer (both axes logarithmic)")
            axes.legend()
        else:
            axes.set_ylim(0, 1.25 * max(series.remote_us))
            axes.set_ylabel("microseconds a layer, one row")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of one row; fewer of many rows")
    parser.add_argument("--plot", type=Path, help="write a picture here (.svg, .png, .pdf)")
    given = parser.parse_args()
    configure_logging("bench", "warning")
    disable_progress_bar()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    torch.set_num_threads(1)
    found = measure(given.threads, given.steps)
    for series in found:
        report(series)
    if given.plot:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
