"""Every supported family, split anywhere, answers as transformers' own model does."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from expert_fn.compute import ExpertComputer
from knative.deployment import DeploymentOptions, default_deployment
from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.loading import load_split_model
from main_model_fn.metering import StepMeter
from main_model_fn.weight_reader import WeightReader
from remoe import families
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import ExpertId, Partition
from remoe.families import FAMILIES
from remoe.generation import GenerateEvent
from remoe.kernel.interface import open_kernel
from remoe.kernel.native_library import NativePool
from tests.calls import expert_call, sums
from tests.main_model_fn.asking import ask, events, generate
from tests.tiny_families import DENSE_LAYERS, VOCABULARY, build_tiny_family
from tests.tiny_model import InProcessTransport, new_meter, reference

TOLERANCE = 1e-5  # of the largest logit
LIMITS = EngineLimits(kv_tokens=256, page_tokens=16, batch_tokens=32, max_requests=4, max_queue=4)


@pytest.fixture(scope="module", params=FAMILIES)
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def checkpoint(family_dir: Path) -> Checkpoint:
    return Checkpoint.open(family_dir)


@pytest.fixture(scope="module")
def unmodified(family_dir: Path) -> PreTrainedModel:
    return reference(family_dir)


def load(
    checkpoint: Checkpoint,
    partition: Partition,
    dtype: torch.dtype = torch.float32,
    meter: StepMeter | None = None,
    pool: NativePool | None = None,
) -> PreTrainedModel:
    return load_split_model(
        checkpoint.model_dir,
        partition=partition,
        dtype=dtype,
        device=torch.device("cpu"),
        transport=InProcessTransport(checkpoint.model_dir),
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 0.5),
        meter=meter or new_meter(experts=checkpoint.experts, layers=checkpoint.layers),
        pool=pool,
    )


def partition_of(checkpoint: Checkpoint, remote: dict[int, tuple[int, ...]]) -> Partition:
    return Partition(
        experts=checkpoint.experts,
        remote=tuple(remote.get(layer, ()) for layer in range(checkpoint.layers)),
    )


def random_partition(checkpoint: Checkpoint, seed: int) -> Partition:
    rng = np.random.default_rng(seed)
    chosen = {
        layer: tuple(np.flatnonzero(rng.random(checkpoint.experts) < 0.5).tolist())
        for layer in checkpoint.moe_layers
    }
    return partition_of(checkpoint, chosen)


def all_remote(checkpoint: Checkpoint) -> Partition:
    everything = tuple(range(checkpoint.experts))
    return partition_of(checkpoint, dict.fromkeys(checkpoint.moe_layers, everything))


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=source)


def assert_same_logits(
    unmodified: PreTrainedModel, model: PreTrainedModel, tokens: torch.Tensor
) -> None:
    with torch.no_grad():
        expected, got = unmodified(tokens).logits, model(tokens).logits
    assert (expected - got).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_table_accounts_for_every_tensor_in_the_files(
    checkpoint: Checkpoint, unmodified: PreTrainedModel
) -> None:
    """The files are what transformers' own converters make of the model."""
    experts = [
        name
        for layer in checkpoint.moe_layers
        for index in range(checkpoint.experts)
        for name in checkpoint.family.expert_names(ExpertId(layer, index))
    ]
    assert sorted([*dict.fromkeys(experts), *checkpoint.non_expert_names]) == checkpoint.names
    size = sum(
        parameter.numel() * parameter.element_size()
        for _, parameter in {**dict(unmodified.named_parameters())}.items()
    ) + sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in unmodified.named_buffers()
        if name in unmodified.state_dict()
    )
    held = checkpoint.expert_count * checkpoint.expert_size_bytes
    assert held + checkpoint.non_expert_size_bytes == size


def test_facts_are_those_of_transformers_configuration(
    checkpoint: Checkpoint, unmodified: PreTrainedModel
) -> None:
    modules = experts_by_layer(unmodified)
    assert checkpoint.moe_layers == tuple(modules)
    dense = set(range(checkpoint.layers)) - set(modules)
    assert dense == DENSE_LAYERS.get(checkpoint.family.model_type, set())
    module = next(iter(modules.values()))
    assert checkpoint.experts == module.num_experts == 4
    rows = unmodified.get_input_embeddings().weight[[5, 0, 5]].detach().numpy()
    assert np.array_equal(checkpoint.embedding_rows([5, 0, 5]), rows)
    routed: list[int] = []
    hook = module.register_forward_hook(lambda _, inputs, __: routed.append(inputs[1].shape[1]))
    with torch.no_grad():
        unmodified(tokens_of(1, 3))
    hook.remove()
    assert routed == [checkpoint.top_k]


def test_cache_and_memory_are_counted_as_transformers_holds_them(
    checkpoint: Checkpoint, unmodified: PreTrainedModel
) -> None:
    with torch.no_grad():
        cache = unmodified(tokens_of(1, 5), use_cache=True).past_key_values
    numbers = sum(
        layer.keys.numel() + layer.values.numel()
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None
    )
    latent = isinstance(checkpoint.config.get("kv_lora_rank"), int)
    # The paged cache pads the rotary key (8 numbers here) to the latent (16).
    padding = checkpoint.layers * 8 if latent else 0
    held = 2 * (numbers / 5 + padding)
    if checkpoint.family.recurrent:  # Jamba does not say which layers grow
        assert checkpoint.kv_bytes_per_token >= held
    else:
        assert checkpoint.kv_bytes_per_token == held
    options = DeploymentOptions(model_dir=checkpoint.model_dir, threads=1)
    assert default_deployment(options).main.memory_mib > 0


def test_experts_are_views_of_the_weights_that_transformers_loads(
    checkpoint: Checkpoint, unmodified: PreTrainedModel
) -> None:
    layer = checkpoint.moe_layers[-1]
    module, index = experts_by_layer(unmodified)[layer], checkpoint.experts - 1
    tensors = checkpoint.expert(ExpertId(layer, index))
    loaded = {name: value[index].detach() for name, value in module.named_parameters()}
    layout = checkpoint.family.layout
    for name, parts in (
        ("gate_up_proj", (tensors.gate, tensors.up)),
        ("down_proj", (tensors.down,)),
        ("gate_up_proj_bias", (tensors.gate_bias, tensors.up_bias)),
        ("down_proj_bias", (tensors.down_bias,)),
    ):
        present = [part.values for part in parts if part is not None]
        if name not in loaded:
            assert present == []
            continue
        assert not any(part.flags.owndata for part in present)
        axis = 1 if layout.interleaved and len(present) == 2 else 0
        both = np.stack(present, axis=1) if axis else np.concatenate(present)
        both = both.reshape(-1, *present[0].shape[1:])
        expected = loaded[name].numpy()
        if layout.transposed and expected.ndim == 2:
            expected = expected.T
        assert np.array_equal(both, expected)


def test_logits_are_equal_for_random_partitions(
    checkpoint: Checkpoint, unmodified: PreTrainedModel, pool: NativePool
) -> None:
    for seed, how in enumerate((None, pool)):
        model = load(checkpoint, random_partition(checkpoint, seed), pool=how)
        assert_same_logits(unmodified, model, tokens_of(1 + seed, 9, seed))
        assert_same_logits(unmodified, model, tokens_of(1, 1, seed))


def test_greedy_tokens_are_equal_with_every_expert_remote(
    checkpoint: Checkpoint, unmodified: PreTrainedModel
) -> None:
    model = load(checkpoint, all_remote(checkpoint))
    assert_same_logits(unmodified, model, tokens_of(2, 7))
    tokens = tokens_of(1, 9, 7)
    how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    expected, got = (one.generate(tokens, **how) for one in (unmodified, model))
    assert torch.equal(expected, got)
    assert len(expected[0]) == 25


def test_all_local_in_bfloat16_is_bit_identical(checkpoint: Checkpoint) -> None:
    """By torch; which includes what must stay float32, such as DeepSeek-V3's routing bias."""
    unmodified = reference(checkpoint.model_dir, torch.bfloat16)
    model = load(checkpoint, partition_of(checkpoint, {}), torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(unmodified(tokens_of(2, 8)).logits, model(tokens_of(2, 8)).logits)


def test_natively_in_bfloat16_it_is_as_close_to_float32_as_transformers_is(
    checkpoint: Checkpoint, unmodified: PreTrainedModel, pool: NativePool
) -> None:
    """Experts are summed in float32 and rounded once; transformers rounds after each operation."""
    tokens = tokens_of(3, 20)
    theirs = reference(checkpoint.model_dir, torch.bfloat16)
    ours = load(checkpoint, random_partition(checkpoint, 2), torch.bfloat16, pool=pool)
    with torch.no_grad():
        exact = unmodified(tokens).logits
        errors = [
            # The median: a token near the border between two experts may go to either.
            (one(tokens).logits.float() - exact).square().mean(-1).median()
            for one in (theirs, ours)
        ]
    assert errors[1] <= 2 * errors[0]


def test_remote_experts_are_never_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int | None]] = []
    tensor, expert_part = WeightReader.tensor, WeightReader.expert_part

    def note_tensor(self: WeightReader, name: str) -> torch.Tensor:
        read.append((name, None))
        return tensor(self, name)

    def note_part(self: WeightReader, name: str, index: int | None = None) -> torch.Tensor:
        read.append((name, index))
        return expert_part(self, name, index)

    monkeypatch.setattr(WeightReader, "tensor", note_tensor)
    monkeypatch.setattr(WeightReader, "expert_part", note_part)
    partition = random_partition(checkpoint, 3)
    assert 0 < partition.remote_count < checkpoint.expert_count
    load(checkpoint, partition)
    stacked = checkpoint.family.layout.stacked
    resident = [
        (name, index if stacked else None)
        for layer in checkpoint.moe_layers
        for index in partition.local(layer)
        for name in checkpoint.family.expert_names(ExpertId(layer, index))
    ]
    others = [(name, None) for name in checkpoint.non_expert_names]
    assert sorted(read, key=str) == sorted([*resident, *others], key=str)


def _mapped_bytes(folder: Path) -> int:
    """How much of the folder's files this process holds in memory (Linux)."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("natively", [True, False])
def test_cold_experts_never_enter_memory(
    model_type: str, natively: bool, tmp_path: Path, pool: NativePool
) -> None:
    """The operating system's count, for each kind of layout."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "experts": 8, "layers": 2}
    build_tiny_family(tmp_path, model_type, **sizes)
    checkpoint = Checkpoint.open(tmp_path)
    warm = partition_of(checkpoint, {0: tuple(range(8)), 1: (0, 1, 2, 4, 5, 6, 7)})
    model = load(checkpoint, warm, pool=pool if natively else None)
    resident = checkpoint.non_expert_size_bytes + checkpoint.expert_size_bytes
    everything = checkpoint.non_expert_size_bytes + 16 * checkpoint.expert_size_bytes
    # A page that is touched brings those around it: up to 2 MiB at each end of what is read.
    slack = 12 << 20
    assert resident + slack < everything / 2
    assert _mapped_bytes(tmp_path) <= resident + slack
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 <= resident
    # And the expert function reads what it is called for, widened or not.
    computer = ExpertComputer(checkpoint, first_layer=0, last_layer=1)
    call = expert_call(checkpoint.digest, np.ones((1, 512), np.float32), {5: [(0, 1.0)]}, layer=1)
    computer.compute(call)
    assert _mapped_bytes(tmp_path) <= resident + checkpoint.expert_size_bytes + slack


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("choice", ["numpy", "native"])
def test_the_expert_function_computes_what_the_module_does(
    model_type: str, choice: str, tmp_path: Path, library: Path
) -> None:
    """One family for each kind of layout, and only the called experts are read."""
    checkpoint = Checkpoint.open(build_tiny_family(tmp_path, model_type))
    kernel = open_kernel(
        checkpoint.expert,
        "native" if choice == "native" else "numpy",
        activation=checkpoint.activation,
        library=library,
    )
    computer = ExpertComputer(checkpoint, first_layer=0, last_layer=2, kernel=kernel)
    module = experts_by_layer(reference(tmp_path))[1]
    # Large enough to be cut off by GPT-OSS's limit.
    hidden = 30 * np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    chosen = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 3], [2, 0]])
    gates = torch.rand((5, 2), generator=torch.Generator().manual_seed(0))
    routes = {
        expert: [(row, float(gates[row, slot])) for row, slot in (chosen == expert).nonzero()]
        for expert in (0, 2, 3)
    }
    with torch.no_grad():
        expected = module(torch.from_numpy(hidden), chosen, gates).numpy()
    got = sums(computer.compute(expert_call(checkpoint.digest, hidden, routes, layer=1)), 5)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert computer.loaded == 3


def test_the_engine_serves_every_family(
    checkpoint: Checkpoint, unmodified: PreTrainedModel, pool: NativePool
) -> None:
    meter = new_meter(experts=checkpoint.experts, layers=checkpoint.layers)
    model = load(checkpoint, random_partition(checkpoint, 1), meter=meter, pool=pool)
    recurrent = checkpoint.family.recurrent
    if recurrent:
        with pytest.raises(ValueError, match="Invalid layer type"):  # transformers' own words
            Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine = Engine(
        model, meter, limits=LIMITS, deployment_plan_id="plan-test", recurrent=recurrent
    )
    engine.start()
    # The second is longer than a step's tokens: read in pieces, beside another that decodes.
    prompts = [tokens_of(1, length, length)[0].tolist() for length in (5, 40)]

    async def run() -> list[list[GenerateEvent]]:
        return await asyncio.gather(
            *(
                events(engine, ask(prompt, tokens=6, logprobs=0, prompt_logprobs=0))
                for prompt in prompts
            )
        )

    try:
        answers = asyncio.run(run())
    finally:
        engine.stop()
    routed = [layer in checkpoint.moe_layers for layer in range(checkpoint.layers)]
    for prompt, told in zip(prompts, answers, strict=True):
        tokens = [token for event in told for token in event.tokens]
        assert tokens == generate(unmodified, prompt, 6)
        stats = told[-1].stats
        assert stats is not None
        for counts, rows in ((stats.prefill_counts, len(prompt)), (stats.decode_counts, 5)):
            expected = [rows * checkpoint.top_k * has for has in routed]
            assert np.array(counts).sum(axis=1).tolist() == expected
        with torch.no_grad():
            logits = unmodified(torch.tensor([prompt + tokens])).logits[0]
        scored = [*told[0].prompt_logprobs[1:], *(entry for e in told for entry in e.logprobs)]
        wanted = logits.log_softmax(-1)[range(len(scored)), [*prompt[1:], *tokens]]
        # Logits of a tiny random model may be in the hundreds.
        tolerance = 1e-4 * max(1.0, float(logits.abs().max()) / 10)
        assert [entry.logprob for entry in scored if entry] == pytest.approx(
            wanted.tolist(), abs=tolerance
        )


@st.composite
def _shapes(draw: st.DrawFn) -> dict[str, object]:
    experts = draw(st.integers(2, 9))
    return {
        "layers": draw(st.integers(2, 4)),
        "experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "intermediate_size": draw(st.sampled_from([1, 7, 24, 40])),
        "seed": draw(st.integers(0, 99)),
    }


@given(
    model_type=st.sampled_from(list(FAMILIES)),
    shape=_shapes(),
    seed=st.integers(0, 99),
    batch=st.tuples(st.integers(1, 3), st.integers(1, 12)),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_logits_are_equal_for_any_configuration_partition_and_batch(
    tmp_path_factory: pytest.TempPathFactory,
    pool: NativePool,
    model_type: str,
    shape: dict[str, object],
    seed: int,
    batch: tuple[int, int],
) -> None:
    folder = build_tiny_family(tmp_path_factory.mktemp("random"), model_type, **shape)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(folder)
    unmodified, tokens = reference(folder), tokens_of(*batch, seed)
    with torch.no_grad():
        exact = reference(folder, torch.float64)(tokens).logits
        theirs = (unmodified(tokens).logits - exact).abs().max()
        for how in (None, pool):
            model = load(checkpoint, random_partition(checkpoint, seed), pool=how)
            ours = (model(tokens).logits - exact).abs().max()
            # Norms over a few numbers magnify float32's rounding, theirs as ours.
            assert ours <= TOLERANCE * exact.abs().max() + 4 * theirs


@pytest.fixture
def granite(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(build_tiny_family(tmp_path, "granitemoe"))


def test_a_wrong_row_is_refused_and_not_computed(
    granite: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = FAMILIES["granitemoe"]
    wrong = dataclasses.replace(row, layout=dataclasses.replace(row.layout, interleaved=True))
    monkeypatch.setitem(families.FAMILIES, "granitemoe", wrong)
    with pytest.raises(CheckpointError, match=r"GraniteMoeExperts.*is_concatenated.*interleaved"):
        load(granite, partition_of(granite, {}))


def test_remote_experts_in_a_dense_layer_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(build_tiny_family(tmp_path, "glm4_moe"))
    with pytest.raises(CheckpointError, match=re.escape("dense layer of [0]")):
        load(checkpoint, partition_of(checkpoint, {0: (1,)}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.1.mlp.gate.e_score_correction_bias", None),  # a buffer
        ("model.layers.1.mlp.shared_experts.up_proj.weight", None),
        (None, "model.layers.1.mlp.surprise.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, old: str | None, new: str | None
) -> None:
    shard = build_tiny_family(tmp_path, "deepseek_v3") / "model.safetensors"
    tensors = load_file(shard)
    if old is not None:
        del tensors[old]
    if new is not None:
        tensors[new] = torch.zeros(2, 2)
    save_file(tensors, shard)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=rf"does not fit.*{re.escape(old or new or '')}"):
        load(checkpoint, partition_of(checkpoint, {}))
