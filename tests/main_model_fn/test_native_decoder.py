"""All layers in one native call: the library's answers, and Python only where an expert is remote."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from main_model_fn.engine import Engine
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.loading import load_split_model
from main_model_fn.native_decoder import NativeDecoder
from remoe.checkpoint import Checkpoint
from remoe.expert_call import MAX_BODY_BYTES
from remoe.experts import Partition
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import Decoding
from tests.main_model_fn.asking import answers, ask, events, generate, serving
from tests.tiny_families import VOCABULARY, build_tiny_family
from tests.tiny_model import InProcessTransport, new_meter, reference

# What a family's tiny model has besides, for all layers to have experts.
FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "olmoe": {},
}
# Without the padding token, 0, which transformers would not look at.
PROMPTS = [
    [2 + (7 * i + shift) % (VOCABULARY - 2) for i in range(9 + 40 * shift)] for shift in range(3)
]


class Counting:
    """A pool's calls for a whole step, counted with the layers at which they stopped."""

    def __init__(self, pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stops: list[int] = []
        decode = pool.decode

        def counted(step: Decoding) -> None:
            decode(step)
            self.stops.append(step.layer)

        monkeypatch.setattr(pool, "decode", counted)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    return Checkpoint.open(build_tiny_family(folder, request.param, **FAMILIES[request.param]))  # type: ignore[arg-type]


def load(
    checkpoint: Checkpoint,
    pool: NativePool,
    remote: tuple[tuple[int, ...], ...],
    dtype: torch.dtype = torch.float32,
    transport: InProcessTransport | None = None,
    payload_limit_bytes: int = MAX_BODY_BYTES,
) -> tuple[PreTrainedModel, Any]:
    meter = new_meter()
    model = load_split_model(
        checkpoint.model_dir,
        partition=Partition(experts=4, remote=remote),
        dtype=dtype,
        device=torch.device("cpu"),
        transport=transport or InProcessTransport(checkpoint.model_dir),
        function_memory_gb=dict.fromkeys(range(3), 0.5),
        meter=meter,
        pool=pool,
        payload_limit_bytes=payload_limit_bytes,
    )
    return model, meter


@pytest.mark.parametrize("remote", [((),) * 3, ((), (0, 3), (1,)), ((0, 1, 2, 3),) * 3])
def test_answers_and_routes_are_the_modules(
    checkpoint: Checkpoint, pool: NativePool, remote: tuple[tuple[int, ...], ...]
) -> None:
    model, meter = load(checkpoint, pool, remote)
    body = model.base_model
    assert isinstance(body.forward, NativeDecoder)
    with serving(model, meter) as engine:
        natively = answers(engine, PROMPTS)
    del body.forward  # back to the library's
    with serving(model, meter) as engine:
        by_modules = answers(engine, PROMPTS)
    unmodified = reference(checkpoint.model_dir)
    for prompt, ours, theirs in zip(PROMPTS, natively, by_modules, strict=True):
        assert ours[0] == theirs[0] == generate(unmodified, prompt, 8)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
        assert ours[2] == theirs[2]


def test_python_is_asked_only_where_an_expert_is_remote(
    checkpoint: Checkpoint, pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for remote, stops in ((((),) * 3, {3}), (((), (0, 1, 2, 3), ()), {1, 3})):
        model, meter = load(checkpoint, pool, remote)
        counting = Counting(pool, monkeypatch)
        with serving(model, meter) as engine:
            answers(engine, PROMPTS)
        assert set(counting.stops) == stops
        monkeypatch.undo()


def test_a_call_that_is_lost_or_too_large_changes_no_answer(
    checkpoint: Checkpoint, pool: NativePool
) -> None:
    remote = ((0, 1), (0, 1, 2, 3), (2,))
    model, meter = load(checkpoint, pool, remote)
    with serving(model, meter) as engine:
        expected = answers(engine, PROMPTS)
    lossy = InProcessTransport(checkpoint.model_dir)
    lossy.refuse = {0, 2}
    limit = 512 + 4 * 10 + 5 * (4 * 32 + 2 * 8)  # five rows a call
    for transport, limit_bytes in ((lossy, MAX_BODY_BYTES), (None, limit)):
        model, meter = load(
            checkpoint, pool, remote, transport=transport, payload_limit_bytes=limit_bytes
        )
        with serving(model, meter) as engine:
            got = answers(engine, PROMPTS)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours[0] == theirs[0]
            assert ours[1] == pytest.approx(theirs[1], abs=1e-4)


@pytest.mark.parametrize("beside", [False, True])
def test_calls_say_whether_the_caller_computes_beside(
    checkpoint: Checkpoint, pool: NativePool, beside: bool
) -> None:
    """Natively and by the modules: only on the same machine, and only if experts are here too."""
    transport = InProcessTransport(checkpoint.model_dir)
    transport.beside = beside
    model, meter = load(checkpoint, pool, ((0, 1), (0, 1, 2, 3), ()), transport=transport)
    for _ in range(2):
        with serving(model, meter) as engine:
            answers(engine, PROMPTS)
        said = {layer: {c.beside for c in transport.calls if c.layer == layer} for layer in (0, 1)}
        # A lone token's two experts may both be elsewhere.
        assert beside in said[0]
        assert said[0] <= {False, beside}
        assert said[1] == {False}
        transport.calls.clear()
        vars(model.base_model).pop("forward", None)


def test_who_watches_sees_what_the_modules_show(checkpoint: Checkpoint, pool: NativePool) -> None:
    model, meter = load(checkpoint, pool, ((), (0, 3), (0, 1, 2, 3)))
    body = model.base_model
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for module in experts_by_layer(model).values():
        split: Any = module.remoe
        split.observe = lambda *told: seen.append(told)
    told = []
    for _ in range(2):
        with serving(model, meter) as engine:
            asyncio.run(events(engine, ask(PROMPTS[0], tokens=3)))
        told.append(list(seen))
        seen.clear()
        vars(body).pop("forward", None)  # then by the library's
    assert [layer for layer, *_ in told[0]] == [layer for layer, *_ in told[1]] == 3 * [0, 1, 2]
    for (_, hidden, index), (_, their_hidden, their_index) in zip(*told, strict=True):
        assert torch.allclose(hidden, their_hidden, atol=1e-5)
        assert torch.equal(index.sort(-1).values, their_index.sort(-1).values)


def test_in_bfloat16_it_is_as_close_to_float32_as_transformers_is(
    checkpoint: Checkpoint, pool: NativePool
) -> None:
    """By the log-probabilities of the same tokens, those that the float32 model answers."""
    exact = reference(checkpoint.model_dir)
    theirs = reference(checkpoint.model_dir, torch.bfloat16)
    model, meter = load(checkpoint, pool, ((),) * 3, torch.bfloat16)
    texts = [prompt + generate(exact, prompt, 8) for prompt in PROMPTS]

    async def scored(engine: Engine) -> list[float]:
        told = [await events(engine, ask(text, tokens=1, prompt_logprobs=0)) for text in texts]
        return [e.logprob for one in told for e in one[0].prompt_logprobs if e is not None]

    with serving(model, meter) as engine:
        ours = torch.tensor(asyncio.run(scored(engine)))

    def of(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            rows = [model(torch.tensor([text])).logits[0].float().log_softmax(-1) for text in texts]
        return torch.cat([r[range(len(t) - 1), t[1:]] for r, t in zip(rows, texts, strict=True)])

    expected = of(exact)
    errors = [(one - expected).square().median() for one in (ours, of(theirs))]
    assert errors[0] <= 2 * errors[1]


def _twice(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return 2 * output
    output.last_hidden_state = 2 * output.last_hidden_state
    return output


def doubled(module: nn.Module) -> None:
    """A module that gives twice what it gave."""
    inner = module.forward
    module.forward = lambda *args, **kwargs: _twice(inner(*args, **kwargs))


def biased(router: nn.Module) -> None:
    router.register_parameter("bias", nn.Parameter(torch.zeros(4)))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: doubled(body.layers[1]),
        lambda body: doubled(body.layers[2].mlp),
        lambda body: doubled(body.layers[2].mlp.experts),
        lambda body: doubled(body.layers[0].post_attention_layernorm),
        doubled,
        lambda body: biased(body.layers[0].mlp.gate),
    ],
)
def test_what_computes_otherwise_stays_with_the_library(
    tmp_path: Path, pool: NativePool, change: Callable[[Any], None]
) -> None:
    """A family's names may be the same where its formulas are not."""
    checkpoint = Checkpoint.open(build_tiny_family(tmp_path, "mixtral"))
    model, meter = load(checkpoint, pool, ((),) * 3)
    body = model.base_model
    del body.forward
    assert NativeDecoder.replacing(body, pool, meter) is not None
    change(body)
    assert NativeDecoder.replacing(body, pool, meter) is None
