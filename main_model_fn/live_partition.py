"""Which experts a running model holds: changed between two layers, without stopping a stream."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.gpu_memory import GpuMemory
from main_model_fn.metering import StepMeter
from main_model_fn.native_model import NativeModel
from main_model_fn.split import LayerExperts
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import Partition
from remoe.plan import Deployment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LivePartition", "PartitionChange", "check_partition"]


@dataclass(frozen=True, slots=True)
class PartitionChange:
    """How many experts became resident, and how many were let go."""

    attached: int
    detached: int


def check_partition(partition: Partition, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `partition` is one of this model's."""
    if (partition.layers, partition.experts) != (checkpoint.layers, checkpoint.experts):
        raise CheckpointError(
            f"the partition is for {partition.layers} layers of {partition.experts} experts, "
            f"the model has {checkpoint.layers} of {checkpoint.experts}; plan again"
        )
    dense = [layer for layer in range(checkpoint.layers) if layer not in checkpoint.moe_layers]
    if any(partition.remote[layer] for layer in dense):
        raise CheckpointError(f"the partition has remote experts in a dense layer of {dense}")


class LivePartition:
    """The deployment that a loaded model runs. Safe from any thread.

    A layer looks once a batch at which experts are resident, so a change applies from the next
    layer on; whatever is not resident then goes to its expert function. Only time and the bill
    differ, never the answer.
    """

    def __init__(
        self,
        model: NativeModel | PreTrainedModel,
        checkpoint: Checkpoint,
        deployment: Deployment,
        meter: StepMeter,
        gpu: GpuMemory | None = None,
    ) -> None:
        self._layers: dict[int, LayerExperts] = {
            layer: module.remoe  # type: ignore[misc]  # set where it was loaded
            for layer, module in experts_by_layer(model).items()
        }
        self._checkpoint = checkpoint
        self._meter = meter
        self._gpu = gpu or GpuMemory()
        self._meter.gpu_memory_gb = self._gpu.gb(deployment.partition)
        self._lock = threading.Lock()
        self.deployment = deployment

    def change(self, deployment: Deployment) -> PartitionChange:
        """Run `deployment` from now on; raises CheckpointError if it is another model's.

        In each layer new experts are in memory before old ones go, so for a moment both are.
        Takes as long as reading the new ones; streams go on meanwhile.
        """
        if deployment.model_digest != self._checkpoint.digest:
            raise CheckpointError(
                f"this function serves {self._checkpoint.digest}, the deployment is for "
                f"{deployment.model_digest}; restart the function to serve another model"
            )
        check_partition(deployment.partition, self._checkpoint)
        attached = detached = 0
        with self._lock:
            wanted = {layer: frozenset(deployment.partition.local(layer)) for layer in self._layers}
            for layer, split in self._layers.items():
                attached += len(wanted[layer] - split.local.residents.experts)
                split.local.attach(wanted[layer])
                unwanted = split.local.residents.experts - wanted[layer]
                detached += len(unwanted)
                split.local.detach(unwanted)
            if detached:
                _return_freed_memory()
            self._meter.main_memory_gb = deployment.main_memory_gb
            self._meter.gpu_memory_gb = self._gpu.gb(deployment.partition)
            self.deployment = deployment
        return PartitionChange(attached, detached)


def _return_freed_memory() -> None:
    """Allocators keep freed blocks for the next request unless they are told not to."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
