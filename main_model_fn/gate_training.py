"""Makes the Load Predictor's gate copies: plain where that is accurate, fine-tuned where not (B.3).

The distances of one source layer are trained together, since they have the same inputs. They learn
what the later gate says of its true input (KL), and to put the experts that it chose first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from remoe.moeless.gates import GATES_FILE, GateCopies, GateQuality, GatesFacts
from remoe.moeless.prediction_quality import batch_loads, held_out_batches, overlap, pearson
from remoe.moeless.recording import Recording

__all__ = ["make_gate_copies"]

THRESHOLD = 0.8  # h, the paper's example
_BATCH_TOKENS, _STEPS, _WEIGHT_DECAY = 2_048, 300, 1e-2
_LEARNING_RATE = 0.02  # of a gate's own scale
_RANKING = 0.4  # of the loss; between 0.3 and 0.5 it matters little


def make_gate_copies(
    recording: Recording,
    folder: Path,
    *,
    distances: Sequence[int] = (1, 2, 3, 4, 5),
    threshold: float = THRESHOLD,
    report: Callable[[int, int], None] = lambda done, layers: None,
) -> GateCopies:
    """Profile the plain copies, fine-tune those below `threshold`, and write gates and quality.

    Learns from seven of ten prompts; every figure is of the others. On the GPU if there is one.
    """
    facts, trainer = recording.facts, _Trainer(recording)
    count = len(facts.layers)
    weights: dict[int, list[Tensor]] = {d: [] for d in distances if d < count}
    quality: list[GateQuality] = []
    for source in range(count - 1):
        report(source, count - 1)
        made = trainer.copies(source, [d for d in weights if source + d < count], threshold)
        for distance, (weight, figures) in made.items():
            weights[distance].append(weight)
            quality.append(figures)
    folder.mkdir(parents=True, exist_ok=True)
    stacked = {d: torch.stack(parts) for d, parts in weights.items()}
    save_file({f"distance-{d}": values for d, values in stacked.items()}, folder / GATES_FILE)
    made_facts = GatesFacts(
        model_digest=facts.model_digest,
        file_digest="",
        layers=facts.layers,
        experts=facts.experts,
        top_k=facts.top_k,
        hidden=facts.hidden,
        distances=list(weights),
        threshold=threshold,
        train_tokens=int((~trainer.held_out).sum()),
        test_tokens=int(trainer.held_out.sum()),
        quality=quality,
    )
    GateCopies(made_facts, {d: w.float().numpy() for d, w in stacked.items()}).write_facts(folder)
    return GateCopies.read(folder, model_digest=facts.model_digest)


class _Figures(NamedTuple):
    """Rounded, of one layer's predicted routes."""

    overlap: float
    pearson: float
    step_pearson: float


class _Trainer:
    """A recording on the device, with its split into tokens to learn from and to test with."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._facts = recording.facts
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._gates = torch.from_numpy(recording.gates).to(
            self._device
        )  # [layers, experts, hidden]
        self._batches = held_out_batches(recording)
        self.held_out = recording.tokens_of(np.flatnonzero(recording.held_out()))  # [tokens]

    def copies(
        self, source: int, distances: Sequence[int], threshold: float
    ) -> dict[int, tuple[Tensor, GateQuality]]:
        """The copy to keep for each distance, [experts, hidden] in half precision, and how good."""
        inputs = self._hidden(source)
        plain = {d: self._gates[source + d].half() for d in distances}
        before = {d: self._figures(inputs, plain[d], source + d) for d in distances}
        weak = [d for d in distances if before[d].overlap < threshold]
        tuned = self._fine_tune(inputs, source, weak) if weak else {}
        after = {d: self._figures(inputs, tuned[d], source + d) for d in weak}
        made = {}
        for d in distances:
            helped = d in tuned and after[d].overlap > before[d].overlap
            kept = after[d] if helped else before[d]
            quality = GateQuality(
                layer=self._facts.layers[source + d],
                distance=d,
                tuned=helped,
                plain_overlap=before[d].overlap,
                overlap=kept.overlap,
                plain_pearson=before[d].pearson,
                pearson=kept.pearson,
                plain_step_pearson=before[d].step_pearson,
                step_pearson=kept.step_pearson,
            )
            made[d] = ((tuned if helped else plain)[d].cpu(), quality)
        return made

    def _hidden(self, layer: int) -> Tensor:
        return torch.from_numpy(np.array(self._recording.hidden(layer), np.float32)).to(
            self._device
        )

    def _figures(self, inputs: Tensor, gate: Tensor, layer: int) -> _Figures:
        top_k, experts = self._facts.top_k, self._facts.experts
        predicted = (inputs @ gate.float().T).topk(top_k, dim=1).indices.cpu().numpy()
        actual = self._recording.routes[:, layer].astype(np.int64)
        correlations = [
            pearson(batch_loads(predicted, batch, experts), batch_loads(actual, batch, experts))
            for batch in self._batches
        ]
        figures = (overlap(predicted[self.held_out], actual[self.held_out]), *correlations)
        return _Figures(*(round(figure, 4) for figure in figures))

    def _fine_tune(
        self, inputs: Tensor, source: int, distances: Sequence[int]
    ) -> dict[int, Tensor]:
        """Train the copies of all `distances` together, from the plain ones on."""
        rows = torch.from_numpy(np.flatnonzero(~self.held_out)).to(self._device)
        said = torch.stack([self._said(source + d, rows) for d in distances], dim=1)
        chosen = torch.stack([self._chosen(source + d, rows) for d in distances], dim=1)
        inputs = inputs[rows]
        weight = torch.stack([self._gates[source + d] for d in distances]).requires_grad_()
        optimiser = torch.optim.AdamW(
            [weight],
            lr=_LEARNING_RATE * float(weight.detach().std()),
            weight_decay=_WEIGHT_DECAY,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
        generator = torch.Generator().manual_seed(source)
        size = (min(_BATCH_TOKENS, len(rows)),)
        for _ in range(_STEPS):
            batch = torch.randint(len(rows), size, generator=generator).to(self._device)
            logits = torch.einsum("th,deh->tde", inputs[batch], weight)
            unlike = -(said[batch] * logits.log_softmax(-1)).sum(-1)  # [tokens, distances]
            loss = (1 - _RANKING) * unlike + _RANKING * _misplaced(logits, chosen[batch])
            optimiser.zero_grad()
            torch.autograd.backward(loss.mean(0).sum())
            optimiser.step()
            schedule.step()
        return {d: w.half() for d, w in zip(distances, weight.detach(), strict=True)}

    def _said(self, layer: int, rows: Tensor) -> Tensor:
        """The later gate's own shares, [rows, experts]."""
        return (self._hidden(layer)[rows] @ self._gates[layer].T).softmax(-1)

    def _chosen(self, layer: int, rows: Tensor) -> Tensor:
        """The experts that it chose, [rows, top_k]."""
        routes = torch.from_numpy(self._recording.routes[:, layer].astype(np.int64))
        return routes.to(self._device)[rows]


def _misplaced(logits: Tensor, chosen: Tensor) -> Tensor:
    """How far experts that were not chosen are before those that were, the mean over such pairs.

    A logistic loss: [..., experts] and the chosen [..., top_k] to [...].
    """
    lead = logits.gather(-1, chosen)[..., None] - logits[..., None, :]  # [..., top_k, experts]
    others = torch.ones_like(logits).scatter(-1, chosen, 0)
    pairs = (F.softplus(-lead) * others[..., None, :]).sum((-2, -1))
    return pairs / max(1, chosen.shape[-1] * (logits.shape[-1] - chosen.shape[-1]))
