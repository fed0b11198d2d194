"""What a step's dense part and its calls take, told from whole steps of decoding.

Alone, neither takes what it does in a step. Without experts a step goes through Python layer by
layer, which whole steps do not; and a call interrupts them, and shares a machine's cores.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from main_model_fn.http_transport import HttpTransport
from main_model_fn.step_times import measure_step
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.functions import FunctionProcess, layers_env

__all__ = ["StepTimes", "measure_steps"]

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a decoded token: with every expert in the main function, and with every one in a
    function beside it on this machine."""

    local_s: float
    remote_s: float

    def dense_s(self, checkpoint: Checkpoint, *, local_s: float) -> float:
        """t^f: the step without its experts, of which one takes `local_s`.

        An expert alone may take longer than in a step, whose threads are awake: the dense part is
        never less than its share of the bytes that a step reads.
        """
        experts = len(checkpoint.moe_layers) * checkpoint.top_k
        dense_bytes = checkpoint.non_expert_size_bytes
        read_bytes = dense_bytes + experts * checkpoint.expert_size_bytes
        return max(self.local_s - experts * local_s, self.local_s * dense_bytes / read_bytes)

    def call_s(self, checkpoint: Checkpoint, *, dense_s: float, remote_s: float) -> float:
        """t^rem: what a layer's call takes beside its experts, of which one takes `remote_s`."""
        layer_s = (self.remote_s - dense_s) / len(checkpoint.moe_layers)
        return layer_s - checkpoint.top_k * remote_s


def measure_steps(model_dir: Path) -> StepTimes:
    """One stream on the CPU, with a real expert function of all layers."""
    checkpoint = Checkpoint.open(model_dir)
    with (
        tempfile.TemporaryDirectory() as folder,
        FunctionProcess("expert_fn", model_dir, Path(folder), layers_env(checkpoint)) as function,
    ):
        function.start()
        # Not hedged: a second call would be measured with the first.
        transport = HttpTransport(function.topology, timeout_s=_TIMEOUT_S, hedge_floor_s=_TIMEOUT_S)
        try:
            return StepTimes(
                measure_step(model_dir, transport, remote=False),
                measure_step(model_dir, transport, remote=True),
            )
        finally:
            transport.close()
