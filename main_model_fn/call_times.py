"""t^rem: what a warm call of an expert function takes beside computing, from where calls are made.

`python -m main_model_fn.call_times` in a main function's container measures through whatever lies
between there (queue-proxy, ingress), and prints what `remoe profile hardware --calls` takes.
With `--url` it goes to a pod's own port instead: the difference is what lies between.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from main_model_fn.http_transport import HttpTransport
from remoe.checkpoint import Checkpoint
from remoe.errors import RemoeError
from remoe.expert_call import TOKEN_VARIABLE, ExpertCall
from remoe.hardware import CallTimes, Spread
from remoe.logs import configure_logging
from remoe.topology import Topology

__all__ = ["expert_call", "measure_calls"]

_WARM_UP_CALLS = 20
_MANY_ROWS = 128
# Loopback may be too fast to see: then the payload costs nothing that is measurable.
_MOST_BYTES_PER_S = 100e9
_TIMEOUT_S = 60.0


def expert_call(checkpoint: Checkpoint, layer: int, rows: int) -> ExpertCall:
    """A call that sends `rows` rows of zeros through a layer's first expert."""
    return ExpertCall(
        model_digest=checkpoint.digest,
        layer=layer,
        dtype="bfloat16",
        rows=rows,
        hidden=bytes(2 * rows * checkpoint.hidden_size),
        experts=[0],
        offsets=[0, rows],
        row_index=np.arange(rows, dtype="<i4").tobytes(),
        gate=np.ones(rows, "<f4").tobytes(),
    )


def measure_calls(topology: Topology, *, calls: int = 400, token: str = "") -> CallTimes:
    """Call the function of the first MoE layer with one row and with many, in turns.

    The first calls wake and warm it and are not counted; `token` is what the function asks for, if
    it does. Raises ExpertUnavailableError.
    """
    checkpoint = Checkpoint.open(Path(topology.model_dir))
    layer = checkpoint.moe_layers[0]
    took: dict[int, list[float]] = {1: [], _MANY_ROWS: []}
    # Not hedged: a second call would be measured with the first.
    transport = HttpTransport(topology, timeout_s=_TIMEOUT_S, hedge_floor_s=_TIMEOUT_S, token=token)
    try:
        for index in range(calls + _WARM_UP_CALLS):
            for rows in (1, _MANY_ROWS) if index % 4 == 0 else (1,):
                call = expert_call(checkpoint, layer, rows)
                before = time.perf_counter()
                result = transport.send(call).result()
                spent = time.perf_counter() - before - result.busy_s
                if index >= _WARM_UP_CALLS:
                    took[rows].append(spent)
    finally:
        transport.close()
    row_bytes = 6 * checkpoint.hidden_size  # 2 bytes a number there, 4 back
    slope_s = (float(np.median(took[_MANY_ROWS])) - float(np.median(took[1]))) / (_MANY_ROWS - 1)
    return CallTimes(
        invocation=Spread.of(took[1]),
        bandwidth_bytes_per_s=row_bytes / max(slope_s, row_bytes / _MOST_BYTES_PER_S),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure warm calls of an expert function.")
    parser.add_argument("--calls", type=int, default=400, help="default: %(default)s")
    parser.add_argument(
        "--url", help="of the first function, such as a pod's: http://10.0.0.7:8012"
    )
    given = parser.parse_args()
    configure_logging("call_times", "warning")  # to standard error: the output is for a file
    try:
        topology = Topology.load(Path(os.environ.get("REMOE_TOPOLOGY", "topology.json")))
        if given.url is not None:
            first, *others = topology.experts
            first = msgspec.structs.replace(first, url=given.url)
            topology = msgspec.structs.replace(topology, experts=[first, *others])
        token = os.environ.get(TOKEN_VARIABLE, "")
        times = measure_calls(topology, calls=given.calls, token=token)
    except RemoeError as error:
        sys.exit(error.message)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(times), indent=2).decode() + "\n")


if __name__ == "__main__":
    main()
