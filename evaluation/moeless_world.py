"""What MoEless is replayed with: the model's own routes, trained gate copies, a trace, a machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.moeless_machine import ROWS, expert_seconds, route_seconds
from evaluation.workbench import Workbench
from loadgen.corpus import read_corpus
from loadgen.default_trace import DEFAULT_TRACE
from loadgen.readers import read_trace
from loadgen.trace import Selection
from planner.moeless.hardware import ExpertMachine, fit_line
from planner.moeless.simulation import Setting
from planner.moeless.token_routes import predicted_routes, recorded_routes
from planner.moeless.traffic import make_batches
from planner.moeless.world import World
from remoe.checkpoint import Checkpoint
from remoe.moeless.gates import GateCopies
from remoe.moeless.recording import Recording

if TYPE_CHECKING:
    from main_model_fn.prompt_sets import LabelledPrompt

__all__ = ["GPUS", "learned", "simulated_world"]

GPUS = 8
_ROOM = 4  # replicas of a layer on a GPU
_ATTACH_BYTES_PER_S = 5e9
_PER_SET, _QUICK_PER_SET = 12, 1
_MOST_CHARACTERS = 400  # of a shipped passage
_TRACE = "AzureLLMInferenceTrace_conv.csv"


def learned(bench: Workbench, distances: Sequence[int]) -> tuple[GateCopies, Recording]:
    """What the model's gates were given and chose, and copies trained on it: made once."""
    from main_model_fn.gate_recording import record_model
    from main_model_fn.gate_training import make_gate_copies

    options = bench.options
    digest = Checkpoint.open(options.model_dir).digest
    size = "quick" if options.quick else "whole"
    folder = bench.folder / f"gates-{size}-{digest.removeprefix('sha256:')[:12]}"
    kept = folder / "recording"
    if not (folder / "done").exists():
        bench.say("recording what the model's gates are given and choose")
        recording = record_model(
            options.model_dir,
            _prompts(bench),
            kept,
            max_tokens=256,
            decode_tokens=4 if options.quick else 24,
        )
        bench.say("training copies of the gates")
        make_gate_copies(recording, folder, distances=distances)
        (folder / "done").touch()
    return GateCopies.read(folder, model_digest=digest), Recording.read(kept)


def _prompts(bench: Workbench) -> list[LabelledPrompt]:
    from main_model_fn.prompt_sets import LabelledPrompt, read_prompts

    per_set = _QUICK_PER_SET if bench.options.quick else _PER_SET
    if bench.options.prompts is not None:
        return read_prompts(bench.options.prompts, per_set)
    topics = read_corpus().topics
    return [
        LabelledPrompt(text=text[:_MOST_CHARACTERS], label=f"shipped/{topic}")
        for topic, texts in topics.items()
        for text in itertools.islice(texts, per_set)
    ]


def simulated_world(bench: Workbench, copies: GateCopies, recording: Recording) -> World:
    """The held-out prompts' routes, batched as the trace has them come, on so many GPUs."""
    options = bench.options
    path, window = DEFAULT_TRACE, Selection(end_s=30.0)
    if options.traces is not None:
        path, window = options.traces / _TRACE, Selection(start_s=600.0, end_s=630.0)
    arrivals = [
        (request.arrival_s, request.prompt_tokens or 1, request.output_tokens or 1)
        for request in window.apply(read_trace(path))
    ]
    start_s, row_s, route_s, expert_bytes = bench.item(
        "machine", {"model": copies.facts.model_digest}, lambda: _machine(options.model_dir), tuple
    )
    machine = ExpertMachine(
        row_s=row_s,
        start_s=start_s,
        route_s=route_s,
        expert_bytes=expert_bytes,
        attach_bytes_per_s=_ATTACH_BYTES_PER_S,
    )
    held_out = recording.held_out()
    everything = recorded_routes(recording, predicted_routes(recording, copies))
    tokens = everything.only(held_out)
    return World(
        tokens,
        everything.only(~held_out).mean_loads(),
        make_batches(arrivals, range(len(tokens.topics))),
        Setting(machine=machine, gpus=GPUS, room=_ROOM),
        256 if options.quick else 64,
    )


def _machine(model_dir: Path) -> tuple[float, float, float, float]:
    """Seconds that an expert takes to start and for a row, and that a row travels; its bytes."""
    checkpoint = Checkpoint.open(model_dir)
    start_s, row_s = fit_line(np.array(ROWS, np.float64), expert_seconds(checkpoint))
    route_s = route_seconds(2 * checkpoint.hidden_size)
    return start_s, row_s, route_s, float(checkpoint.expert_size_bytes)
