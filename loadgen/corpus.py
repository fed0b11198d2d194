"""Text to make prompts from, by topic. Which experts a prompt uses depends on what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.readers.text_files import open_text
from remoe.errors import SettingsError

__all__ = ["DEFAULT_CORPUS", "Corpus", "read_corpus"]

DEFAULT_CORPUS = Path(__file__).parent / "data" / "corpus.jsonl"


class _Line(msgspec.Struct):
    prompt: str
    topic: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages by topic, in the files' order."""

    name: str
    topics: dict[str, tuple[str, ...]]

    @property
    def characters(self) -> int:
        return sum(len(text) for texts in self.topics.values() for text in texts)


def read_corpus(path: Path = DEFAULT_CORPUS) -> Corpus:
    """Read `prompts.jsonl(.gz)` of a folder and its sub-folders, or one such file.

    A line is an object with `prompt`, and `topic` if it has one. Topics of different folders stay
    apart. Raises SettingsError with the line number, or if there is no text.
    """
    if path.is_dir():
        files = sorted(path.rglob("prompts.jsonl")) + sorted(path.rglob("prompts.jsonl.gz"))
        if not files:
            raise SettingsError(f"{path} has no prompts.jsonl or prompts.jsonl.gz, at any depth")
    else:
        files = [path]
    topics: dict[str, list[str]] = {}
    decoder = msgspec.json.Decoder(_Line)
    for file in files:
        prefix = f"{file.parent.name}/" if len(files) > 1 else ""
        with open_text(file) as lines:
            for number, text in enumerate(lines, start=1):
                if not text.strip():
                    continue
                try:
                    line = decoder.decode(text)
                except msgspec.DecodeError as error:
                    raise SettingsError(f"{file}:{number}: {error}") from error
                if line.prompt.strip():
                    topics.setdefault(prefix + line.topic, []).append(line.prompt.strip())
    if not topics:
        raise SettingsError(f"{path} has no text")
    return Corpus(path.name, {topic: tuple(texts) for topic, texts in topics.items()})
