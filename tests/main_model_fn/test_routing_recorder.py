"""Counting routes where not every layer has experts."""

from __future__ import annotations

from pathlib import Path

import torch

from main_model_fn.routing_recorder import RoutingRecorder
from tests.tiny_families import build_tiny_family
from tests.tiny_model import reference


def test_rows_are_decoder_layers_and_those_of_dense_layers_are_zero(tmp_path: Path) -> None:
    model = reference(build_tiny_family(tmp_path, "glm4_moe"))
    recorder = RoutingRecorder(model)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with recorder.installed(), torch.no_grad():
        recorder.begin(torch.ones_like(tokens))
        model(tokens)
    profiles = recorder.profiles()  # [1, layers, experts]
    assert profiles.shape == (1, 3, 4)
    assert profiles[0].sum(axis=1).tolist() == [0, 1, 1]
