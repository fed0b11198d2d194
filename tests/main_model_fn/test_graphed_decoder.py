"""Decoding in segments between the host's experts gives the modules' answers.

Without a GPU the CPU stands in for it: everything runs but the capture itself, whose code is run
each time.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from main_model_fn import graphed_decoder
from main_model_fn.exchange import Exchange
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.few_rows import FewRows
from main_model_fn.graphed_decoder import GraphedDecoder
from main_model_fn.hot_experts import HotBudget
from main_model_fn.loading import load_split_model
from main_model_fn.machine import slices_for
from main_model_fn.placement import ExpertTimes
from main_model_fn.slots import SlotsOf
from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId, Partition
from remoe.kernel.native_library import NativePool
from tests.main_model_fn.asking import answers, ask, events, generate, serving
from tests.tiny_families import VOCABULARY, build_tiny_family
from tests.tiny_model import InProcessTransport, new_meter, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Experts of any number of rows are streamed or not by turns.
BOTH = ExpertTimes([1, 64], [1e-4, 1e-4], [1e-5, 1e-5], 1e-4)
# What a family's tiny model has besides: slices of experts are 32 wide.
FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": {"intermediate_size": 128},
    "olmoe": {"intermediate_size": 64},
    "qwen2_moe": {},
    "deepseek_v2": {},
}
# Without the padding token, 0, which transformers would not look at.
PROMPTS = [
    [2 + (7 * i + shift) % (VOCABULARY - 2) for i in range(9 + 20 * shift)] for shift in range(3)
]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    return Checkpoint.open(build_tiny_family(folder, request.param, **FAMILIES[request.param]))  # type: ignore[arg-type]


def load(
    checkpoint: Checkpoint, pool: NativePool, remote: tuple[int, ...] = (), hot: int = 0
) -> tuple[PreTrainedModel, Any]:
    weights = checkpoint.expert(ExpertId(checkpoint.moe_layers[0], 0)).all()
    meter = new_meter(experts=checkpoint.experts, layers=checkpoint.layers)
    model = load_split_model(
        checkpoint.model_dir,
        partition=Partition(
            experts=checkpoint.experts,
            remote=tuple(
                remote if layer in checkpoint.moe_layers else ()
                for layer in range(checkpoint.layers)
            ),
        ),
        dtype=torch.float32,
        device=DEVICE,
        transport=InProcessTransport(checkpoint.model_dir),
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 0.5),
        meter=meter,
        pool=pool,
        hot=HotBudget(hot * sum(tensor.values.size for tensor in weights) * 4),
    )
    body = model.base_model
    assert isinstance(body.forward, GraphedDecoder)
    body.forward.machine.times = BOTH
    return model, meter


@pytest.mark.parametrize(("remote", "hot"), [((), 0), ((), 5), ((1,), 0), ((0, 3), 2)])
def test_answers_and_routes_are_the_modules(
    checkpoint: Checkpoint,
    pool: NativePool,
    remote: tuple[int, ...],
    hot: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, meter = load(checkpoint, pool, remote, hot)
    body = model.base_model
    computed = list[tuple[int, bool]]()
    begin = FewRows.begin

    def counted(self: FewRows, layer: Any, rows: int, following: Any) -> bool:
        computed.append((rows, begin(self, layer, rows, following)))
        return computed[-1][1]

    monkeypatch.setattr(FewRows, "begin", counted)
    with serving(model, meter) as engine:
        in_segments = answers(engine, PROMPTS)
    assert {rows for rows, _ in computed} >= {1, 3}
    assert all(done for _, done in computed) == (not remote)
    del body.forward  # back to the library's
    with serving(model, meter) as engine:
        by_modules = answers(engine, PROMPTS)
    unmodified = reference(checkpoint.model_dir)
    for prompt, ours, theirs in zip(PROMPTS, in_segments, by_modules, strict=True):
        assert ours[0] == theirs[0] == generate(unmodified, prompt, 8)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
        assert ours[2] == theirs[2]


@pytest.mark.parametrize("hot", [0, 2])
@pytest.mark.parametrize("rightly", [True, False])
def test_what_is_foretold_changes_no_answer(
    checkpoint: Checkpoint,
    pool: NativePool,
    hot: int,
    *,
    rightly: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, meter = load(checkpoint, pool, hot=hot)
    foretell, add = Exchange.foretell, SlotsOf.add
    taken, unwanted = list[int](), list[int]()

    def foretold(self: Exchange, hidden: torch.Tensor, gate: torch.Tensor) -> None:
        foretell(self, hidden, gate if rightly else -gate)

    def added(self: SlotsOf, *given: Any, **named: Any) -> Any:
        taken.append(len(named["ahead"]))
        unwanted.append(named["unwanted"])
        return add(self, *given, **named)

    monkeypatch.setattr(Exchange, "foretell", foretold)
    monkeypatch.setattr(SlotsOf, "add", added)
    with serving(model, meter) as engine:
        told = answers(engine, PROMPTS[:1])
    assert sum(taken if rightly else unwanted) > 0
    unmodified = reference(checkpoint.model_dir)
    assert [answer[0] for answer in told] == [generate(unmodified, p, 8) for p in PROMPTS[:1]]


def test_a_step_that_cannot_be_captured_is_the_librarys(
    checkpoint: Checkpoint, pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, meter = load(checkpoint, pool)
    monkeypatch.setattr(graphed_decoder, "segments", refuse)
    with serving(model, meter) as engine:
        told = answers(engine, PROMPTS)
    unmodified = reference(checkpoint.model_dir)
    assert [answer[0] for answer in told] == [generate(unmodified, p, 8) for p in PROMPTS]


def test_who_watches_sees_every_layers_input_and_routes(
    checkpoint: Checkpoint, pool: NativePool
) -> None:
    model, meter = load(checkpoint, pool)
    seen = list[tuple[int, int, int]]()
    for module in experts_by_layer(model).values():
        module.remoe.observe = lambda layer, hidden, index: seen.append(  # type: ignore[union-attr]
            (layer, len(hidden), len(index))
        )
    with serving(model, meter) as engine:
        asyncio.run(events(engine, ask(PROMPTS[0], tokens=4)))
    layers = checkpoint.moe_layers
    assert [layer for layer, _, _ in seen] == list(layers) * 4
    assert seen[-1][1:] == (1, 1)


@pytest.mark.parametrize(
    ("top_k", "inner", "slices"),
    [(8, 1024, 2), (4, 1408, 4), (6, 1408, 2), (2, 14336, 8), (1, 96, 3), (4, 1000, 1)],
)
def test_a_tokens_experts_are_about_sixteen_slices_if_they_divide(
    top_k: int, inner: int, slices: int
) -> None:
    assert slices_for(top_k, inner) == slices
