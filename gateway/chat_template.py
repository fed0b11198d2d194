"""A model's chat template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from remoe.errors import CheckpointError, InvalidRequestError

__all__ = ["ChatTemplate", "ChatTurn"]

ChatTurn = Mapping[str, object]
_RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class ChatTemplate:
    """One compiled template with the model's special tokens bound."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the model's chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)
        # Whether the template itself tells the model of tools, and in which convention.
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(
            environment.parse(source)
        )
        self.speaks_hermes = "<tool_call>" in source

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate | None:
        """Find the template as transformers does; None if the model has none (a base model)."""
        config = _read_config(model_dir / "tokenizer_config.json")
        try:
            source: str | None = (model_dir / "chat_template.jinja").read_text("utf-8")
        except FileNotFoundError:
            source = _configured_template(config.get("chat_template"))
        if source is None:
            return None
        specials = {
            name: token
            for name, value in config.items()
            if name.endswith("_token")
            for token in [value.get("content") if isinstance(value, dict) else value]
            if isinstance(token, str)
        }
        return cls(source, specials)

    def render(
        self,
        messages: Sequence[ChatTurn],
        extra: Mapping[str, object] | None = None,
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """Lay the conversation out, up to where the assistant's next words begin.

        Raises InvalidRequestError with the template's own words when it refuses a conversation.
        """
        given = dict(extra or {})
        if reserved := sorted(_RESERVED & given.keys()):
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {', '.join(reserved)}; leave them out.",
                param="chat_template_kwargs",
            )
        variables = {
            **self._special_tokens,
            **given,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
        }
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"The model's chat template does not accept these messages: {error}",
                param="messages",
            ) from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks training spans; it prints its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own way to declare it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # local time, as transformers


def _read_config(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _configured_template(value: object) -> str | None:
    """A template, or transformers' older list of named ones, of which "default" is meant."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default":
                return _configured_template(entry.get("template"))
    return None
