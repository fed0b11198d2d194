"""What a GPU and its host hand each other in every MoE layer of a decoding step: fixed buffers.

The GPU's kernels write to the host's memory and read from it themselves: a few KB each way, and no
copy to be started and waited for.
"""

from __future__ import annotations

import torch

from main_model_fn.host_memory import host_empty, seen_by_gpu
from main_model_fn.routes import Batch

__all__ = ["Exchange"]


class Exchange:
    """Room for `rows` tokens. `send` and `receive` are the GPU's part, and can be captured.

    On the host lie `index` int64 and `gates` float32 [rows, top_k], the `hidden` rows and their
    float32 `sums` over the experts that the CPU computed, both [rows, width]; on the GPU `rows`
    again, and `total`, the sums over those that it computed.
    """

    def __init__(
        self, rows: int, width: int, top_k: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        pinned = device.type == "cuda"

        def on_host(columns: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            held = host_empty((rows, columns), kind, pinned=pinned)
            return held.zero_(), seen_by_gpu(held, device)

        self.index, self._to_index = on_host(top_k, torch.int64)
        self.gates, self._to_gates = on_host(top_k, torch.float32)
        self.hidden, self._to_hidden = on_host(width, dtype)
        self.sums, self._from_sums = on_host(width, torch.float32)
        self.rows = torch.zeros((rows, width), dtype=dtype, device=device)
        self.total = torch.zeros((rows, width), dtype=torch.float32, device=device)

    def send(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """Give the host a layer's input [rows, width] and its routes [rows, top_k]."""
        self._to_index.copy_(index)
        self._to_gates.copy_(gates)
        self._to_hidden.copy_(hidden)
        self.rows.copy_(hidden)
        self.total.zero_()

    def receive(self) -> torch.Tensor:
        """The sum over all experts, [rows, width] of the model's type."""
        return (self.total + self._from_sums).to(self.rows.dtype)

    def batch(self, rows: int) -> Batch:
        """What the first rows were sent with, as any layer is called."""
        device = self.rows.device
        index, gates = self.index[:rows], self.gates[:rows]
        return Batch(
            self.rows[:rows],
            index,
            gates.to(device),
            index if device.type == "cpu" else index.to(device),
            self.hidden[:rows],
            gates,
        )

    def answer(self, output: torch.Tensor) -> None:
        """Let `receive` give this output [some rows, width] of the device."""
        self.total[: len(output)] = output
        self.sums.zero_()
