"""MoEless' policies around a loaded model: predictor, controller, and the requests they hear of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import msgspec
import structlog
import torch
from transformers import PreTrainedModel

from main_model_fn.config import MainSettings
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.live_partition import LivePartition
from main_model_fn.local_experts import TorchExperts
from main_model_fn.model_gates import model_gates
from main_model_fn.moeless.balance_controller import BalanceController
from main_model_fn.moeless.load_book import LoadBook
from main_model_fn.moeless.load_predictor import LoadPredictor, Observer
from main_model_fn.moeless.runtime_control import RuntimeControl
from main_model_fn.split import LayerExperts
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.generation import GenerateEvent, GenerateRequest
from remoe.moeless.function_balance import BalanceRules, FunctionShare
from remoe.moeless.gates import GATES_FOLDER, GateCopies
from remoe.notify import Notifier
from remoe.topology import Topology

__all__ = ["Balancing", "read_gates"]

_log = structlog.get_logger()
# What a GB of GPU memory costs in GB of CPU memory: the least of the papers' (papers.md A.4, E).
# Experts come to the host's memory unless torch computes them on the GPU.
_GPU_PRICE_RATIO = 3.0


class Balancing:
    """Everything that a policy other than `remoe` runs beside the engine."""

    def __init__(
        self,
        settings: MainSettings,
        topology: Topology,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        partition: LivePartition,
    ) -> None:
        self._top_k = checkpoint.top_k
        self._notifier = Notifier(os.environ.get("NOTIFY_SOCKET"))
        book = LoadBook(checkpoint.layers, checkpoint.experts)
        layers = [cast("LayerExperts", module.remoe) for module in experts_by_layer(model).values()]

        def watch(observer: Observer | None) -> None:
            for layer in layers:
                layer.observe = observer

        self._predictor = LoadPredictor(
            read_gates(model, checkpoint, distance=settings.prediction_distance),
            moe_layers=checkpoint.moe_layers,
            top_k=checkpoint.top_k,
            distance=settings.prediction_distance,
            book=book,
            watch=watch,
        )
        on_gpu = model.device.type == "cuda" and isinstance(layers[0].local, TorchExperts)
        planned_gb = partition.deployment.main_memory_gb
        self.controller = BalanceController(
            partition,
            book,
            policy=settings.policy,
            functions=[FunctionShare.of(one) for one in topology.experts],
            rules=BalanceRules(
                expert_gb=checkpoint.expert_size_bytes / 1e9,
                room_gb=max(0.0, topology.main_memory_gb - planned_gb),
                main_price_ratio=_GPU_PRICE_RATIO if on_gpu else 1.0,
                most_replicas=settings.function_replicas,
                cv_threshold=settings.cv_threshold,
            ),
            runtime=RuntimeControl(
                {one.name: one.url for one in topology.experts}, settings.runtime_control
            ),
            on_change=self._notifier.status,
        )

    def start(self) -> None:
        self._predictor.start()
        self.controller.start()

    def stop(self) -> None:
        self.controller.stop()
        self._predictor.stop()
        self._notifier.close()

    @contextmanager
    def request(self, request: GenerateRequest) -> Iterator[None]:
        """While the block runs, the request is being served."""
        self.controller.opened(
            request.request_id, request.profile, self._top_k, policy=request.policy
        )
        try:
            yield
        finally:
            self.controller.closed(request.request_id)

    def reported(self, event: GenerateEvent) -> GenerateEvent:
        """The event, with the balance in its stats if it is the last one."""
        if event.finish is None or event.stats is None:
            return event
        stats = msgspec.structs.replace(event.stats, balance=self.controller.report())
        return msgspec.structs.replace(event, stats=stats)


def read_gates(
    model: PreTrainedModel, checkpoint: Checkpoint, *, distance: int
) -> dict[int, torch.Tensor]:
    """The gate that foretells each MoE layer from the input of the one `distance` before.

    The trained copies beside the model if there are any, else the model's own gates; none where
    the family's gate is not known: the last steps' loads stand then. On a GPU in the model's type.
    """
    folder = Path(checkpoint.model_dir) / GATES_FOLDER
    dtype = model.dtype if model.device.type == "cuda" else torch.float32
    layers = checkpoint.moe_layers[distance:]
    if folder.exists():
        copies = GateCopies.read(folder, model_digest=checkpoint.digest)
        return {
            layer: torch.from_numpy(copies.weight(layer, distance)).to(model.device, dtype)
            for layer in layers
            if distance in copies.facts.distances
        }
    try:
        gates = model_gates(model)
    except CheckpointError as error:
        _log.warning("loads_not_foretold", reason=error.message)
        return {}
    return {layer: gates[layer].to(dtype) for layer in layers}
