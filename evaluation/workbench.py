"""Where tables are made: options, progress, and work items that are not done twice.

An item is a piece of work with a name and inputs. Its value is kept in the results folder under the
digest of both, so that a run that was cut off goes on where it stopped, and a run with other inputs
measures anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

__all__ = ["Options", "Workbench"]

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command was told. `quick`: fewer and shorter of everything, to see that it works.

    prompts: a folder with a folder a set; without it the model's shipped history serves.
    traces: a folder with Azure's LLM traces; without it the trace that ships.
    hardware: a profile of `remoe profile hardware` to plan the default model with.
    host: the figures of a machine to model published shapes on, instead of those that ship.
    requests: how many are measured end to end for the cost table; the paper's are 50.
    """

    out: Path
    model_dir: Path
    quick: bool = False
    prompts: Path | None = None
    traces: Path | None = None
    hardware: Path | None = None
    host: Path | None = None
    port: int = 8400
    requests: int = 50
    fresh: bool = False


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    inputs: msgspec.Raw
    value: msgspec.Raw
    took_s: float
    load_1min: float
    at: str


@dataclass(slots=True)
class Workbench:
    """One table at work; `say` shows a line of progress."""

    options: Options
    table: str
    say: Callable[[str], None] = lambda _: None
    reused: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.options.out / self.table

    def item(
        self, name: str, inputs: object, work: Callable[[], _Value], kind: type[_Value]
    ) -> _Value:
        """The value of `work`, from the folder if these very inputs were worked on before.

        `kind` is what the value is read back as; `inputs` are anything msgspec can encode.
        """
        encoded = msgspec.json.encode(inputs, order="deterministic")
        digest = hashlib.sha256(name.encode() + b"\0" + encoded).hexdigest()[:12]
        path = self.folder / "items" / f"{name.replace('/', '-').replace(' ', '-')}-{digest}.json"
        if path.exists() and not self.options.fresh:
            kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
            self.reused.append(name)
            self.say(f"{name}: kept from {kept.at}")
            return msgspec.json.decode(kept.value, type=kind)
        self.say(name)
        start = time.perf_counter()
        value = work()
        kept = _Kept(
            name=name,
            inputs=msgspec.Raw(encoded),
            value=msgspec.Raw(msgspec.json.encode(value)),
            took_s=round(time.perf_counter() - start, 3),
            load_1min=os.getloadavg()[0],
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.part")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
        beside.replace(path)
        return msgspec.json.decode(kept.value, type=kind)
