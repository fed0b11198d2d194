"""Where a model that somebody named lies: a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from remoe.errors import CheckpointError

__all__ = ["model_folder"]

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
# Configuration, tokenizer and chat template; weights in safetensors only, which can be mapped.
_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]


def model_folder(given: str) -> Path:
    """The folder of `given`: a path, or `owner/name` with an optional `@revision` of the hub.

    A repository is downloaded once, to the hub's own cache, whose settings (HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE) apply. Raises CheckpointError that says what to do.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not _HUB_ID.fullmatch(given):
        raise CheckpointError(
            f"{given} is not a folder. Give a folder in Hugging Face format, or a hub id such as "
            "mistralai/Mixtral-8x7B-Instruct-v0.1"
        )
    from huggingface_hub import snapshot_download

    repository, _, revision = given.partition("@")
    try:
        found = snapshot_download(repository, revision=revision or None, allow_patterns=_FILES)
    except Exception as error:  # the hub's, the network's and the cache's errors have no one base
        raise CheckpointError(
            f"{given} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Check the name, the network, and HF_TOKEN for "
            "gated models"
        ) from error
    return Path(found)
