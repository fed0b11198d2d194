"""MoEless' table on a tiny model: recorded, learned, replayed, and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from evaluation import moeless, moeless_world
from evaluation.workbench import Workbench


def with_plain_special_tokens(model_dir: Path) -> None:
    """The tokenizer's settings as transformers reads them: special tokens by their text."""
    path = model_dir / "tokenizer_config.json"
    settings = msgspec.json.decode(path.read_bytes())
    for name, value in settings.items():
        if name.endswith("_token") and isinstance(value, dict):
            settings[name] = value["content"]
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_bytes(msgspec.json.encode(settings))


def test_policies_are_replayed_on_the_models_own_routing(
    history_bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        moeless_world, "_MOST_CHARACTERS", 40
    )  # a tiny tokenizer's tokens are bytes
    with_plain_special_tokens(history_bench.options.model_dir)
    result = moeless.make(history_bench)
    series = {one.name: one for one in result.series}
    rows = {str(row["name"]): row for row in series["policies"].named()}
    assert set(rows) == {"expert parallel", "EPLB", "oracle (lossy)", "MoEless"}
    # Nothing is more even than a router that is not asked.
    assert (
        float(rows["oracle (lossy)"]["cv"] or 0) < 1e-9 < float(rows["expert parallel"]["cv"] or 0)
    )
    assert float(rows["oracle (lossy)"]["layer_us"] or 0) < float(
        rows["expert parallel"]["layer_us"] or 0
    )
    plain, ours = (float(rows[name]["proxy"] or 0) for name in ("expert parallel", "MoEless"))
    assert ours < plain
    assert len(series["ablation"].rows) == 5
    whole = series["ablation"].named()[0]
    assert whole == {**rows["MoEless"], "name": "whole"}
    assert {row["layer"] for row in series["predictor"].named()} != set()

    again = Workbench(replace(history_bench.options, fresh=False), "some")
    assert moeless.make(again).series == result.series
    assert {"policies", "ablation", "distances", "thresholds"} <= set(again.reused)
