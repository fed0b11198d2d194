"""Pages of mapped files come and go; memory that is not a file's is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from remoe.mapped import MappedTensor, Shard


def test_released_numbers_are_the_same_when_read_again(tmp_path: Path) -> None:
    numbers = torch.randn(300, 100)
    save_file({"a": numbers}, tmp_path / "one.safetensors")
    tensor = Shard(tmp_path / "one.safetensors").tensor("a")
    tensor.prefault()
    for view in (tensor, tensor.view(tensor.values[10:20].T)):
        view.release()
        np.testing.assert_array_equal(tensor.values, numbers.numpy())


def test_memory_that_is_no_files_is_never_let_go() -> None:
    numbers = np.ones((300, 1000), np.float32)
    tensor = MappedTensor(numbers, "F32")
    tensor.view(numbers[5:]).release()
    tensor.release()
    tensor.prefault()
    assert numbers.all()
