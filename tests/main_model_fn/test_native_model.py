"""Models served without the library: its answers, and its modules where a model asks for more."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.native_decoder import NativeDecoder
from main_model_fn.native_model import NativeModel, NativeShape
from remoe.checkpoint import Checkpoint
from remoe.generation import SamplingParams
from remoe.kernel.native_library import NativePool
from tests.main_model_fn.asking import answers, ask, collect, events, generate, serving
from tests.tiny_families import VOCABULARY, build_tiny_family
from tests.tiny_model import InProcessTransport, native, new_meter, reference, split

FAMILIES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{}, {"tie_word_embeddings": True}],
    "qwen3_moe": [
        {"decoder_sparse_step": 1, "norm_topk_prob": norm, "head_dim": 16} for norm in (True, False)
    ],
    "olmoe": [{}, {"norm_topk_prob": True}],
}
PROMPTS = [
    [2 + (7 * i + shift) % (VOCABULARY - 2) for i in range(9 + 40 * shift)] for shift in range(3)
]
CASES = [(family, n) for family, kinds in FAMILIES.items() for n in range(len(kinds))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    family, kind = request.param
    folder = tmp_path_factory.mktemp(family)
    return Checkpoint.open(build_tiny_family(folder, family, **FAMILIES[family][kind]))


def load(
    checkpoint: Checkpoint,
    pool: NativePool,
    remote: tuple[tuple[int, ...], ...],
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> tuple[NativeModel, Any]:
    meter, folder = new_meter(), checkpoint.model_dir
    return native(folder, remote, InProcessTransport(folder), meter, pool, dtype, **more), meter


@pytest.mark.parametrize("remote", [((),) * 3, ((), (0, 3), (1,)), ((0, 1, 2, 3),) * 3])
def test_answers_and_routes_are_the_librarys(
    checkpoint: Checkpoint, pool: NativePool, remote: tuple[tuple[int, ...], ...]
) -> None:
    model, meter = load(checkpoint, pool, remote)
    with serving(model, meter) as engine:
        natively = answers(engine, PROMPTS)
    meter = new_meter()
    transport = InProcessTransport(checkpoint.model_dir)
    with serving(split(checkpoint.model_dir, remote, transport, meter), meter) as engine:
        by_modules = answers(engine, PROMPTS)
    unmodified = reference(checkpoint.model_dir)
    for prompt, ours, theirs in zip(PROMPTS, natively, by_modules, strict=True):
        assert ours[0] == theirs[0] == generate(unmodified, prompt, 8)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
        assert ours[2] == theirs[2]


def test_in_bfloat16_it_computes_the_bits_that_the_modules_natives_do(
    checkpoint: Checkpoint, pool: NativePool
) -> None:
    """transformers' body with the same native layers in it: the same tokens, and what is counted."""
    model, meter = load(checkpoint, pool, ((),) * 3, torch.bfloat16)
    with serving(model, meter) as engine:
        ours = answers(engine, PROMPTS)
    meter, transport = new_meter(), InProcessTransport(checkpoint.model_dir)
    theirs = split(
        checkpoint.model_dir, ((),) * 3, transport, meter, dtype=torch.bfloat16, pool=pool
    )
    assert isinstance(theirs.base_model.forward, NativeDecoder)
    with serving(theirs, meter) as engine:
        assert answers(engine, PROMPTS) == ours


def test_long_prompts_are_read_by_matrix_products(
    checkpoint: Checkpoint, pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("main_model_fn.long_prompts.MOST_KEYS", 10)
    model, meter = load(checkpoint, pool, ((), (0, 3), (1,)))
    unmodified = reference(checkpoint.model_dir)
    with serving(model, meter) as engine:
        told = answers(engine, PROMPTS)
        scored = asyncio.run(events(engine, ask(PROMPTS[2], tokens=1, prompt_logprobs=0)))
    for prompt, (tokens, _, (prefill, _)) in zip(PROMPTS, told, strict=True):
        assert tokens == generate(unmodified, prompt, 8)
        assert [sum(layer) for layer in prefill] == [2 * len(prompt)] * 3
    with torch.no_grad():
        expected = unmodified(torch.tensor([PROMPTS[2]])).logits[0].log_softmax(-1)
    got = [entry.logprob for entry in scored[0].prompt_logprobs if entry is not None]
    rows = range(len(PROMPTS[2]) - 1)
    assert got == pytest.approx(expected[rows, PROMPTS[2][1:]].tolist(), abs=1e-4)


def test_no_step_is_longer_than_the_limits_say(checkpoint: Checkpoint, pool: NativePool) -> None:
    """More streams than rows: all are served in turn, each as if it were alone."""
    model, meter = load(checkpoint, pool, ((), (0, 3), (1,)))
    rows: list[int] = []
    begin_step = meter.begin_step

    def counting(spans: list[Any], now: float) -> None:
        rows.append(sum(span.rows for span in spans))
        begin_step(spans, now)

    meter.begin_step = counting
    limits = EngineLimits(
        kv_tokens=1024, page_tokens=16, batch_tokens=4, max_requests=32, max_queue=32
    )
    engine = Engine(model, meter, limits=limits, deployment_plan_id="plan-test")
    engine.start()
    wild = SamplingParams(temperature=1.0, seed=4)

    async def together() -> list[list[int]]:
        asked = (collect(engine, ask(prompt, tokens=6, sampling=wild)) for prompt in 3 * PROMPTS)
        return [tokens for tokens, _ in await asyncio.gather(*asked)]

    try:
        told = asyncio.run(together())
        alone = [asyncio.run(collect(engine, ask(p, tokens=6, sampling=wild)))[0] for p in PROMPTS]
    finally:
        engine.stop()
    assert told == 3 * alone
    assert max(rows) == 4


def test_nothing_of_the_library_is_imported(tiny_model_dir: Path, library: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
import main_model_fn.app
from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.metering import StepMeter
from main_model_fn.served_model import load_served_model
from remoe.experts import Partition
from remoe.kernel.native_library import NativePool
meter = StepMeter(layers=3, experts=4, main_memory_gb=1)
model = load_served_model(
    Path(sys.argv[1]), partition=Partition(experts=4, remote=((),) * 3), dtype=None,
    device=torch.device("cpu"), transport=None, function_memory_gb=dict.fromkeys(range(3), 1.0),
    meter=meter, pool=NativePool(threads=1),
)
limits = EngineLimits(kv_tokens=512, page_tokens=16, batch_tokens=16, max_requests=1, max_queue=1)
engine = Engine(model, meter, limits=limits, deployment_plan_id="")
print([name for name in ("transformers", "torch._dynamo", "scipy") if name in sys.modules])
"""
    folder = str(tiny_model_dir)
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 8}),
        ("mixtral", {"rms_norm_eps": None}),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("mixtral", {"partial_rotary_factor": 0.5}),
        ("mixtral", {"dtype": None}),
        ("mixtral", {"dtype": "float64"}),
        ("qwen3_moe", {"attention_bias": True}),
        ("qwen3_moe", {"norm_topk_prob": None}),
        ("qwen3_moe", {"use_sliding_window": True}),
        ("olmoe", {"clip_qkv": 3.0}),
        ("olmoe", {"num_key_value_heads": None}),
        ("qwen2_moe", {}),
    ],
)
def test_what_asks_for_more_stays_with_the_library(
    tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    more = FAMILIES.get(family, [{}])[0]
    folder = build_tiny_family(tmp_path, family, **more)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert (NativeShape.of(Checkpoint.open(folder)) is None) == (family not in FAMILIES)
    path.write_text(json.dumps(config | changes))
    assert NativeShape.of(Checkpoint.open(folder)) is None
