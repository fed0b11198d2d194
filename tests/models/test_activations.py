from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from models.smollm2_8x135m.build import BuildInputs, ensure_checkpoint
from planner.embedding import TOKEN_TABLE
from planner.history_file import read_history
from planner.history_store import HistoryIdentity
from planner.model import ModelFacts
from remoe.checkpoint import Checkpoint
from remoe.cli.profile import profile_app
from remoe.errors import CheckpointError
from remoe.moeless.gates import GATES_FOLDER, GateCopies
from tests.models.conftest import TINY
from tests.tiny_model import build_tiny_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = ["ab", "a longer prompt, with more", "12", "another of some length"]
STEPS = 6


class Tiny(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture
def tiny(tmp_path: Path, tiny_inputs: BuildInputs) -> Tiny:
    folder = ensure_checkpoint(tmp_path / "cache", lambda text, share: None, tiny_inputs)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Weights of this size hardly move the router and end no answer: make both vary.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.mul_(3)
    # Freer than the shipped recommendation: random weights, and answers of many lengths.
    model.generation_config.update(temperature=0.2, min_p=0.01)
    return Tiny(model.eval(), transformers.AutoTokenizer.from_pretrained(folder))


def end_with(model: PreTrainedModel, tokens: list[int]) -> None:
    model.generation_config.eos_token_id = tokens


def greedy(model: PreTrainedModel) -> None:
    model.generation_config.update(
        do_sample=False, temperature=None, top_p=None, min_p=None, repetition_penalty=1.0
    )


def test_profiles_do_not_depend_on_batching(tiny: Tiny) -> None:
    from main_model_fn.activations import encode_prompt, profile_prompts

    model, tokenizer = tiny
    # Enough tokens end an answer that answers are of several lengths.
    end_with(model, list(range(2, TINY.vocab, 9)))
    before = model.config._experts_implementation
    together = profile_prompts(model, tokenizer, PROMPTS, decode_tokens=STEPS)
    alone = profile_prompts(model, tokenizer, PROMPTS, decode_tokens=STEPS, batch_tokens=1)
    assert model.config._experts_implementation == before
    for prompt, one, other in zip(PROMPTS, together, alone, strict=True):
        assert one.tokens == len(encode_prompt(tokenizer, prompt))
        assert one.decoded == other.decoded
        for mine, its in (
            (one.profile, other.profile),
            (one.decode_profile, other.decode_profile),
        ):
            assert mine.shape == (TINY.layers, TINY.experts)
            np.testing.assert_allclose(mine.sum(-1), 1.0, rtol=1e-6)
            np.testing.assert_allclose(mine, its, atol=1e-6)
            # Two experts a token: no expert can have more than half the routes.
            assert mine.max() <= 0.5
        np.testing.assert_allclose(one.vector, other.vector)
    assert len({one.decoded for one in together}) > 1


def test_decoding_is_what_the_library_generates(tiny: Tiny) -> None:
    from main_model_fn.activations import encode_prompt, profile_prompts
    from main_model_fn.routing_recorder import RoutingRecorder

    model, tokenizer = tiny
    greedy(model)
    end_with(model, [1])
    activations = profile_prompts(model, tokenizer, PROMPTS, decode_tokens=STEPS)
    recorder = RoutingRecorder(model)
    for prompt, activation in zip(PROMPTS, activations, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, pad_token_id=0
        )
        mask = torch.zeros_like(written)
        mask[:, ids.shape[1] :] = 1
        mask[written == 1] = 0
        # One pass over prompt and answer, of which the answer's tokens count.
        with recorder.installed(), torch.no_grad():
            recorder.begin(mask)
            model.base_model(input_ids=written, use_cache=False)
        assert activation.decoded == int(mask.sum())
        np.testing.assert_allclose(activation.decode_profile, recorder.profiles()[0], atol=1e-6)


def test_a_prompt_without_an_answer_has_its_prefill_s_profile(tiny: Tiny) -> None:
    from main_model_fn.activations import profile_prompts

    end_with(tiny.model, list(range(TINY.vocab)))
    for activation in profile_prompts(*tiny, PROMPTS, decode_tokens=STEPS):
        assert activation.decoded == 0
        np.testing.assert_array_equal(activation.decode_profile, activation.profile)
    (unasked,) = profile_prompts(*tiny, PROMPTS[:1], decode_tokens=0)
    np.testing.assert_array_equal(unasked.decode_profile, unasked.profile)


def test_answers_follow_the_recommended_sampling(tiny: Tiny) -> None:
    from main_model_fn.batch_decoding import _choose

    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.8, repetition_penalty=2.0
    )
    logits = torch.tensor([[2.0, 1.9, 0.0, -1.0]]).expand(4000, -1)
    seen = torch.tensor([[True, False, False, True]]).expand(4000, -1)
    chance = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(_choose(logits, seen, chance, config)[:, 0], minlength=4) / 4000
    # Scores 1, 1.9, 0 and -2, doubled by the temperature: the second has 0.84 and stays alone.
    np.testing.assert_allclose(drawn.numpy(), [0, 1, 0, 0])
    config.top_p = 0.95
    drawn = torch.bincount(_choose(logits, seen, chance, config)[:, 0], minlength=4) / 4000
    weights = np.exp([2, 3.8])
    np.testing.assert_allclose(drawn.numpy(), [*(weights / weights.sum()), 0, 0], atol=0.02)


def test_prompt_vector_is_the_paper_s_similarity() -> None:
    from main_model_fn.activations import prompt_vector

    table = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    first, second = [1, 2, 3], [4, 2]
    rows = torch.nn.functional.normalize(table[first + second], dim=-1).numpy()
    gram = rows @ rows.T
    owns_first = np.array([1, 1, 1, 0, 0], np.float32)
    owns_second = 1 - owns_first
    similarity = (owns_first @ gram @ owns_second) / np.sqrt(
        (owns_first @ gram @ owns_first) * (owns_second @ gram @ owns_second)
    )
    vectors = prompt_vector(table, first), prompt_vector(table, second)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(float(similarity), abs=1e-5)


@pytest.fixture
def prompt_folder(tmp_path: Path) -> Path:
    """Two sets; in the first, of two topics, every row says its number."""
    folder = tmp_path / "prompts"
    rows = [{"prompt": f"row {n}", "topic": f"t{n % 2}"} for n in range(30)]
    for name, records in (("one", rows), ("two", rows[:1])):
        (folder / name).mkdir(parents=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / "prompts.jsonl").write_text(text, encoding="utf-8")
    (folder / "notes").mkdir()
    return folder


def test_prompts_are_taken_of_each_topic_in_turn_and_never_twice(prompt_folder: Path) -> None:
    from main_model_fn.prompt_sets import read_prompts

    few = read_prompts(prompt_folder, 4)
    assert [prompt.label for prompt in few] == ["one/t0", "one/t1"] * 2 + ["two/t0"]
    known = {prompt.text for prompt in read_prompts(prompt_folder, 100)}
    held_out = {prompt.text for prompt in read_prompts(prompt_folder, 100, held_out=True)}
    assert held_out == {"row 5", "row 15", "row 25"}
    assert known == {f"row {n}" for n in range(30)} - held_out


def test_a_folder_without_prompts_is_an_error(tmp_path: Path) -> None:
    from main_model_fn.prompt_sets import read_prompts

    with pytest.raises(CheckpointError, match="holds no prompts"):
        read_prompts(tmp_path, 4)


def test_the_command_writes_a_history_that_the_planner_reads(
    tmp_path: Path, tiny_inputs: BuildInputs, prompt_folder: Path
) -> None:
    built = ensure_checkpoint(tmp_path / "cache", lambda text, share: None, tiny_inputs)
    # In bfloat16 the library's kernels want wider experts than the built one's.
    folder = build_tiny_checkpoint(tmp_path / "wider", vocabulary=TINY.vocab)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(built / name, folder)
    out = tmp_path / "history.npz"
    arguments = ["activations", "--prompts", str(prompt_folder), "--model-dir", str(folder)]
    arguments += ["--out", str(out), "--per-set", "4", "--decode-tokens", "3"]
    result = CliRunner().invoke(profile_app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("5 prompts of 3 topics")
    model = ModelFacts.of(Checkpoint.open(folder), "tiny")
    identity = HistoryIdentity(
        model.digest, TOKEN_TABLE, model.hidden_size, model.layers, model.experts
    )
    entries = read_history(out, identity)
    assert entries.profiles.shape == (5, model.layers, model.experts)
    assert entries.decode_profiles is not None
    assert (entries.decode_profiles != entries.profiles).any()
    assert set(entries.n_tokens.tolist()) <= {len("row 0"), len("row 10")}
    assert [entries.topics[topic] for topic in entries.topic] == [
        *["one/t0", "one/t1"] * 2,
        "two/t0",
    ]


def test_the_command_writes_gate_copies_and_keeps_their_recording(
    tmp_path: Path, tiny_inputs: BuildInputs, prompt_folder: Path
) -> None:
    built = ensure_checkpoint(tmp_path / "cache", lambda text, share: None, tiny_inputs)
    folder = build_tiny_checkpoint(tmp_path / "wider", vocabulary=TINY.vocab)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(built / name, folder)
    kept = tmp_path / "recording"
    arguments = ["gates", "--model-dir", str(folder), "--distances", "1"]
    first = [*arguments, "--prompts", str(prompt_folder), "--per-set", "12", "--decode-tokens", "2"]
    result = CliRunner().invoke(profile_app, [*first, "--keep-recording", str(kept)])
    assert result.exit_code == 0, result.output
    digest = Checkpoint.open(folder).digest  # the gates lie beside the weights, not among them
    copies = GateCopies.read(folder / GATES_FOLDER, model_digest=digest)
    assert [(row.layer, row.distance) for row in copies.facts.quality] == [(1, 1), (2, 1)]
    again = tmp_path / "again"
    result = CliRunner().invoke(
        profile_app, [*arguments, "--recording", str(kept), "--out", str(again)]
    )
    assert result.exit_code == 0, result.output
    assert GateCopies.read(again, model_digest=digest).facts == copies.facts
    result = CliRunner().invoke(profile_app, arguments)
    assert result.exit_code == 2
    assert "either --prompts or --recording" in result.output
