"""What a GPU and its host hand each other in every MoE layer of a decoding step: fixed buffers.

The GPU's kernels write to the host's memory and read from it themselves: a few KB each way, and no
copy to be started and waited for.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from main_model_fn.host_memory import host_empty, seen_by_gpu
from main_model_fn.routes import Batch

__all__ = ["Exchange"]


class Exchange:
    """Room for `rows` tokens. `send`, `keep` and `receive` are the GPU's part, and can be captured.

    On the host lie the routes by slice, as the kernel takes them: `parts` int64 and `gates` float32
    [rows, top_k, slices], where the i-th slice of expert e is `e * slices + i`; the `hidden` rows
    and their float32 `sums` over the experts that the CPU computed, both [rows, width]; and
    `foretold` int64 [rows], the expert that each row is likeliest to choose in the next MoE layer,
    which comes a little later, or not at all, and then is what the host left there. On the GPU lie
    `rows` again, and `total`, the sums over those that it computed.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        top_k: int,
        slices: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        pinned = device.type == "cuda"

        def on_host(kind: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
            held = host_empty((rows, *shape), kind, pinned=pinned)
            return held.zero_(), seen_by_gpu(held, device)

        self._slices = slices
        self._each = torch.arange(slices, device=device)
        self.parts, self._to_parts = on_host(torch.int64, top_k, slices)
        self.gates, self._to_gates = on_host(torch.float32, top_k, slices)
        self.hidden, self._to_hidden = on_host(dtype, width)
        self.sums, self._from_sums = on_host(torch.float32, width)
        self.foretold, self._to_foretold = on_host(torch.int64)
        self.foretold.fill_(-1)
        self.rows = torch.zeros((rows, width), dtype=dtype, device=device)
        self.total = torch.zeros((rows, width), dtype=torch.float32, device=device)

    def send(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """Give the host a layer's input [rows, width] and its routes [rows, top_k].

        Each by a kernel that computes something: a plain copy would be the copy engine's, which
        takes several times as long to begin.
        """
        torch.add(self._each, index[..., None], alpha=self._slices, out=self._to_parts)
        self._to_gates.copy_(gates[..., None].expand_as(self._to_gates))
        torch.mul(hidden, 1, out=self._to_hidden)

    def keep(self, hidden: torch.Tensor) -> None:
        """Make ready what the GPU's own experts take, which nobody waits for yet."""
        self.rows.copy_(hidden)
        self.total.zero_()

    def foretell(self, hidden: torch.Tensor, gate: torch.Tensor) -> None:
        """Give the host what the next layer's `gate` [experts, width] says of this one's input."""
        likeliest = functional.linear(hidden.to(gate.dtype), gate).argmax(-1)
        torch.mul(likeliest, 1, out=self._to_foretold)

    def receive(self) -> torch.Tensor:
        """The sum over all experts, [rows, width] of the model's type."""
        return (self.total + self._from_sums).to(self.rows.dtype)

    def index(self, rows: int) -> torch.Tensor:
        """The experts that the first rows chose, int64 [rows, top_k]."""
        return self.parts[:rows, :, 0] // self._slices

    def batch(self, rows: int) -> Batch:
        """What the first rows were sent with, as any layer is called."""
        device = self.rows.device
        index, gates = self.index(rows), self.gates[:rows, :, 0].clone()
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
