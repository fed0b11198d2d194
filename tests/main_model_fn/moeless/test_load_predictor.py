"""Loads foretold from hidden states, and the book they are kept in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from main_model_fn.moeless.load_book import LoadBook
from main_model_fn.moeless.load_predictor import LoadPredictor, Observer

LAYERS = (0, 1, 3)  # layer 2 is dense
EXPERTS, HIDDEN, TOP_K = 4, 8, 2


class Watched:
    """The layers of a model: what they compute is nobody's but the observer's."""

    observer: Observer | None = None

    def watch(self, observer: Observer | None) -> None:
        self.observer = observer

    def step(self, layers: tuple[int, ...] = LAYERS) -> bool:
        """Compute some layers; whether anybody looked at the first."""
        looked = self.observer is not None
        for layer in layers:
            if self.observer is not None:
                index = torch.zeros(2, TOP_K, dtype=torch.int64)
                self.observer(layer, torch.randn(2, HIDDEN), index)
        return looked


def _predictor(
    book: LoadBook, model: Watched | None = None, *, period_s: float = 1.0
) -> LoadPredictor:
    generator = torch.Generator().manual_seed(1)
    gates = {layer: torch.randn(EXPERTS, HIDDEN, generator=generator) for layer in LAYERS[1:]}
    return LoadPredictor(
        gates,
        moe_layers=LAYERS,
        top_k=TOP_K,
        distance=1,
        book=book,
        watch=(model or Watched()).watch,
        period_s=period_s,
    )


def _routes(predictor: LoadPredictor, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    return (hidden @ predictor._gates[layer].T).topk(TOP_K).indices


def test_loads_of_the_layer_ahead_are_known_before_it_runs() -> None:
    book = LoadBook(4, EXPERTS)
    predictor = _predictor(book)
    hidden = torch.randn(5, HIDDEN)
    predictor.look_at(0, hidden, torch.zeros(5, TOP_K, dtype=torch.int64))
    expected = np.bincount(_routes(predictor, 1, hidden).ravel().numpy(), minlength=EXPERTS)
    assert book.view().loads[1].tolist() == expected.tolist()


def test_overlap_is_the_share_of_routes_that_came_as_foretold() -> None:
    book = LoadBook(4, EXPERTS)
    predictor = _predictor(book)
    hidden = torch.randn(6, HIDDEN)
    right = _routes(predictor, 1, hidden)
    half = right.clone()
    half[:, 1] = torch.tensor(
        [next(e for e in range(EXPERTS) if e not in row) for row in right.tolist()]
    )
    predictor.look_at(0, hidden, right)
    predictor.look_at(1, hidden, half)
    overlap = book.view().overlap
    assert overlap[1] == pytest.approx(0.5)
    assert np.isnan(overlap[[0, 2, 3]]).all()


def test_the_first_layer_stands_with_the_last_steps_loads() -> None:
    book = LoadBook(4, EXPERTS)
    predictor = _predictor(book)
    predictor.look_at(0, torch.randn(3, HIDDEN), torch.tensor([[0, 1]] * 3))
    assert book.view().loads[0].tolist() == [3, 3, 0, 0]


def test_one_step_is_looked_at_and_the_others_are_left_alone() -> None:
    book, model = LoadBook(4, EXPERTS), Watched()
    predictor = _predictor(book, model, period_s=3600)
    predictor.start()
    assert [model.step() for _ in range(3)] == [True, False, False]
    predictor.stop()
    assert book.view().steps == 1
    assert model.observer is None


def test_after_a_while_another_step_is_looked_at() -> None:
    book, model = LoadBook(4, EXPERTS), Watched()
    predictor = _predictor(book, model, period_s=0.01)
    predictor.start()
    looked = 0
    while looked < 3:
        looked += model.step()
    predictor.stop()
    assert book.view().steps == 3


def test_of_a_step_under_way_nothing_is_taken() -> None:
    book, model = LoadBook(4, EXPERTS), Watched()
    predictor = _predictor(book, model, period_s=3600)
    predictor.start()
    assert model.step(LAYERS[1:])  # it began before anybody looked
    assert model.step()
    predictor.stop()
    assert book.view().steps == 1


def test_experts_not_used_for_long_count_as_not_used() -> None:
    book = LoadBook(1, 2)
    book.record(0, np.array([4.0, 0.0]))
    for _ in range(60):
        book.record(0, np.array([0.0, 4.0]))
    loads = book.view().loads[0]
    assert loads[0] == 0
    assert loads[1] == pytest.approx(4)
