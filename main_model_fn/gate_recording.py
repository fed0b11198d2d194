"""Records what a model's routers are given and choose, while prompts are read and answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from main_model_fn.activations import batches_of, encode_prompt
from main_model_fn.batch_decoding import decode_batch
from main_model_fn.experts_tap import tapped_experts
from main_model_fn.model_gates import model_gates
from main_model_fn.prompt_sets import LabelledPrompt
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError
from remoe.moeless.recording import Recording, RecordingFacts

__all__ = ["record_gate_inputs", "record_model"]


def record_model(
    model_dir: Path,
    prompts: Sequence[LabelledPrompt],
    folder: Path,
    *,
    max_tokens: int,
    decode_tokens: int,
) -> Recording:
    """Record a checkpoint with prompts of at most `max_tokens`, on the GPU if there is one."""
    digest = Checkpoint.open(model_dir).digest
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    encoded = [encode_prompt(tokenizer, prompt.text) for prompt in prompts]
    kept = [place for place, ids in enumerate(encoded) if len(ids) <= max_tokens]
    if not kept:
        raise SettingsError(f"no prompt has {max_tokens} tokens or fewer; allow longer ones")
    return record_gate_inputs(
        model.to(device).eval(),
        [encoded[place] for place in kept],
        folder,
        labels=[prompts[place].label for place in kept],
        digest=digest,
        decode_tokens=decode_tokens,
    )


def record_gate_inputs(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    folder: Path,
    *,
    labels: Sequence[str],
    digest: str,
    decode_tokens: int,
    batch_tokens: int = 12_288,
) -> Recording:
    """Run each prompt, answer it for up to `decode_tokens` tokens, and write the recording.

    A token's hidden states are kept in half precision: layers x hidden x 2 bytes.
    """
    gates = model_gates(model)
    layers = list(gates)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    mask = torch.zeros(0, dtype=torch.bool)

    def observe(layer: int, hidden: Tensor, top_k_index: Tensor) -> None:
        rows = mask.flatten()
        seen[layer].append((hidden[rows].half().cpu(), top_k_index[rows].short().cpu()))

    owners: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    decoded: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []
    with tapped_experts(model, observe), torch.no_grad():
        for batch in batches_of(encoded, decode_tokens, batch_tokens):
            prompts = np.array(batch)
            passes = decode_batch(model, [encoded[index] for index in batch], decode_tokens)
            for number, real in enumerate(passes):  # yielded before the pass it describes
                mask = real.bool()
                owners.append(np.repeat(prompts, mask.sum(1).cpu().numpy()))
                decoded.append(np.full(len(owners[-1]), number > 0))
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")  # a prompt's tokens in the order of their passes
    folder.mkdir(parents=True, exist_ok=True)
    routes = []
    for place, layer in enumerate(layers):
        parts = seen.pop(layer)
        np.save(folder / f"hidden-{place}.npy", torch.cat([h for h, _ in parts]).numpy()[order])
        routes.append(torch.cat([index for _, index in parts]).numpy()[order])
    facts = RecordingFacts(
        model_digest=digest,
        layers=layers,
        experts=int(next(iter(gates.values())).shape[0]),
        top_k=int(routes[0].shape[1]),
        hidden=int(model.config.hidden_size),
        labels=list(labels),
    )
    return Recording.write(
        folder,
        facts,
        routes=np.stack(routes, axis=1).astype(np.uint16),
        gates=torch.stack(list(gates.values())).cpu().numpy(),
        prompt=owner[order].astype(np.int32),
        decoded=np.concatenate(decoded)[order],
    )
