"""Trains the routers and the low-rank experts; writes the delta and what the run measured.

python -m models.smollm2_8x135m.train --prompts DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.smollm2_8x135m import recipe
from models.smollm2_8x135m.build import find_gguf
from models.smollm2_8x135m.corpus import (
    ANSWER,
    LEFT_OUT_SETS,
    TEMPLATE,
    TERSE_SETS,
    Row,
    conversation,
    documents,
    read_rows,
    system_prefix,
)
from models.smollm2_8x135m.delta import write_delta
from models.smollm2_8x135m.distill import (
    Sizes,
    collect,
    collect_user_turns,
    dense_model,
    load_pieces,
    save_pieces,
)
from models.smollm2_8x135m.gguf_base import BaseTokenizer, GgufBase
from models.smollm2_8x135m.losses import TokenLosses, load_balance, topicality
from models.smollm2_8x135m.packing import Piece, Rows, pack
from models.smollm2_8x135m.routers import collect_inputs, discriminant_router
from models.smollm2_8x135m.upcycled import Upcycled

if TYPE_CHECKING:
    from collections.abc import Iterator


_TEMPERATURES = (0.8, 0.4)


@dataclass(frozen=True, slots=True)
class Settings:
    """One training run."""

    rank: int = 16
    epochs: float = 1.5
    length: int = 1024
    set_rows: int = 12  # rows a step from the prompt sets: cross entropy
    base_rows: int = 12  # rows a step from the base's own text: divergence from the base
    lr_a: float = 1e-3
    lr_b: float = 2e-3
    lr_router: float = 4e-4
    warmup_steps: int = 30
    divergence_weight: float = 5.0
    balance_weight: float = 0.05
    topic_weight: float = 0.5
    router_prompts_a_set: int = 120
    router_sample_tokens: int = 40_000
    fraction: float = 1.0  # of the training rows, for trials
    seed: int = 1


def main() -> None:
    """Train, and write `delta-*.safetensors` and `train.json` under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="folder of prompt sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--gguf", type=Path, help="the dense base (default: the installed package's)"
    )
    parser.add_argument(
        "--distilled", type=Path, help="reuse, or keep, the base's own answers here"
    )
    parser.add_argument(
        "--earlier", type=Path, help="answers kept by an earlier run, in place of the first round"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a minute on a CPU: proves the code only"
    )
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    sizes = Sizes()
    if arguments.tiny:
        sizes = Sizes(
            written=6,
            plain=26,
            answer_tokens=8,
            second_tokens=4,
            plain_tokens=6,
            user_turns=4,
            user_turn_tokens=6,
            share=0.01,
        )

    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = GgufBase(arguments.gguf or find_gguf(), recipe.ARCHITECTURE)
    encoder = BaseTokenizer(base)
    clock = Clock()
    rows = list(read_rows(arguments.prompts))
    prefix = system_prefix(encoder)
    named = training_pieces(encoder, rows, settings)
    clock.lap(f"{len(named)} training documents")

    own_text = load_pieces(arguments.earlier) if arguments.earlier else []
    if arguments.distilled and arguments.distilled.exists():
        own_text += load_pieces(arguments.distilled)
    else:
        fresh = sample_base(base, encoder, rows, sizes, settings, bool(own_text))
        if arguments.distilled:
            save_pieces(arguments.distilled, fresh)
        own_text += fresh
    clock.lap(f"{len(own_text)} documents by the base, {_loss_tokens(own_text):,} tokens written")

    model = Upcycled(recipe.ARCHITECTURE, base, settings.rank, dtype, settings.seed)
    model.to_device(device)
    if device.type == "cuda":
        model.compile()
    start_routers(model, named, prefix, settings, device)
    clock.lap("routers started")

    run = Run(model, settings, device)
    set_rows = pack([piece for _, piece in named], prefix, settings.length, settings.seed)
    base_rows = pack(own_text, prefix, settings.length, settings.seed)
    print(f"{len(set_rows)} rows of the sets, {len(base_rows)} of the base's text", flush=True)
    report = run.train(set_rows, base_rows)
    clock.lap("trained")
    paths = [arguments.out / path.name for path in recipe.DELTA_FILES]
    write_delta(paths, recipe.ARCHITECTURE, settings.rank, model.delta())
    report |= {
        "settings": asdict(settings),
        "seconds": clock.laps,
        "own_text_documents": len(own_text),
        "own_text_tokens": _loss_tokens(own_text),
        "set_documents": len(named),
        "set_tokens": _loss_tokens([piece for _, piece in named]),
    }
    (arguments.out / "train.json").write_text(json.dumps(report, indent=1))


def sample_base(  # noqa: PLR0917
    base: GgufBase,
    encoder: BaseTokenizer,
    rows: list[Row],
    sizes: Sizes,
    settings: Settings,
    one_round: bool,
) -> list[Piece]:
    """Return the base's own text: a warm and a cool round of answers, and user turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = dense_model(base, recipe.ARCHITECTURE, torch.bfloat16).to(device)
    pieces: list[Piece] = []
    for number, temperature in enumerate(_TEMPERATURES):
        if number or not one_round:
            seed = settings.seed + number
            pieces += collect(dense, encoder, rows, sizes, seed, temperature)
    return pieces + collect_user_turns(dense, encoder, sizes, settings.seed)


class Clock:
    """Says how long each part took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, text: str) -> None:
        """Note the seconds since the last lap."""
        now = time.monotonic()
        self.laps[text] = round(now - self._last, 1)
        self._last = now
        print(f"[{self.laps[text]:6.1f} s] {text}", flush=True)


def training_pieces(
    encoder: BaseTokenizer, rows: list[Row], settings: Settings
) -> list[tuple[str, Piece]]:
    """Return the sets' training documents with the weight of each token's loss."""
    chosen = [row for row in rows if not row.held_out and row.set_name not in LEFT_OUT_SETS]
    if settings.fraction < 1:
        keep = np.random.default_rng(settings.seed).random(len(chosen)) < settings.fraction
        chosen = [row for row, kept in zip(chosen, keep, strict=True) if kept]
    pieces = []
    for made in documents(encoder, [(row.set_name, conversation(row)) for row in chosen]):
        weights = (made.kinds != TEMPLATE).astype(np.float32)
        if made.set_name in TERSE_SETS:
            weights[made.kinds == ANSWER] = 0.0
        pieces.append((made.set_name, Piece(made.ids, weights)))
    return pieces


def start_routers(
    model: Upcycled,
    named: list[tuple[str, Piece]],
    prefix: list[int],
    settings: Settings,
    device: torch.device,
) -> None:
    """Set every layer's router from a sample of prompts of all sets."""
    by_set: dict[str, list[Piece]] = {}
    for name, piece in named:
        members = by_set.setdefault(name, [])
        if len(members) < settings.router_prompts_a_set:
            members.append(piece)
    sample = [piece for members in by_set.values() for piece in members]
    rows = pack(sample, prefix, settings.length, settings.seed)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, len(rows), 16):
            part = rows.take(np.arange(start, min(start + 16, len(rows))))
            yield (
                _tensor(part.ids, device),
                _tensor(part.positions, device),
                _tensor(part.documents, device),
            )

    inputs = collect_inputs(model, batches(), settings.router_sample_tokens)
    arch = model.arch
    for layer, seen in enumerate(inputs):
        router = discriminant_router(seen, arch.experts, arch.top_k, settings.seed + layer)
        with torch.no_grad():
            model.factors(layer).gate.copy_(router)


class Run:
    """The optimisation loop."""

    def __init__(self, model: Upcycled, settings: Settings, device: torch.device) -> None:
        self._model, self._settings, self._device = model, settings, device
        self._losses = TokenLosses(compiled=device.type == "cuda")
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in model.trained.items():
            rate = settings.lr_router if "gate" in name else settings.lr_a
            if "_experts_B" in name:
                rate = settings.lr_b
            groups.setdefault(rate, []).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=device.type == "cuda",
        )

    def train(self, set_rows: Rows, base_rows: Rows) -> dict[str, object]:
        """Run all steps; return the curve."""
        settings = self._settings
        random = np.random.default_rng(settings.seed)
        steps = max(2, round(settings.epochs * len(set_rows) / settings.set_rows))
        decay = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min((step + 1) / settings.warmup_steps, 1.0 - step / steps),
        )
        from_sets = _cycle(len(set_rows), settings.set_rows, random)
        from_base = _cycle(len(base_rows), settings.base_rows, random)
        curve: list[dict[str, float]] = []
        started = time.monotonic()
        for step in range(steps):
            terms = self._step(set_rows.take(next(from_sets)), base_rows.take(next(from_base)))
            decay.step()
            if step % 25 == 0 or step == steps - 1:
                point = {name: round(value.item(), 4) for name, value in terms.items()}
                point |= {"step": step, "seconds": round(time.monotonic() - started, 1)}
                curve.append(point)
                print(point, flush=True)
        tokens = steps * (settings.set_rows + settings.base_rows) * settings.length
        return {"steps": steps, "tokens_processed": tokens, "curve": curve}

    def _step(self, sets: Rows, own: Rows) -> dict[str, Tensor]:
        settings, model, device = self._settings, self._model, self._device
        split = len(sets)
        both = [
            _tensor(np.concatenate(pair), device)
            for pair in (
                (sets.ids, own.ids),
                (sets.positions, own.positions),
                (sets.documents, own.documents),
                (sets.previous, own.previous),
            )
        ]
        ids, positions, place, previous = both
        weights = _tensor(np.concatenate((sets.weights, own.weights)), device)
        hidden, logits = model(ids, positions, place)
        with torch.no_grad():
            teacher, _ = model(ids[split:], positions[split:], place[split:], experts=False)
        hidden = _before(
            hidden, previous
        )  # [rows, length, hidden]: predicts the token at each place
        teacher = _before(teacher, previous[split:])
        loss = self._losses.cross_entropy(
            hidden[:split].flatten(0, 1),
            model.embedding,
            ids[:split].flatten(),
            weights[:split].flatten(),
        )
        divergence = self._losses.divergence(
            hidden[split:].flatten(0, 1),
            teacher.flatten(0, 1),
            model.embedding,
            weights[split:].flatten(),
        )
        widest = int(max(sets.documents.max(), own.documents.max())) + 1
        label = (torch.arange(len(ids), device=device)[:, None] * widest + place).flatten()
        inside = (place >= 0).flatten().nonzero().squeeze(1)
        routed = torch.stack(logits)[:, inside]  # [layers, tokens, experts]
        top_k = model.arch.top_k
        balance = load_balance(routed, top_k)
        topics = topicality(routed, label[inside], len(ids) * widest, top_k)
        total = (
            loss
            + settings.divergence_weight * divergence
            + settings.balance_weight * balance
            - settings.topic_weight * topics
        )
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimizer.step()
        return {
            "loss": loss.detach(),
            "divergence": divergence.detach(),
            "balance": balance.detach(),
            "topicality": topics.detach(),
        }


def _before(hidden: Tensor, previous: Tensor) -> Tensor:
    index = previous.long().unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


def _cycle(count: int, batch: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of row numbers, every row once an epoch and each epoch in another order."""
    pool = np.empty(0, dtype=np.int64)
    while True:
        while len(pool) < batch:
            pool = np.concatenate((pool, random.permutation(count)))
        yield pool[:batch]
        pool = pool[batch:]


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.dtype == torch.int32:
        tensor = tensor.long()
    return tensor.to(device, non_blocking=True)


def _loss_tokens(pieces: list[Piece]) -> int:
    return int(sum(float((piece.weights > 0).sum()) for piece in pieces))


if __name__ == "__main__":
    main()
