"""`remoe history`: look at what the planner has seen, keep a copy, and take copies in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe.cli.errors import OneLineErrors
from remoe.errors import SettingsError

if TYPE_CHECKING:
    from planner.history_store import HistoryIdentity, HistoryStore

__all__ = ["history_app"]

history_app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    help="The prompts that predictions rest on: look, keep a copy, take one in.",
)

ModelDir = Annotated[
    Path | None,
    typer.Option(help="A model folder in Hugging Face format.", show_default="the default model"),
]
HistoryDir = Annotated[
    Path | None,
    typer.Option("--dir", help="Where histories are kept.", show_default="REMOE_HOME/history"),
]
EmbedderName = Annotated[str, typer.Option("--embedder", help="Whose vectors the history holds.")]
_TOKEN_TABLE = "token-table"  # noqa: S105  # a name


@history_app.command("stats")
def stats(
    *, model_dir: ModelDir = None, folder: HistoryDir = None, embedder: EmbedderName = _TOKEN_TABLE
) -> None:
    """Say what the history holds; the planner may be running."""
    from collections import Counter

    with _reading(model_dir, folder, embedder) as store:
        demand, sets, tokens, last_s, count = 0.0, Counter[str](), 0, 0.0, 0
        for entry in store.entries():
            count += 1
            demand += entry.demand
            sets[entry.topic.split("/", 1)[0]] += 1
            tokens += entry.n_tokens
            last_s = max(last_s, entry.last_seen_s)
        typer.echo(f"{store.path}, {_size_mb(store.path):.1f} MB")
        typer.echo(
            f"{count} prompts, seen {demand:.0f} times, {tokens / max(count, 1):.0f} tokens each"
        )
        if last_s:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last_s))
            typer.echo(f"last observed {when}")
        for name, entries in sets.most_common():
            typer.echo(f"{entries:>7} {name}")


@history_app.command("export")
def export(
    out: Annotated[Path, typer.Argument(help="The file to write (.npz).")],
    *,
    model_dir: ModelDir = None,
    folder: HistoryDir = None,
    embedder: EmbedderName = _TOKEN_TABLE,
) -> None:
    """Write the history to a file, as it is at this moment; the planner may be running.

    It holds vectors, profiles, lengths and times, and no text of any prompt.
    """
    from planner.history_file import write_history

    with _reading(model_dir, folder, embedder) as store:
        count = write_history(out, store.entries(), store.identity)
    typer.echo(f"{count} prompts in {out}")


@history_app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A file of `export` or `remoe profile`.")],
    *,
    model_dir: ModelDir = None,
    folder: HistoryDir = None,
    embedder: EmbedderName = _TOKEN_TABLE,
    capacity: Annotated[int, typer.Option(help="Most prompts the history holds.", min=1)] = 20_000,
) -> None:
    """Take a file into the history, once; the planner must not be running.

    Prompts that are known gain the file's demand, and their profiles become the means of both.
    """
    from planner.history import History
    from planner.history_file import read_history
    from planner.history_store import HistoryStore

    path, identity = _where(model_dir, folder, embedder)
    entries = read_history(file, identity)
    store = HistoryStore.open(path, identity)
    try:
        if store.imported(entries.digest):
            typer.echo(f"{file} is in {path} already")
            return
        history = History(store, capacity=capacity)
        before = len(history)
        history.absorb(entries, digest=entries.digest)
        typer.echo(
            f"{len(entries.n_tokens)} prompts, {len(history) - before} of them new, in {path}"
        )
    finally:
        store.close()


@history_app.command("embed")
def embed(
    file: Annotated[Path, typer.Argument(help="A history of the paper's embedder.")],
    out: Annotated[Path, typer.Argument(help="The file to write (.npz).")],
    *,
    prompts: Annotated[
        Path,
        typer.Option(help="The prompt sets it was made of.", exists=True, file_okay=False),
    ],
    embedder: Annotated[str, typer.Option(help="The embedder to use from now on.")],
    model_dir: ModelDir = None,
) -> None:
    """Make a history file over for another embedder, without running the model again.

    A history has no text: its prompts are recognised among those of the folder.
    """
    from main_model_fn.activations import encode_prompts
    from main_model_fn.prompt_sets import read_prompts
    from planner.history_file import read_history, write_history
    from planner.model import ModelFacts
    from planner.predictors import history_identity, open_embedder
    from planner.prompt_index import PromptIndex, embedded_anew
    from remoe.checkpoint import Checkpoint
    from remoe.cli.model import built_model

    checkpoint = Checkpoint.open(model_dir or built_model())
    model = ModelFacts.of(checkpoint, "")
    table, wanted = open_embedder(_TOKEN_TABLE, checkpoint), open_embedder(embedder, checkpoint)
    entries = read_history(file, history_identity(model, table))
    everything = read_prompts(prompts, 10**9)
    index = PromptIndex(encode_prompts(checkpoint.model_dir, everything), table)
    anew = embedded_anew(entries, index, wanted)
    count = write_history(out, anew, history_identity(model, wanted))
    typer.echo(f"{count} of {len(entries.n_tokens)} prompts in {out}")


@contextmanager
def _reading(model_dir: Path | None, folder: Path | None, embedder: str) -> Iterator[HistoryStore]:
    from planner.history_store import HistoryStore

    store = HistoryStore.read(*_where(model_dir, folder, embedder))
    try:
        yield store
    finally:
        store.close()


def _where(
    model_dir: Path | None, folder: Path | None, embedder: str
) -> tuple[Path, HistoryIdentity]:
    from planner.history_store import history_path
    from planner.model import ModelFacts
    from planner.predictors import EMBEDDERS, history_identity, open_embedder
    from remoe.checkpoint import Checkpoint
    from remoe.cli.model import built_model
    from remoe.home import remoe_home

    if embedder not in EMBEDDERS:
        raise SettingsError(f"{embedder!r} is no embedder; there are {', '.join(EMBEDDERS)}")
    checkpoint = Checkpoint.open(model_dir or built_model())
    identity = history_identity(ModelFacts.of(checkpoint, ""), open_embedder(embedder, checkpoint))
    return history_path(folder or remoe_home() / "history", identity), identity


def _size_mb(path: Path | None) -> float:
    parts = [] if path is None else [path, path.with_name(path.name + "-wal")]
    return sum(part.stat().st_size for part in parts if part.exists()) / 1e6
