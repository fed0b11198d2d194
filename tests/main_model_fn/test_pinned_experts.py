"""An expert in slices is the same expert, to torch and to the kernel; and norms that are fused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from main_model_fn.device_experts import expert_output
from main_model_fn.fused_norm import FusedNorm, use_fused_norms
from main_model_fn.host_memory import host_empty
from main_model_fn.pinned_experts import as_tensors, pinned_copy, slices_of
from remoe.activation import SILU
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool
from remoe.mapped import MappedTensor

INNER, HIDDEN = 96, 32


def tensors(*, biased: bool) -> ExpertTensors:
    random = np.random.default_rng(0)

    def of(*shape: int) -> MappedTensor:
        return MappedTensor(random.standard_normal(shape, np.float32), "F32")

    matrices = of(INNER, HIDDEN), of(INNER, HIDDEN), of(HIDDEN, INNER)
    return ExpertTensors(*matrices, *((of(INNER), of(INNER), of(HIDDEN)) if biased else ()))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("slices", [1, 3])
def test_an_expert_in_slices_is_the_same_expert(
    pool: NativePool, slices: int, biased: bool
) -> None:
    expert = tensors(biased=biased)
    rows = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    whole = pinned_copy(expert, torch.float32, slices=1, pinned=False)
    expected = expert_output(rows, whole, SILU)
    held = pinned_copy(expert, torch.float32, slices=slices, pinned=False)
    assert (held.slices, held.shape) == (slices, (INNER, HIDDEN))
    assert torch.allclose(expert_output(rows, held, SILU), expected, atol=1e-3)
    assert torch.allclose(
        torch.stack([expert_output(rows, one, SILU) for one in held.cut()]).sum(0),
        expected,
        atol=1e-3,
    )
    copy = held.to(torch.device("cpu"))
    assert torch.equal(expert_output(rows, copy, SILU), expert_output(rows, held, SILU))
    kernel = NativeKernel(lambda part: as_tensors(held.cut()[part.index - 7 * slices]), pool)
    parts = slices_of(ExpertId(0, 7), slices)
    routed = RoutedRows(
        hidden=rows.numpy(),
        offsets=[5 * n for n in range(slices + 1)],
        row_index=np.tile(np.arange(5, dtype=np.int32), slices),
        gate=np.ones(5 * slices, np.float32),
    )
    assert np.allclose(kernel.weighted_sum(parts, routed), expected, atol=1e-3)


def test_one_row_is_taken_in_once_for_all_experts(pool: NativePool) -> None:
    expert = tensors(biased=False)
    kernel = NativeKernel(lambda _: expert, pool)
    row = np.random.default_rng(2).standard_normal((1, HIDDEN), np.float32)

    def summed(count: int) -> np.ndarray:
        routed = RoutedRows(
            hidden=row,
            offsets=range(count + 1),
            row_index=np.zeros(count, np.int32),
            gate=np.full(count, 1 / count, np.float32),
        )
        return kernel.weighted_sum([ExpertId(0, i) for i in range(count)], routed)

    assert np.allclose(summed(200), summed(1), rtol=1e-5)


def test_memory_of_the_host_is_private_and_large_pages_may_be_used() -> None:
    tensor = host_empty((1 << 20,), torch.float32, pinned=False)
    tensor.fill_(1.0)
    address = tensor.data_ptr()
    with open("/proc/self/smaps") as maps:  # noqa: PTH123
        lines = maps.read().splitlines()
    held = next(
        n
        for n, line in enumerate(lines)
        if "-" in line.split(" ", 1)[0]
        and int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split(" ")[0], 16)
    )
    assert lines[held].split()[1].endswith("p")


class _PlusOneNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.eps = 1e-6

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)


def test_only_norms_that_compute_the_same_are_fused() -> None:
    model = nn.Module()
    model.RMSNorm = nn.RMSNorm(8, eps=1e-6)
    model.other = _PlusOneNorm()
    assert use_fused_norms(model) == 1
    assert isinstance(model.RMSNorm, FusedNorm)
    assert isinstance(model.other, _PlusOneNorm)
