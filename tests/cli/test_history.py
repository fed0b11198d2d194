"""`remoe history` on a real history file of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner import history_store
from planner.history_file import read_history
from planner.history_store import history_path
from planner.planning import Planner
from remoe.cli.history import history_app
from tests.planner.worlds import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path)


def planner_of(world: World, folder: str = "kept") -> Planner:
    planner = world.planner(history=world.history_file(20), history_dir=world.folder / folder)
    planner.observe(world.observation([1, 2, 3]))
    planner.observe(world.observation([1, 2, 3]))
    return planner


def remoe_history(world: World, command: str, *arguments: str, folder: str = "kept") -> str:
    where = ["--model-dir", str(world.folder / "model"), "--dir", str(world.folder / folder)]
    result = CliRunner().invoke(history_app, [command, *arguments, *where])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_running_planner_s_history_can_be_looked_at_and_copied(world: World) -> None:
    planner = planner_of(world)
    said = remoe_history(world, "stats")
    assert "21 prompts, seen 22 times" in said
    assert "1 observed" in said
    copy = world.folder / "copy.npz"
    assert "21 prompts in" in remoe_history(world, "export", str(copy))
    entries = list(read_history(copy, world.identity))
    assert [entry.demand for entry in entries] == [1.0] * 20 + [2.0]
    assert entries[-1].decode_tokens == 4
    assert entries[-1].last_seen_s == world.clock.time()
    planner.history.store.close()


def test_a_copy_is_taken_in_once_and_known_prompts_gain_demand(world: World) -> None:
    planner_of(world).history.store.close()
    copy = world.folder / "copy.npz"
    remoe_history(world, "export", str(copy))
    assert "21 prompts, 21 of them new" in remoe_history(world, "import", str(copy), folder="new")
    assert "already" in remoe_history(world, "import", str(copy), folder="new")
    assert "21 prompts, 0 of them new" in remoe_history(world, "import", str(copy))
    assert "seen 44 times" in remoe_history(world, "stats")


def test_a_running_planner_s_history_takes_nothing_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_store, "_TAKE_OVER_S", 0.0)
    planner = planner_of(world)
    arguments = ["import", str(world.folder / "history.npz"), "--dir", str(world.folder / "kept")]
    arguments += ["--model-dir", str(world.folder / "model")]
    result = CliRunner().invoke(history_app, arguments)
    assert result.exit_code != 0
    assert "in use by another planner" in result.output
    planner.history.store.close()


def test_without_a_history_the_error_says_where_one_would_be(world: World) -> None:
    arguments = ["stats", "--dir", str(world.folder), "--model-dir", str(world.folder / "model")]
    result = CliRunner().invoke(history_app, arguments)
    assert result.exit_code != 0
    assert history_path(world.folder, world.identity).name in result.output.replace("\n", "")


def test_an_unknown_embedder_is_refused(world: World) -> None:
    arguments = ["stats", "--embedder", "bert", "--model-dir", str(world.folder / "model")]
    result = CliRunner().invoke(history_app, arguments)
    assert result.exit_code != 0
    assert "token-table+minilm" in result.output
