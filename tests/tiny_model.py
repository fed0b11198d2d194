"""Tiny random checkpoints, and expert functions inside the test's own process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from expert_fn.compute import ExpertComputer
from main_model_fn.loading import load_split_model
from main_model_fn.metering import StepMeter
from main_model_fn.transport import PendingReply, RemoteResult
from remoe.checkpoint import Checkpoint
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import ExpertCall
from remoe.experts import Partition
from remoe.kernel.native_library import NativePool

LAYERS, EXPERTS, HIDDEN, VOCABULARY = 3, 4, 32, 96

# Tiny operators are over before a second thread has woken up, the more so on a busy machine.
torch.set_num_threads(1)


def build_tiny_checkpoint(target: Path, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        # Large enough for routes and tokens to vary, as random initialisation does not.
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(target)
    return target


class InProcessTransport:
    """The expert function's own arithmetic, without the network between.

    `refuse` names layers whose calls fail, as if their function were lost.
    """

    def __init__(self, model_dir: Path) -> None:
        checkpoint = Checkpoint.open(model_dir)
        self._computer = ExpertComputer(checkpoint, first_layer=0, last_layer=checkpoint.layers - 1)
        self.calls: list[ExpertCall] = []
        self.refuse: set[int] = set()

    def send(self, call: ExpertCall) -> PendingReply:
        self.calls.append(call)
        return _Computed(self._computer, call, refused=call.layer in self.refuse)

    def close(self) -> None:
        self.calls.clear()


@dataclass(frozen=True)
class _Computed:
    computer: ExpertComputer
    call: ExpertCall
    refused: bool

    def result(self) -> RemoteResult:
        if self.refused:
            raise ExpertUnavailableError("lost, as the test wants")
        return RemoteResult(
            partial=self.computer.compute(self.call).tobytes(),
            busy_s=0.25,
            cold_start_s=0.0,
            retries=0,
            bytes_moved=len(self.call.hidden),
        )


def reference(model_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unmodified model, as transformers loads and runs it."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, experts_implementation="eager"
    ).eval()


def new_meter(*, experts: int = EXPERTS, layers: int = LAYERS) -> StepMeter:
    return StepMeter(layers=layers, experts=experts, main_memory_gb=2.0, on_gpu=False)


def split(
    model_dir: Path,
    remote: tuple[tuple[int, ...], ...],
    transport: InProcessTransport,
    meter: StepMeter | None = None,
    dtype: torch.dtype = torch.float32,
    pool: NativePool | None = None,
) -> PreTrainedModel:
    return load_split_model(
        model_dir,
        partition=Partition(experts=EXPERTS, remote=remote),
        dtype=dtype,
        device=torch.device("cpu"),
        transport=transport,
        function_memory_gb=dict.fromkeys(range(LAYERS), 0.5),
        meter=meter or new_meter(),
        pool=pool,
    )
