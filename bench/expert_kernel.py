"""One expert of a checkpoint, computed by each implementation there is; and a function's cold start.

    python bench/expert_kernel.py --model DIR

Calls go through all of the checkpoint's experts in turn, so that with more of them than the last
cache holds (printed) each call finds its weights in memory. Float32 copies are of the first 48.
Implementations take turns in random order; figures are medians. "read only" is the floor: as many
threads read the same weights and compute nothing. Each thread count is measured in
its own process. `OPENBLAS_CORETYPE` is dropped, so that numpy chooses its own routines.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, PATH, ExpertCall, ExpertReply
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool
from remoe.kernel.numpy_kernel import NumpyKernel
from remoe.topology import ExpertEndpoint, Topology

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COPIES = 48
Forward = Callable[[ExpertId, NDArray[np.float32]], object]


def routed(x: NDArray[np.generic]) -> RoutedRows:
    rows = len(x)
    return RoutedRows(x, [0, rows], np.arange(rows, dtype="<i4"), np.ones(rows, "<f4"))


def bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def torch_forward(checkpoint: Checkpoint, threads: int, *, widened: bool) -> Forward:
    import torch

    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    torch.set_num_threads(threads)
    dtype = torch.float32 if widened else torch.bfloat16
    cache: dict[ExpertId, tuple[torch.Tensor, ...]] = {}

    def weights(expert: ExpertId) -> tuple[torch.Tensor, ...]:
        tensors = checkpoint.expert(expert)
        return tuple(
            torch.frombuffer(tensor.values, dtype=torch.bfloat16)
            .view(tensor.values.shape)
            .to(dtype)
            for tensor in (tensors.gate, tensors.up, tensors.down)
        )

    @torch.inference_mode()
    def forward(expert: ExpertId, x: NDArray[np.float32]) -> object:
        if expert not in cache:
            cache[expert] = weights(expert)
        gate, up, down = cache[expert]
        rows = torch.from_numpy(x).to(dtype)
        inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        return inner @ down.T

    return forward


def onnx_forward(checkpoint: Checkpoint, threads: int) -> Forward:
    """A session for each expert, so that the library may pack its weights as it likes."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions: dict[ExpertId, onnxruntime.InferenceSession] = {}

    def session(expert: ExpertId) -> onnxruntime.InferenceSession:
        tensors = checkpoint.expert(expert)
        weights = [
            numpy_helper.from_array(np.ascontiguousarray(tensor.to_float32().T), name)
            for name, tensor in (
                ("gate", tensors.gate),
                ("up", tensors.up),
                ("down", tensors.down),
            )
        ]
        nodes = [
            helper.make_node(kind, inputs, [output])
            for kind, inputs, output in (
                ("MatMul", ["x", "gate"], "g"),
                ("Sigmoid", ["g"], "s"),
                ("Mul", ["g", "s"], "silu"),
                ("MatMul", ["x", "up"], "u"),
                ("Mul", ["silu", "u"], "inner"),
                ("MatMul", ["inner", "down"], "y"),
            )
        ]
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, checkpoint.hidden_size])
            for name in ("x", "y")
        )
        graph = helper.make_graph(nodes, "expert", [x], [y], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9  # what the runtime is sure to read
        onnx.checker.check_model(model)
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def forward(expert: ExpertId, x: NDArray[np.float32]) -> object:
        if expert not in sessions:
            sessions[expert] = session(expert)
        return sessions[expert].run(None, {"x": x})

    return forward


def implementations(checkpoint: Checkpoint, threads: int) -> dict[str, tuple[Forward, int]]:
    """Name to how it computes, and how many experts it goes through."""
    everything = checkpoint.layers * checkpoint.experts
    native = NativeKernel(checkpoint.expert, NativePool(threads=threads))
    in_numpy = NumpyKernel(checkpoint.expert)
    found: dict[str, tuple[Forward, int]] = {
        "read only": (reader(checkpoint, threads), everything),
        "native": (lambda e, x: native.weighted_sum([e], routed(x)), everything),
        "native, bf16 rows": (
            lambda e, x: native.weighted_sum([e], routed(bfloat16(x))),
            everything,
        ),
        "numpy fp32": (lambda e, x: in_numpy.weighted_sum([e], routed(x)), COPIES),
    }
    if importlib.util.find_spec("torch"):
        found["torch bf16"] = (torch_forward(checkpoint, threads, widened=False), everything)
        found["torch fp32"] = (torch_forward(checkpoint, threads, widened=True), COPIES)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found["onnxruntime fp32"] = (onnx_forward(checkpoint, threads), COPIES)
    print(f"kernel: {native.description}")
    return found


def reader(checkpoint: Checkpoint, threads: int) -> Forward:
    """The floor: numpy's vectorised maximum over the same mapped weights."""
    pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def read(expert: ExpertId, x: NDArray[np.float32]) -> object:
        tensors = checkpoint.expert(expert)
        parts = [
            piece
            for tensor in (tensors.gate, tensors.up, tensors.down)
            for piece in np.array_split(tensor.values.reshape(-1).view(np.uint64), threads)
        ]
        others = [
            pool.submit(lambda mine: [piece.max() for piece in mine], parts[place::threads])
            for place in range(1, threads)
            if pool is not None
        ]
        return [piece.max() for piece in parts[::threads]], [other.result() for other in others]

    return read


def compute(model: Path, threads: int, rounds: int) -> None:
    checkpoint = Checkpoint.open(model)
    everything = checkpoint.layers * checkpoint.experts
    size = checkpoint.expert_size_bytes
    print(f"\n## {threads} thread(s); {everything} experts of {size / 1e6:.1f} MB")
    found = implementations(checkpoint, threads)
    places = {name: count() for name in found}
    rng = np.random.default_rng(0)

    def once(name: str, x: NDArray[np.float32]) -> float:
        forward, experts = found[name]
        place = next(places[name]) % experts
        expert = ExpertId(place // checkpoint.experts, place % checkpoint.experts)
        began = time.perf_counter()
        forward(expert, x)
        return time.perf_counter() - began

    for name, (_, experts) in found.items():
        for _ in range(experts):  # map, widen
            once(name, np.zeros((1, checkpoint.hidden_size), np.float32))
    print(f"| rows | {' | '.join(f'{name} µs' for name in found)} | best other / native |")
    print("|---|" + "---|" * (len(found) + 1))
    for rows in ROWS:
        x = rng.standard_normal((rows, checkpoint.hidden_size)).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(max(12, rounds // (1 + rows // 8))):
            for name in random.sample(list(found), len(found)):
                times[name].append(once(name, x))
        middle = {name: statistics.median(taken) for name, taken in times.items()}
        cells = " | ".join(f"{1e6 * value:.0f}" for value in middle.values())
        print(f"| {rows} | {cells} | {ratios(middle)} |", flush=True)


def ratios(seconds: dict[str, float]) -> str:
    """How much faster native is than the best other on float32 rows, and on bfloat16 rows."""
    whole = min(value for name, value in seconds.items() if name.endswith("fp32"))
    text = f"{whole / seconds['native']:.2f}"
    if "torch bf16" in seconds:
        text += f"; bf16 {seconds['torch bf16'] / seconds['native, bf16 rows']:.2f}"
    return text


_EXEC_WITH_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-m", "expert_fn"])
"""


@contextmanager
def function(topology: Path, listener: socket.socket, kernel: str) -> Iterator[int]:
    """A process that serves the topology's first layers on `listener`; gives its id."""
    last_layer = Topology.load(topology).experts[0].last_layer
    process = subprocess.Popen(
        [sys.executable, "-c", _EXEC_WITH_SOCKET, str(listener.fileno())],
        pass_fds=(listener.fileno(),),
        env={
            **os.environ,
            "LISTEN_FDS": "1",
            "REMOE_TOPOLOGY": str(topology),
            "REMOE_LOG_LEVEL": "warning",
            "REMOE_EXPERT_FIRST_LAYER": "0",
            "REMOE_EXPERT_LAST_LAYER": str(last_layer),
            "REMOE_EXPERT_KERNEL": kernel,
        },
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(timeout=10)


def call(connection: http.client.HTTPConnection, body: bytes) -> NDArray[np.float32]:
    connection.request("POST", PATH, body, {"Content-Type": CONTENT_TYPE})
    with connection.getresponse() as response:
        answer = response.read()
        assert response.status == 200, answer
    reply = msgspec.msgpack.decode(answer, type=ExpertReply)
    return np.frombuffer(reply.partial, "<f4")


def body_for(checkpoint: Checkpoint, expert: ExpertId, x: NDArray[np.float32]) -> bytes:
    rows = routed(x)
    return msgspec.msgpack.encode(
        ExpertCall(
            model_digest=checkpoint.digest,
            layer=expert.layer,
            dtype="float32",
            rows=1,
            hidden=x.tobytes(),
            experts=[expert.index],
            offsets=[0, 1],
            row_index=rows.row_index.tobytes(),
            gate=rows.gate.tobytes(),
        )
    )


def cold_start(model: Path, repeats: int) -> None:
    checkpoint = Checkpoint.open(model)
    layers = max(1, round(160e6 / checkpoint.experts / checkpoint.expert_size_bytes))
    held = [ExpertId(layer, e) for layer in range(layers) for e in range(checkpoint.experts)]
    print(f"\n## Cold start of a function holding {len(held)} experts, page cache warm")
    x = np.random.default_rng(0).standard_normal((1, checkpoint.hidden_size)).astype(np.float32)
    expected = NumpyKernel(checkpoint.expert).weighted_sum([held[0]], routed(x))[0]
    print("| kernel | spawn to first correct reply, ms | then each expert once, ms | RssAnon MB |")
    print("|---|---|---|---|")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.TemporaryDirectory() as folder,
    ):
        port = listener.getsockname()[1]
        endpoint = ExpertEndpoint(
            name="experts",
            url=f"http://127.0.0.1:{port}",
            first_layer=0,
            last_layer=layers - 1,
            memory_gb=1,
        )
        nowhere = "http://127.0.0.1:9"
        topology = Path(folder) / "topology.json"
        Topology(
            model="bench",
            model_dir=str(model),
            gateway_url=nowhere,
            planner_url=nowhere,
            main_url=nowhere,
            main_memory_gb=1,
            experts=[endpoint],
        ).save(topology)
        for kernel in ("native", "numpy"):
            firsts, rests, own = [], [], []
            for _ in range(repeats):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                began = time.perf_counter()
                with function(topology, listener, kernel) as process:
                    got = call(connection, body_for(checkpoint, held[0], x))
                    firsts.append(time.perf_counter() - began)
                    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
                    began = time.perf_counter()
                    for expert in held:
                        call(connection, body_for(checkpoint, expert, x))
                    rests.append(time.perf_counter() - began)
                    own.append(anonymous_mb(process))
                    connection.close()
            middle = [statistics.median(values) for values in (firsts, rests, own)]
            print(f"| {kernel} | {1e3 * middle[0]:.0f} | {1e3 * middle[1]:.0f} | {middle[2]:.0f} |")


def anonymous_mb(process: int) -> float:
    fields = Path(f"/proc/{process}/status").read_text(encoding="utf-8").split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024 / 1e6


def machine() -> dict[str, object]:
    caches = subprocess.run(["lscpu", "-J"], capture_output=True, text=True, check=False).stdout
    fields = json.loads(caches)["lscpu"] if caches else []
    wanted = ("Model name:", "CPU(s):", "L2 cache:", "L3 cache:")
    facts = {field["field"]: field["data"] for field in fields if field["field"] in wanted}
    return {**facts, "python": platform.python_version(), "numpy": np.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=60, help="calls per figure at one row")
    parser.add_argument("--starts", type=int, default=7, help="cold starts per figure")
    parser.add_argument("--only-compute", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_compute:
        compute(given.model, given.only_compute, given.rounds)
        return
    print(machine(), flush=True)
    environment = {name: v for name, v in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    for threads in given.threads:
        words = [sys.executable, __file__, "--model", str(given.model)]
        words += ["--rounds", str(given.rounds), "--only-compute", str(threads)]
        limits = {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        subprocess.run(words, env=environment | limits, check=True)
    os.environ.pop("OPENBLAS_CORETYPE", None)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    cold_start(given.model, given.starts)


if __name__ == "__main__":
    main()
