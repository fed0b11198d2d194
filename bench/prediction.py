"""What a prediction costs the planner, step by step, and what MiniLM would add to it.

    remoe profile activations --prompts PROMPT_SETS --per-set 24 --held-out --out heldout.npz
    python bench/prediction.py --prompts PROMPT_SETS --held-out heldout.npz

The predictors among themselves, building and searching are `remoe evaluate prediction`. Times are
medians of repeats in this process, on one thread; divergences are Jensen-Shannon in nats.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np

from evaluation.prompts import encode_prompts, set_of
from evaluation.rivals import accuracy_of, fitted, history_of, truths_of
from models.smollm2_8x135m.corpus import LEFT_OUT_SETS
from planner.config import PlannerSettings
from planner.embedding import TokenTableEmbedder
from planner.history import History
from planner.history_file import read_history
from planner.history_store import Entry, HistoryIdentity
from planner.minilm import MiniLm, MiniLmEmbedder
from planner.model import ModelFacts
from planner.planning import Planner
from planner.prediction import ActivationPredictor, MeanPredictor, Prompt
from planner.predictors import history_identity
from planner.prompt_index import PromptIndex
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit
from remoe.checkpoint import Checkpoint
from remoe.cli.model import built_model
from remoe.errors import SettingsError
from remoe.plan import PlanRequest, Slo
from remoe.topology import ExpertEndpoint, Topology
from tests.remoe.hardware_profiles import some_profile

SEARCH_SIZE = 100_000


def tokens_of(corpus: PromptIndex, entry: Entry) -> list[int]:
    tokens = corpus.find(entry)
    if tokens is None:
        raise SystemExit("the prompts are not those that the activations were made of")
    return tokens


def accuracy_with_minilm(
    train: list[Entry],
    held_out: list[Entry],
    corpus: PromptIndex,
    identity: HistoryIdentity,
    minilm: MiniLmEmbedder,
) -> None:
    absent = np.array([set_of(entry) in LEFT_OUT_SETS for entry in held_out])
    truths = truths_of(held_out)
    print("\n| embedder | prefill | decode | mean | sets known | sets absent | remote |")
    print("|---|---|---|---|---|---|---|")
    joined = replace(identity, embedder=minilm.name, dimension=minilm.dimension)
    for name, at, embed in (
        ("the token table (default)", identity, None),
        ("with MiniLM", joined, minilm.embed),
    ):

        def vector(entry: Entry, of=embed):  # noqa: ANN001, ANN202
            return entry.vector if of is None else of(tokens_of(corpus, entry))

        history = history_of((replace(e, vector=vector(e)) for e in train), at)
        prompts = [Prompt(tokens_of(corpus, e), vector(e)) for e in held_out]
        row = accuracy_of(fitted(history, MeanPredictor(history)), prompts, truths, absent)
        print(
            f"| {name} | {row.prefill:.4f} | {row.decode:.4f} | {row.both:.4f} | {row.known:.4f} | "
            f"{row.absent:.4f} | {row.remote:.1%} |",
            flush=True,
        )


def planner_times(
    train: list[Entry],
    corpus: PromptIndex,
    table: TokenTableEmbedder,
    identity: HistoryIdentity,
    minilm: MiniLmEmbedder | None,
    *,
    facts: ModelFacts,
    large: bool,
) -> None:
    """Median time of each step of a plan, and of a whole one, the history in a file."""
    print(
        "\n| entries | layers x experts | embed, ms | search and predict, ms | whole plan, ms | fit, s |"
    )
    print("|---|---|---|---|---|---|")
    chance = np.random.default_rng(0)
    queries = [corpus.prompts[row] for row in chance.choice(len(corpus.prompts), 200)]
    shapes = [(len(train), identity), (SEARCH_SIZE, identity)]
    if large:
        shapes.append((SEARCH_SIZE, replace(identity, layers=61, experts=256)))
    for count, at in shapes:
        with tempfile.TemporaryDirectory() as folder:
            history = history_of(
                many_entries(train, corpus, count, at), at, Path(folder) / "history.sqlite"
            )
            predictor = RegressionPredictor(history, MeanPredictor(history))
            start = time.perf_counter()
            predictor.install(RoutingFit.of(*predictor.sample()))
            fit_s = time.perf_counter() - start
            planner = planner_of(facts, at, table, history, predictor)
            embedding, predicting, planning = [], [], []
            for tokens in queries:
                start = time.perf_counter()
                vector = table.embed(tokens)
                between = time.perf_counter()
                predictor.predict(Prompt(tokens, vector))
                embedding.append(between - start)
                predicting.append(time.perf_counter() - between)
                request = PlanRequest(
                    model=facts.name,
                    prompt_tokens=tokens,
                    max_new_tokens=128,
                    slo=Slo(ttft_s=60.0, tpot_s=5.0),
                )
                start = time.perf_counter()
                planner.plan(request)
                planning.append(time.perf_counter() - start)
            history.store.close()
        print(
            f"| {len(history):,} | {at.layers} x {at.experts} | {np.median(embedding) * 1e3:.2f} | "
            f"{np.median(predicting) * 1e3:.2f} | {np.median(planning) * 1e3:.2f} | {fit_s:.2f} |",
            flush=True,
        )
    if minilm is not None:
        times = []
        for tokens in queries[:50]:
            start = time.perf_counter()
            minilm.embed(tokens)
            times.append(time.perf_counter() - start)
        print(f"\nembedding with MiniLM: median {np.median(times) * 1e3:.0f} ms")


def planner_of(
    facts: ModelFacts,
    identity: HistoryIdentity,
    table: TokenTableEmbedder,
    history: History,
    predictor: ActivationPredictor,
) -> Planner:
    """A planner of a model of this shape, with a function for each layer and a made-up machine."""
    shape = replace(
        facts,
        layers=identity.layers,
        moe_layers=tuple(range(identity.layers)),
        experts=identity.experts,
        top_k=8 if identity.experts > 64 else facts.top_k,
    )
    experts = [
        ExpertEndpoint(
            name=f"experts-{layer:02}", url="", first_layer=layer, last_layer=layer, memory_gb=2.0
        )
        for layer in range(identity.layers)
    ]
    return Planner(
        settings=PlannerSettings.model_validate({"REMOE_TOPOLOGY": "unused"}),
        topology=Topology(
            model=facts.name,
            model_dir="",
            gateway_url="",
            planner_url="",
            main_url="",
            main_memory_gb=1000.0,
            experts=experts,
        ),
        model=shape,
        embedder=table,
        history=history,
        predictor=predictor,
        hardware=some_profile(),
    )


def many_entries(
    train: list[Entry], corpus: PromptIndex, count: int, identity: HistoryIdentity
) -> Iterator[Entry]:
    """Entries to time with: real prompts' vectors, and profiles of other prompts, or made up where
    the model has another shape."""
    shape = (identity.layers, identity.experts)
    made_up = np.random.default_rng(1).random((100, *shape), np.float32)
    made_up /= made_up.sum(axis=2, keepdims=True)
    for row in range(min(count, len(corpus.prompts))):
        entry = train[row % len(train)]
        if entry.prefill.shape != shape:
            entry = replace(entry, prefill=made_up[row % 100], decode=made_up[row % 97])
        if count > len(train):
            entry = replace(entry, vector=corpus.vectors[row], n_tokens=len(corpus.prompts[row]))
        yield replace(entry, id=row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument(
        "--large", action="store_true", help="also DeepSeek-V3's shape: 15 GB of disk"
    )
    parser.add_argument("--only", choices=["minilm", "latency"])
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    model_dir = options.model_dir or built_model()
    checkpoint = Checkpoint.open(model_dir)
    table = TokenTableEmbedder(checkpoint)
    facts = ModelFacts.of(checkpoint, model_dir.name)
    identity = history_identity(facts, table)
    texts = [
        ids
        for held_out in (False, True)
        for ids in encode_prompts(options.prompts, model_dir, per_set=10**9, held_out=held_out)
    ]
    corpus = PromptIndex(texts, table)
    shipped = read_history(model_dir / "history.npz", identity)
    train = [entry for entry in shipped if set_of(entry) not in LEFT_OUT_SETS]
    held_out = list(read_history(options.held_out, identity))
    try:
        minilm = MiniLmEmbedder(table, MiniLm.installed(), model_dir)
    except SettingsError as error:
        print(error.message)
        minilm = None
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used")
    if minilm is not None and options.only in {None, "minilm"}:
        accuracy_with_minilm(train, held_out, corpus, identity, minilm)
    if options.only in {None, "latency"}:
        planner_times(train, corpus, table, identity, minilm, facts=facts, large=options.large)


if __name__ == "__main__":
    main()
