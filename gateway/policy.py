"""Standard fields that this gateway does not implement: refused if they change the output.

A client that asked for tools and got prose would not know why; one that sent `user` loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import structlog

from gateway.requests import CompletionRequest, GenerationFields, ResponseRequest
from remoe.errors import UnsupportedParameterError

__all__ = ["HARMLESS_FIELDS", "REFUSED_FIELDS", "check_policy"]

_log = structlog.get_logger()

# Field -> the values that mean the same as leaving it out.
_REFUSED_BY_CHAT: Final[Mapping[str, tuple[object, ...]]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_BY_COMPLETIONS: Final[Mapping[str, tuple[object, ...]]] = {
    "suffix": ("",),
}
_REFUSED_BY_RESPONSES: Final[Mapping[str, tuple[object, ...]]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
REFUSED_FIELDS: Final = {
    "chat": _REFUSED_BY_CHAT,
    "completions": _REFUSED_BY_COMPLETIONS,
    "responses": _REFUSED_BY_RESPONSES,
}
HARMLESS_FIELDS: Final = frozenset(
    {
        "metadata",
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
    if isinstance(request, CompletionRequest):
        refused = _REFUSED_BY_COMPLETIONS
    elif isinstance(request, ResponseRequest):
        refused = _REFUSED_BY_RESPONSES
    else:
        refused = _REFUSED_BY_CHAT
    for name, value in extras.items():
        if name in refused:
            if not any(type(value) is type(same) and value == same for same in refused[name]):
                raise UnsupportedParameterError(
                    f"'{name}' is not supported by this server yet, and leaving it out would "
                    "change the answer. Send the request without it.",
                    param=name,
                )
        elif name not in HARMLESS_FIELDS:
            _log.debug("ignored an unknown request field", field=name[:64])
