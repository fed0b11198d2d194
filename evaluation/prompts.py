"""Prompts with known activations: a history to predict from, and others to predict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from evaluation.workbench import Workbench
from models.smollm2_8x135m.corpus import LEFT_OUT_SETS
from planner.embedding import TokenTableEmbedder
from planner.history_file import read_history
from planner.history_store import Entry, HistoryIdentity
from planner.model import ModelFacts
from planner.predictors import history_identity
from planner.prompt_index import PromptIndex
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError

__all__ = ["DECODE_TOKENS", "KnownPrompts", "encode_prompts", "known_prompts", "set_of"]

DECODE_TOKENS = 48  # what `remoe profile` lets every prompt decode
MAX_TOKENS = 1024
_HELD_OUT_EVERY = 10
_PER_SET, _QUICK_PER_SET = 24, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPrompts:
    """`train` is the history, `held_out` are prompts that are not in it, some of them of sets that
    it has nothing of. `tokens` are the held-out prompts' where their text is known."""

    checkpoint: Checkpoint
    model: ModelFacts
    identity: HistoryIdentity
    table: TokenTableEmbedder
    train: list[Entry]
    held_out: list[Entry]
    tokens: list[list[int]] | None
    source: str


def set_of(entry: Entry) -> str:
    return entry.topic.split("/")[0]


def known_prompts(bench: Workbench) -> KnownPrompts:
    """The model's shipped history without the sets left out, and prompts held out of it.

    With `--prompts` these are run through the model, which takes minutes and is done once; else a
    tenth of the shipped history and its left-out sets. SettingsError if the model has no history.
    """
    model_dir = bench.options.model_dir
    checkpoint = Checkpoint.open(model_dir)
    facts = ModelFacts.of(checkpoint, model_dir.name)
    table = TokenTableEmbedder(checkpoint)
    identity = history_identity(facts, table)
    path = model_dir / "history.npz"
    if not path.exists():
        raise SettingsError(
            f"{model_dir} has no history.npz; `remoe profile activations --model-dir {model_dir}` "
            "makes one"
        )
    shipped = list(read_history(path, identity))
    known = [entry for entry in shipped if set_of(entry) not in LEFT_OUT_SETS]
    tokens: list[list[int]] | None = None
    if bench.options.prompts is None:
        absent = [entry for entry in shipped if set_of(entry) in LEFT_OUT_SETS]
        train = [entry for row, entry in enumerate(known) if row % _HELD_OUT_EVERY]
        held_out = known[::_HELD_OUT_EVERY] + absent
        source = "a tenth of the model's shipped history, and its sets that are left out of it"
    else:
        per_set = _QUICK_PER_SET if bench.options.quick else _PER_SET
        train = known
        recorded = _profiled(bench, bench.options.prompts, per_set, checkpoint.digest)
        held_out = list(read_history(recorded, identity))
        corpus = PromptIndex(
            encode_prompts(bench.options.prompts, model_dir, per_set=per_set, held_out=True), table
        )
        tokens = [found for entry in held_out if (found := corpus.find(entry)) is not None]
        if len(tokens) != len(held_out):
            raise SettingsError(f"{recorded} was made of other prompts; remove it")
        source = f"prompts held out, up to {per_set} a set"
    return KnownPrompts(
        checkpoint=checkpoint,
        model=facts,
        identity=identity,
        table=table,
        train=train,
        held_out=held_out,
        tokens=tokens,
        source=f"{source}: {len(held_out)} prompts, {len(train)} in the history",
    )


def encode_prompts(
    folder: Path, model_dir: Path, *, per_set: int, held_out: bool
) -> list[list[int]]:
    """The tokens of prompts as the gateway would have them, in the model's chat template."""
    from transformers import AutoTokenizer

    from main_model_fn.prompt_sets import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=False
        )
        for prompt in read_prompts(folder, per_set, held_out=held_out)
    ]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids for ids in encoded if len(ids) <= MAX_TOKENS]


def _profiled(bench: Workbench, folder: Path, per_set: int, model_digest: str) -> Path:
    """Held-out prompts' activations, in a file of the results folder that tables share."""
    from main_model_fn.activations import write_history
    from main_model_fn.prompt_sets import read_prompts

    prompts = read_prompts(folder, per_set, held_out=True)
    digest = hashlib.sha256(model_digest.encode())
    for prompt in prompts:
        digest.update(f"{prompt.label}\0{prompt.text}\0".encode())
    path = bench.options.out / "prompts" / f"held-out-{digest.hexdigest()[:12]}.npz"
    if path.exists():
        bench.say(f"held-out prompts: kept in {path}")
        return path
    bench.say(f"running {len(prompts)} held-out prompts through the model")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"part-{path.name}")
    write_history(
        bench.options.model_dir,
        prompts,
        beside,
        max_tokens=MAX_TOKENS,
        decode_tokens=DECODE_TOKENS,
    )
    return beside.replace(path)
