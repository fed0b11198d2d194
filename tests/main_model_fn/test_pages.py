"""Pages have the tokens that their names say, and none is lost or given to two."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from main_model_fn.pages import Pages, page_names

SIZE, COUNT = 2, 6
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=SIZE * COUNT)


@given(st.lists(st.tuples(TEXTS, st.integers(0, 3)), max_size=40))
def test_requests_come_and_go(jobs: list[tuple[list[int], int]]) -> None:
    """Each comes with a text, computes all of it, and leaves after some others have come."""
    pages = Pages(COUNT, SIZE)
    written: dict[int, list[int]] = {}
    leaves: list[tuple[int, list[int]]] = []
    for now, (text, stays) in enumerate(jobs):
        for job in [job for job in leaves if job[0] <= now]:
            pages.let_go(job[1])
            leaves.remove(job)
        names = page_names(text, SIZE)
        found = pages.find(names)
        for place, page in enumerate(found):
            assert written[page] == text[: (place + 1) * SIZE]
        used = {page for _, held in leaves for page in held}
        needed = -(-len(text) // SIZE)
        held = pages.hold(found, needed - len(found))
        if held is None:
            assert len(used | set(found)) + needed - len(found) > COUNT
            continue
        assert held[: len(found)] == found
        new = held[len(found) :]
        assert not set(new) & (used | set(found))
        assert len(set(new)) == len(new)
        for place, page in enumerate(held):
            written[page] = text[: (place + 1) * SIZE]
        for page, name in zip(held, names, strict=False):
            pages.name(page, name)
        leaves.append((now + 1 + stays, held))
        assert pages.used == len(used | set(held))
    for _, held in leaves:
        pages.let_go(held)
    assert pages.used == 0
    everything = pages.hold([], COUNT)
    assert everything is not None
    assert sorted(everything) == list(range(COUNT))


@given(TEXTS, TEXTS)
def test_a_name_tells_all_tokens_up_to_its_end(first: list[int], second: list[int]) -> None:
    pairs = zip(page_names(first, SIZE), page_names(second, SIZE), strict=False)
    for place, (one, other) in enumerate(pairs):
        end = (place + 1) * SIZE
        assert (one == other) == (first[:end] == second[:end])


@given(TEXTS, st.integers(0, COUNT))
def test_names_can_be_told_piece_by_piece(text: list[int], known: int) -> None:
    names = page_names(text, SIZE)
    known = min(known, len(names))
    before = names[known - 1] if known else b""
    assert names[:known] + page_names(text[known * SIZE :], SIZE, before) == names


def test_the_page_unused_for_longest_makes_way_and_later_ones_before_earlier() -> None:
    pages = Pages(4, SIZE)
    texts = [[0, 0, 0, 0], [1, 1]]
    for text in texts:
        held = pages.hold([], len(text) // SIZE)
        assert held is not None
        for page, name in zip(held, page_names(text, SIZE), strict=True):
            pages.name(page, name)
        pages.let_go(held)
    assert (pages.used, pages.kept) == (0, 3)
    assert pages.hold([], 2) is not None  # the free one, and the end of the first text
    assert [len(pages.find(page_names(text, SIZE))) for text in texts] == [1, 1]
