"""Tiny random checkpoints, and expert functions inside the test's own process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from main_model_fn import in_process_transport
from main_model_fn.loading import load_split_model
from main_model_fn.metering import StepMeter
from main_model_fn.native_model import NativeModel
from main_model_fn.served_model import load_served_model
from main_model_fn.transport import PendingReply, RemoteResult
from remoe.checkpoint import Checkpoint
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import MAX_BODY_BYTES, ExpertCall
from remoe.experts import Partition
from remoe.kernel.interface import open_kernel
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


class InProcessTransport(in_process_transport.InProcessTransport):
    """Keeps the calls, and can do what functions do wrong.

    `refuse` names layers whose calls fail, as if their function were lost; `replica_count` is how
    many replicas each function seems to have.
    """

    def __init__(self, model_dir: Path) -> None:
        checkpoint = Checkpoint.open(model_dir)
        super().__init__(open_kernel(checkpoint.expert, activation=checkpoint.activation))
        self.calls: list[ExpertCall] = []
        self.deadlines_s: list[float | None] = []
        self.traceparents: list[str | None] = []
        self.refuse: set[int] = set()
        self.replica_count = 1

    def send(
        self,
        call: ExpertCall,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> PendingReply:
        self.calls.append(call)
        self.deadlines_s.append(deadline_s)
        self.traceparents.append(traceparent)
        if call.layer in self.refuse:
            return _Lost()
        return super().send(call)

    def line(self, layer: int, shape: object) -> None:
        return None

    def replicas(self, layer: int) -> int:
        return self.replica_count


class _Lost:
    def result(self) -> RemoteResult:
        raise ExpertUnavailableError("lost, as the test wants")


def reference(model_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unmodified model, as transformers loads and runs it."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, experts_implementation="eager"
    ).eval()


def new_meter(*, experts: int = EXPERTS, layers: int = LAYERS) -> StepMeter:
    return StepMeter(layers=layers, experts=experts, main_memory_gb=2.0)


def split(
    model_dir: Path,
    remote: tuple[tuple[int, ...], ...],
    transport: InProcessTransport,
    meter: StepMeter | None = None,
    dtype: torch.dtype = torch.float32,
    pool: NativePool | None = None,
    payload_limit_bytes: int = MAX_BODY_BYTES,
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
        payload_limit_bytes=payload_limit_bytes,
    )


def native(
    model_dir: Path,
    remote: tuple[tuple[int, ...], ...],
    transport: InProcessTransport,
    meter: StepMeter,
    pool: NativePool,
    dtype: torch.dtype = torch.float32,
    payload_limit_bytes: int = MAX_BODY_BYTES,
) -> NativeModel:
    """The same without the library."""
    model = load_served_model(
        model_dir,
        partition=Partition(experts=EXPERTS, remote=remote),
        dtype=dtype,
        device=torch.device("cpu"),
        transport=transport,
        function_memory_gb=dict.fromkeys(range(LAYERS), 0.5),
        meter=meter,
        pool=pool,
        payload_limit_bytes=payload_limit_bytes,
    )
    assert isinstance(model, NativeModel)
    return model
