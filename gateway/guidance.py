"""Answers that must have a shape: what a request asks for, as a grammar for the main function.

JSON is written as Python's `json.dumps` writes it, one space after each comma and colon: that is
how models saw most of it, and a small model that may choose its white space can choose it for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llguidance import LLMatcher

from gateway.requests import ChatRequest, NamedToolChoice, Tool
from gateway.tool_calls import CALL_BEGIN, CALL_END
from gateway.vocabulary import Vocabulary
from remoe.errors import InvalidRequestError

__all__ = ["grammar_for", "offered_tools"]

_ANY_OBJECT: dict[str, object] = {"type": "object"}
_LAYOUT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}


def offered_tools(request: ChatRequest) -> Sequence[Tool]:
    """The tools the model is told of; with tool_choice "none" it is not told of any.

    Raises InvalidRequestError for a choice that the tools do not allow.
    """
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        tools = [tool for tool in request.tools if tool.function.name == choice.function.name]
        if not tools:
            raise InvalidRequestError(
                f"'tool_choice' names the function '{choice.function.name[:64]}', which is not "
                "among 'tools'. Add it there or choose another.",
                param="tool_choice",
            )
        return tools
    if choice == "required" and not request.tools:
        raise InvalidRequestError(
            "'tool_choice' may only be \"required\" together with 'tools'.", param="tool_choice"
        )
    return [] if choice == "none" else request.tools


def grammar_for(request: ChatRequest, vocabulary: Vocabulary) -> str | None:
    """The grammar of a request's answers, None if they are free.

    Raises InvalidRequestError for a schema that cannot be followed, naming what is at fault.
    """
    tools = offered_tools(request)
    wanted = request.response_format
    shaped = wanted is not None and wanted.type != "text"
    if not tools and not shaped:
        return None
    if request.ignore_eos:
        raise InvalidRequestError(
            "'ignore_eos' has no meaning for an answer whose shape says where it ends. Leave out "
            "'ignore_eos', or the tools or 'response_format'.",
            param="ignore_eos",
        )
    if tools and shaped:
        raise InvalidRequestError(
            "'response_format' and 'tools' cannot be combined on this server. Send one of them, "
            'or "tool_choice": "none".',
            param="response_format",
        )
    if tools:
        return _tool_grammar(request, tools, vocabulary)
    schema = _ANY_OBJECT
    param = "response_format"
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequestError(
                "Missing required parameter: 'response_format.json_schema'.",
                param="response_format.json_schema",
            )
        schema = wanted.json_schema.schema_ or _ANY_OBJECT
        param = "response_format.json_schema.schema"
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_LAYOUT)  # type: ignore[arg-type]
    vocabulary.check(grammar, param=param)
    return grammar


def _tool_grammar(request: ChatRequest, tools: Sequence[Tool], vocabulary: Vocabulary) -> str:
    for index, tool in enumerate(request.tools):
        vocabulary.check(
            LLMatcher.grammar_from_json_schema(json.dumps(_parameters(tool)), overrides=_LAYOUT),  # type: ignore[arg-type]
            param=f"tools[{index}].function.parameters",
        )
    # Definitions of a schema are referred to from its root, so each call is a schema of its own.
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    lines = ["%llguidance {}"]
    if request.tool_choice in {None, "auto"}:
        # Free text, until it says the words that begin a call.
        lines += [
            "start: block* tail" if request.parallel_tool_calls else "start: tail | block",
            f"block: trigger ({calls}) {json.dumps(CALL_END)}",
            f"trigger[lazy]: TEXT {json.dumps(CALL_BEGIN)}",
            "tail: TEXT",
            r"TEXT: /(.|\n)*/",
        ]
    else:
        several = ' ("\\n" block)*' if request.parallel_tool_calls else ""
        lines += [
            f"start: block{several}",
            f"block: {json.dumps(CALL_BEGIN)} ({calls}) {json.dumps(CALL_END)}",
        ]
    for index, tool in enumerate(tools):
        head = json.dumps(f'{{"name": "{tool.function.name}", "arguments": ')
        schema = json.dumps({**_parameters(tool), "x-guidance": _LAYOUT})
        lines.append(f'call_{index}: {head} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: %json {schema}")
    grammar = "\n".join(lines) + "\n"
    vocabulary.check(grammar, param="tools")
    return grammar


def _parameters(tool: Tool) -> dict[str, object]:
    """A function's arguments are an object, even if its schema does not say so."""
    return {**_ANY_OBJECT, **(tool.function.parameters or {})}
