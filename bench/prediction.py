"""How well routing is predicted, and how fast: every row of docs/planner.md's tables, in one run.

    remoe profile activations --prompts PROMPT_SETS --per-set 24 --held-out --out heldout.npz
    python bench/prediction.py --prompts PROMPT_SETS --held-out heldout.npz

Divergences are Jensen-Shannon in nats, the mean over layers, then over held-out prompts. Six prompt
sets that the model was not trained on are taken out of the history first. Times are minima or
medians of repeats in this process, on one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from main_model_fn.prompt_sets import read_prompts
from models.smollm2_8x135m.corpus import LEFT_OUT_SETS
from planner.baselines import FatePredictor, FixedTreeSearch, routers_of, var_ed, var_pam
from planner.clustering import pam
from planner.config import PlannerSettings
from planner.divergence import js_divergence
from planner.embedding import TokenTableEmbedder
from planner.history import History
from planner.history_file import read_history
from planner.history_store import Entry, HistoryIdentity, HistoryStore
from planner.minilm import MiniLm, MiniLmEmbedder
from planner.model import ModelFacts
from planner.phases import PhaseProfiles
from planner.planning import Planner
from planner.prediction import (
    ActivationPredictor,
    MeanPredictor,
    Prediction,
    Prompt,
    SimilarPromptsPredictor,
    UniformPredictor,
    phase_profiles,
)
from planner.predictors import history_identity
from planner.prompt_index import PromptIndex
from planner.prompt_tree import ALPHA, PromptTree
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit
from planner.search import ExactSearch
from planner.selection import remote_mask, select_remote
from remoe.checkpoint import Checkpoint
from remoe.cli.model import built_model
from remoe.errors import SettingsError
from remoe.experts import ActivationProfile
from remoe.plan import PlanRequest, Slo
from remoe.topology import ExpertEndpoint, Topology
from tests.remoe.hardware_profiles import some_profile

DECODE_TOKENS = 48  # what `remoe profile` lets every prompt decode
VAR_PAM_LIMIT_S = 600
TREE_SIZES = (1_000, 2_000, 5_000, 10_000, 20_000)
SEARCH_SIZE = 100_000
TEMPERATURES = (1, 0.3, 0.1, 0.03, 0.02, 0.01, 0.005)


def read_corpus(folder: Path, model_dir: Path) -> list[list[int]]:
    """The tokens of all prompts of the sets."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = [
        *read_prompts(folder, 10**9, held_out=False),
        *read_prompts(folder, 10**9, held_out=True),
    ]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids for ids in encoded if len(ids) <= 1024]


def tokens_of(corpus: PromptIndex, entry: Entry) -> list[int]:
    tokens = corpus.find(entry)
    if tokens is None:
        raise SystemExit("the prompts are not those that the activations were made of")
    return tokens


class RegressionAlone:
    """The default predictor without its correction by neighbours."""

    def __init__(self, fit: RoutingFit, shape: tuple[int, ...]) -> None:
        self._fit = fit
        self._shape = shape

    def predict(self, prompt: Prompt) -> Prediction:
        projected = self._fit.project(prompt.vector[None])
        flat = self._fit.regress(projected, np.array([len(prompt.token_ids)]))[0]
        return Prediction(phase_profiles(np.maximum(flat, 1e-4).reshape(self._shape)))


class PrefillForBoth:
    """As printed in the paper: the predicted prefill serves decoding too (A.7.4)."""

    def __init__(self, inner: ActivationPredictor) -> None:
        self._inner = inner

    def predict(self, prompt: Prompt) -> Prediction:
        prefill = self._inner.predict(prompt).profiles.prefill
        return Prediction(PhaseProfiles(prefill, prefill))


def history_of(
    entries: Iterable[Entry], identity: HistoryIdentity, path: Path | None = None
) -> History:
    """A history of entries as they are, without comparing each with all."""
    store = HistoryStore.open(path, identity)
    with store.batch(imported="bench"):
        store.commit(entries)
    count = sum(1 for _ in store.entries())
    return History(store, capacity=count)


def fitted(history: History, fallback: ActivationPredictor) -> RegressionPredictor:
    predictor = RegressionPredictor(history, fallback)
    predictor.install(RoutingFit.of(*predictor.sample()))
    return predictor


def fitted_temperature(history: History) -> float:
    """The softmax temperature that best predicts each entry from the others."""
    profiles = history.profiles(range(len(history)))  # [n, 2, layers, experts]
    similarity = history.vectors @ history.vectors.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1)[:, :ALPHA]
    scores = np.take_along_axis(similarity, nearest, axis=1)
    results = {}
    for temperature in TEMPERATURES:
        weights = np.exp((scores - scores[:, :1]) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        total = 0.0
        for row in range(0, len(history), 5):
            guess = np.tensordot(weights[row], profiles[nearest[row]], axes=1)
            total += float(js_divergence(guess, profiles[row]).mean())
        results[temperature] = total
    return min(results, key=lambda temperature: results[temperature])


def remote_share(profiles: PhaseProfiles, truth: PhaseProfiles, n_tokens: int) -> float:
    """Share of the routes that hit the half of the experts that is remote by these profiles."""
    partition = select_remote(profiles.mixed(n_tokens, DECODE_TOKENS), 0.5)
    routes = truth.expected_routes(n_tokens, DECODE_TOKENS, top_k=1)
    return float((routes * remote_mask(partition)).sum() / routes.sum())


def accuracy_row(
    name: str,
    predict: Callable[[int], PhaseProfiles],
    truths: list[PhaseProfiles],
    held_out: list[Entry],
    absent: NDArray[np.bool_],
) -> dict[str, float]:
    prefill, decode, remote = (np.empty(len(held_out)) for _ in range(3))
    for row, (entry, truth) in enumerate(zip(held_out, truths, strict=True)):
        guess = predict(row)
        prefill[row] = js_divergence(guess.prefill.shares, truth.prefill.shares).mean()
        decode[row] = js_divergence(guess.decode.shares, truth.decode.shares).mean()
        remote[row] = remote_share(guess, truth, entry.n_tokens)
    both = (prefill + decode) / 2
    print(
        f"| {name} | {prefill.mean():.4f} | {decode.mean():.4f} | {both.mean():.4f} | "
        f"{both[~absent].mean():.4f} | {both[absent].mean():.4f} | {remote.mean():.1%} |",
        flush=True,
    )
    return {"prefill": prefill.mean(), "both": both.mean()}


def accuracy(
    train: list[Entry],
    held_out: list[Entry],
    corpus: PromptIndex,
    checkpoint: Checkpoint,
    *,
    facts: ModelFacts,
    identity: HistoryIdentity,
    minilm: MiniLmEmbedder | None,
) -> None:
    history = history_of(train, identity)
    absent = np.array([entry.topic.split("/")[0] in LEFT_OUT_SETS for entry in held_out])
    sets = {entry.topic.split("/")[0] for entry in held_out}
    print(
        f"\n{len(history)} history entries; {len(held_out)} held-out prompts of {len(sets)} sets, "
        f"{absent.sum()} of them of {len(sets & set(LEFT_OUT_SETS))} sets not in the history"
    )
    print("\n| predictor | prefill | decode | mean | sets known | sets absent | remote |")
    print("|---|---|---|---|---|---|---|")
    prompts = [Prompt(tokens_of(corpus, entry), entry.vector) for entry in held_out]
    truths = [
        PhaseProfiles(ActivationProfile(entry.prefill), ActivationProfile(entry.decode))
        for entry in held_out
    ]

    def similar(
        search: ExactSearch | FixedTreeSearch, temperature: float = 1
    ) -> ActivationPredictor:
        return SimilarPromptsPredictor(history, search, neighbours=ALPHA, temperature=temperature)

    exact = similar(ExactSearch(history))
    grown = PromptTree(history.vectors)
    tree = similar(FixedTreeSearch(history.vectors, grown))
    printed = similar(FixedTreeSearch(history.vectors, grown, leaves=1))
    warm = fitted_temperature(history)
    regression = fitted(history, exact)
    shape = (2, facts.layers, facts.experts)
    rivals: dict[str, ActivationPredictor] = {
        "EF: uniform": UniformPredictor(
            layers=facts.layers, experts=facts.experts, moe_layers=facts.moe_layers
        ),
        "DOP: the history's mean": MeanPredictor(history),
        "Fate: routers asked about embeddings": FatePredictor(
            checkpoint, routers_of(checkpoint), layers=facts.layers, top_k=facts.top_k
        ),
        "VarED": similar(var_ed(history)),
        "VarPAM": similar(var_pam(history)),
        "SPS: the tree": tree,
        "SPS as printed: one leaf": printed,
        "SPS as printed: one leaf, prefill serves decoding": PrefillForBoth(printed),
        "BF: exact search": exact,
        f"BF, temperature fitted ({warm:g})": similar(ExactSearch(history), warm),
        "regression alone": RegressionAlone(RoutingFit.of(*regression.sample()), shape),
        "**regression and neighbours (default)**": regression,
    }
    rows = {}
    for name, rival in rivals.items():
        rows[name] = accuracy_row(
            name, lambda row, r=rival: r.predict(prompts[row]).profiles, truths, held_out, absent
        )
    if minilm is not None:
        joined = HistoryIdentity(
            identity.model_digest,
            minilm.name,
            minilm.dimension,
            identity.layers,
            identity.experts,
        )
        wider = history_of(
            (replace(e, vector=minilm.embed(tokens_of(corpus, e))) for e in train), joined
        )
        better = fitted(wider, exact)
        wide = [Prompt(p.token_ids, minilm.embed(p.token_ids)) for p in prompts]
        accuracy_row(
            "the same with MiniLM",
            lambda row: better.predict(wide[row]).profiles,
            truths,
            held_out,
            absent,
        )
    accuracy_row("oracle: the prompt's own", lambda row: truths[row], truths, held_out, absent)
    bf, sps = rows["BF: exact search"], rows["SPS: the tree"]
    ours = rows["**regression and neighbours (default)**"]
    print(
        f"\nagainst BF, mean of both phases: SPS {sps['both'] / bf['both'] - 1:+.1%}, default "
        f"{ours['both'] / bf['both'] - 1:+.1%}; prefill alone, as the paper compares: SPS "
        f"{sps['prefill'] / bf['prefill'] - 1:+.1%}, default {ours['prefill'] / bf['prefill'] - 1:+.1%}"
    )


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def build_times(vectors: NDArray[np.float32]) -> None:
    print("\n| prompts | tree, s | VarPAM, s | ratio |\n|---|---|---|---|")
    too_long = False
    for size in TREE_SIZES:
        points = vectors[:size]
        tree_s = seconds(lambda p=points: PromptTree(p), 3)
        if too_long:
            print(f"| {size:,} | {tree_s:.3f} | not tried | |", flush=True)
            continue
        pam_s = seconds(lambda p=points: PromptTree(p, clustering=pam), 1)
        print(f"| {size:,} | {tree_s:.3f} | {pam_s:.1f} | {pam_s / tree_s:.0f} x |", flush=True)
        too_long = pam_s > VAR_PAM_LIMIT_S / 4  # twice the size takes four times as long or more


def search_times(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], fit: RoutingFit
) -> None:
    """Median time of one query among many prompts, and how many of the true nearest are found."""
    truth = faiss.knn(queries, vectors, ALPHA, metric=faiss.METRIC_INNER_PRODUCT)[1]
    learned, asked = fit.project(vectors), fit.project(queries)
    own = faiss.knn(asked, learned, ALPHA, metric=faiss.METRIC_INNER_PRODUCT)[1]
    tree = FixedTreeSearch(vectors, PromptTree(vectors))
    printed = replace(tree, leaves=1)
    lists = 1024
    coarse = faiss.IndexFlatIP(vectors.shape[1])
    inverted = faiss.IndexIVFFlat(coarse, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    inverted.train(vectors[::3])
    inverted.add(vectors)
    inverted.nprobe = 16

    def by_numpy(among: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.intp]:
        similarity = among @ query
        best = np.argpartition(-similarity, ALPHA)[:ALPHA]
        return best[np.argsort(-similarity[best])]

    def flat(among: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.intp]:
        return faiss.knn(query[None], among, ALPHA, metric=faiss.METRIC_INNER_PRODUCT)[1][0]

    searches: dict[str, tuple[Callable[[int], NDArray[np.intp]], NDArray[np.intp]]] = {
        "numpy, exact": (lambda row: by_numpy(vectors, queries[row]), truth),
        "FAISS flat, exact": (lambda row: flat(vectors, queries[row]), truth),
        "the tree": (lambda row: tree.nearest(queries[row], ALPHA)[0], truth),
        "the tree as printed: one leaf": (
            lambda row: printed.nearest(queries[row], ALPHA)[0],
            truth,
        ),
        "FAISS IVF, 16 of 1,024 lists": (
            lambda row: inverted.search(queries[row][None], ALPHA)[1][0],
            truth,
        ),
        "**learned similarity, FAISS flat (default)**": (
            lambda row: flat(learned, asked[row]),
            own,
        ),
    }
    print(f"\n{len(vectors):,} prompts, {len(queries)} queries")
    print("\n| search | ms | against numpy | recall of 15 |\n|---|---|---|---|")
    first_ms = 0.0
    for name, (search, expected) in searches.items():
        times, hits = [], 0
        for row in range(len(queries)):
            start = time.perf_counter()
            found = search(row)
            times.append(time.perf_counter() - start)
            hits += len(set(found.tolist()) & set(expected[row].tolist()))
        median_ms = float(np.median(times)) * 1e3
        first_ms = first_ms or median_ms
        print(
            f"| {name} | {median_ms:.2f} | {first_ms / median_ms:.0f} x | "
            f"{hits / expected.size:.0%} |",
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
        times = [seconds(lambda t=tokens: minilm.embed(t), 1) for tokens in queries[:50]]
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
    parser.add_argument("--only", choices=["accuracy", "build", "search", "latency"])
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    model_dir = options.model_dir or built_model()
    checkpoint = Checkpoint.open(model_dir)
    facts = ModelFacts.of(checkpoint, model_dir.name)
    table = TokenTableEmbedder(checkpoint)
    identity = history_identity(facts, table)
    corpus = PromptIndex(read_corpus(options.prompts, model_dir), table)
    everything = list(read_history(model_dir / "history.npz", identity))
    held_out = list(read_history(options.held_out, identity))
    train = [entry for entry in everything if entry.topic.split("/")[0] not in LEFT_OUT_SETS]
    try:
        minilm = MiniLmEmbedder(table, MiniLm.installed(), model_dir)
    except SettingsError as error:
        print(error.message)
        minilm = None
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used")

    def wanted(part: str) -> bool:
        return options.only in {None, part}

    if wanted("accuracy"):
        accuracy(train, held_out, corpus, checkpoint, facts=facts, identity=identity, minilm=minilm)
    shuffled = np.random.default_rng(0).permutation(len(corpus.vectors))
    vectors = np.ascontiguousarray(corpus.vectors[shuffled])
    if wanted("build"):
        build_times(vectors)
    if wanted("search"):
        history = history_of(train, identity)
        fit = RoutingFit.of(*RegressionPredictor(history, MeanPredictor(history)).sample())
        search_times(vectors[:SEARCH_SIZE], vectors[SEARCH_SIZE : SEARCH_SIZE + 200], fit)
    if wanted("latency"):
        planner_times(train, corpus, table, identity, minilm, facts=facts, large=options.large)


if __name__ == "__main__":
    main()
