"""Standard fields that this gateway does not implement: refused if they change the output.

A client that asked for tools and got prose would not know why; one that sent `user` loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import structlog

from gateway.requests import CompletionRequest, GenerationFields
from remoe.errors import InvalidRequestError, UnsupportedParameterError

__all__ = ["HARMLESS_FIELDS", "REFUSED_FIELDS", "check_policy"]

_log = structlog.get_logger()

# Field -> the values that mean the same as leaving it out.
_REFUSED_BY_CHAT: Final[Mapping[str, tuple[object, ...]]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_BY_COMPLETIONS: Final[Mapping[str, tuple[object, ...]]] = {
    "echo": (False,),
    # 0 is not null: it asks for the chosen token's own logprob.
    "logprobs": (),
    "suffix": ("",),
}
REFUSED_FIELDS: Final = {
    "chat": _REFUSED_BY_CHAT,
    "completions": _REFUSED_BY_COMPLETIONS,
}
HARMLESS_FIELDS: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def check_policy(request: GenerationFields) -> None:
    """Raise UnsupportedParameterError for the first refused field; log what is not known."""
    extras = request.model_extra or {}
    completions = isinstance(request, CompletionRequest)
    refused = _REFUSED_BY_COMPLETIONS if completions else _REFUSED_BY_CHAT
    for name, value in extras.items():
        if name in refused:
            if not any(type(value) is type(same) and value == same for same in refused[name]):
                raise UnsupportedParameterError(
                    f"'{name}' is not supported by this server yet, and leaving it out would "
                    "change the answer. Send the request without it.",
                    param=name,
                )
        elif completions and name == "best_of":
            _check_best_of(value, request.n)
        elif name not in HARMLESS_FIELDS:
            _log.debug("ignored an unknown request field", field=name[:64])


def _check_best_of(value: object, n: int) -> None:
    # As many candidates as answers: nothing to choose from, the same as no best_of.
    if type(value) is int and value == n:
        return
    if type(value) is not int or not n <= value <= 20:
        raise InvalidRequestError(
            f"'best_of' must be a whole number from n ({n}) to 20.", param="best_of"
        )
    raise UnsupportedParameterError(
        "'best_of' larger than 'n' is not supported by this server; ask for 'n' answers and "
        "choose among them.",
        param="best_of",
    )
