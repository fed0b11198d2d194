"""Experts are placed as the best of all placements would, and the hottest are kept."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from main_model_fn.placement import Balance, ExpertTimes, hottest, place

seconds = st.floats(1e-6, 1.0)


@st.composite
def times(draw: st.DrawFn) -> ExpertTimes:
    points = [1, 4, 16]
    return ExpertTimes(
        rows=points,
        cpu_s=sorted(draw(st.lists(seconds, min_size=3, max_size=3))),
        gpu_s=sorted(draw(st.lists(seconds, min_size=3, max_size=3))),
        copy_s=draw(seconds),
        cpu_start_s=draw(st.sampled_from([0.0, 0.1])),
    )


layers = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6)


def end(order: tuple[int, ...], cpu: list[int], held: list[int], t: ExpertTimes) -> float:
    """When all is done: `held` rows on the GPU, then `order` through the link and the GPU."""
    gpu_end = sum(t.gpu(rows) for rows in held)
    for copies, rows in enumerate(order, 1):
        gpu_end = max(gpu_end, copies * t.copy_s) + t.gpu(rows)
    cpu_end = sum(t.cpu(rows) for rows in cpu) + (t.cpu_start_s if cpu else 0.0)
    return max(gpu_end, cpu_end)


def best_end(layer: list[tuple[int, bool]], t: ExpertTimes) -> float:
    """Over every choice and every order."""
    held = [rows for rows, resident in layer if resident]
    others = [rows for rows, resident in layer if not resident]
    return min(
        end(order, [r for r, s in zip(others, stream, strict=True) if not s], held, t)
        for stream in product((False, True), repeat=len(others))
        for order in set(permutations([r for r, s in zip(others, stream, strict=True) if s]))
    )


@given(layer=layers, measured=times())
@settings(max_examples=150, deadline=None)
def test_no_placement_is_faster_by_more_than_one_experts_time_on_the_gpu(
    layer: list[tuple[int, bool]], measured: ExpertTimes
) -> None:
    rows = {expert: count for expert, (count, _) in enumerate(layer)}
    resident = {expert for expert, (_, here) in enumerate(layer) if here}
    placed = place(rows, resident, measured)
    assert sorted(placed.cpu + placed.resident + placed.streamed) == sorted(rows)
    assert set(placed.resident) == resident
    took = end(
        tuple(rows[e] for e in placed.streamed),
        [rows[e] for e in placed.cpu],
        [rows[e] for e in placed.resident],
        measured,
    )
    assert took == pytest.approx(placed.seconds)
    best = best_end(layer, measured)
    assert best <= took * (1 + 1e-9)
    assert took <= best + max(measured.gpu(count) for count in rows.values()) + 1e-9


@given(count=st.integers(1, 6), held=st.integers(0, 3), rows=st.integers(1, 20), measured=times())
@settings(max_examples=100, deadline=None)
def test_experts_with_equally_many_rows_are_placed_best(
    count: int, held: int, rows: int, measured: ExpertTimes
) -> None:
    layer = [(rows, index < held) for index in range(count + held)]
    placed = place(dict.fromkeys(range(count + held), rows), range(held), measured)
    assert placed.seconds == pytest.approx(best_end(layer, measured))


def test_the_measured_h100_host_splits_a_decoded_token_and_streams_long_prompts() -> None:
    """The issue's figures of one OLMoE expert: torch on the CPU, and copies at 54 GB/s."""
    measured = ExpertTimes([1, 16, 512], [310e-6, 350e-6, 2e-3], [40e-6, 40e-6, 60e-6], 240e-6)
    token = place(dict.fromkeys(range(8), 1), (), measured)
    assert (len(token.cpu), len(token.streamed)) == (4, 4)
    prompt = place({0: 512, 1: 400, 2: 8, 3: 1}, (), measured)
    assert prompt.streamed == [0, 1]
    assert place({5: 1}, {5}, measured).resident == [5]
    assert place({}, {5}, measured).seconds == 0


def test_times_are_interpolated_never_fall_and_grow_beyond_what_was_measured() -> None:
    measured = ExpertTimes([1, 3, 5], [1.0, 3.0, 2.0], [1.0, 1.0, 1.0], 1.0)
    assert [measured.cpu(rows) for rows in (1, 2, 3, 5, 10)] == [1.0, 2.0, 3.0, 3.0, 6.0]


def test_the_hottest_experts_are_those_with_the_largest_shares_of_any_layer() -> None:
    profile = {1: [0.5, 0.3, 0.2, 0.0], 4: [0.25, 0.25, 0.25, 0.25]}
    local = {1: (0, 2), 4: (0, 1, 3)}
    assert hottest(profile, local, 0) == {1: frozenset(), 4: frozenset()}
    assert hottest(profile, local, 3) == {1: frozenset({0}), 4: frozenset({0, 1})}
    assert hottest(profile, local, 9) == {1: frozenset(local[1]), 4: frozenset(local[4])}


@given(
    rows=st.dictionaries(st.integers(0, 40), st.integers(1, 9), min_size=1),
    resident=st.sets(st.integers(0, 40)),
    share=st.floats(0, 1),
)
def test_a_step_is_shared_out_whole_and_the_most_rows_are_streamed(
    rows: dict[int, int], resident: set[int], share: float
) -> None:
    placed = Balance(share).place(rows, resident)
    assert sorted([*placed.cpu, *placed.resident, *placed.streamed]) == sorted(rows)
    assert set(placed.resident) == resident & set(rows)
    if placed.cpu and placed.streamed:
        assert min(rows[p] for p in placed.streamed) >= max(rows[p] for p in placed.cpu)


@given(cpu_s=st.floats(1e-5, 1e-3), copy_s=st.floats(1e-5, 1e-3), start=st.floats(0, 1))
def test_a_balance_finds_where_both_are_done_together(
    cpu_s: float, copy_s: float, start: float
) -> None:
    balance, slices = Balance(start), dict.fromkeys(range(16), 1)
    for _ in range(400):
        placed = balance.place(slices, ())
        gpu_first = len(placed.streamed) * copy_s < len(placed.cpu) * cpu_s
        balance.note(placed, gpu_first=gpu_first)
    assert abs(balance.share - cpu_s / (cpu_s + copy_s)) <= 1.1 / 16
