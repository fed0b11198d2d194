"""What clients may send: the fields this gateway implements, typed and ranged.

Standard fields that are missing here are either harmless or refused; see `gateway.policy`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from remoe.generation import MAX_LOGPROBS

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "DetokenizeRequest",
    "FunctionCall",
    "FunctionDefinition",
    "GenerationFields",
    "JsonSchemaFormat",
    "Message",
    "NamedToolChoice",
    "ResponseFormat",
    "ResponseRequest",
    "StreamOptions",
    "TokenizeRequest",
    "Tool",
    "ToolCall",
]

# Tags of unions begin with "<": they are steps of pydantic's error path but no part of a name.
_INT64 = 2**63
Token = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]


def _stop_kind(value: object) -> str:
    return "<stops>" if isinstance(value, list) else "<stop>"


def _content_kind(value: object) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


def _choice_kind(value: object) -> str:
    return "<named>" if isinstance(value, dict) else "<mode>"


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<text>"
    if value and isinstance(value[0], list):
        return "<token_lists>"
    if value and isinstance(value[0], int):
        return "<tokens>"
    return "<texts>"


Stop = Annotated[
    Annotated[StopText, Tag("<stop>")]
    | Annotated[list[StopText], Field(max_length=4), Tag("<stops>")],
    Discriminator(_stop_kind),
]
TokenList = Annotated[list[Token], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1), Tag("<texts>")]
    | Annotated[TokenList, Tag("<tokens>")]
    | Annotated[list[TokenList], Field(min_length=1), Tag("<token_lists>")],
    Discriminator(_prompt_kind),
]


class _Body(BaseModel):
    # Unknown fields are kept: the policy looks at them, and peers accept them too.
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class StreamOptions(_Body):
    include_usage: bool = False


class GenerationFields(_Body):
    """The fields both endpoints share.

    `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are vLLM's extensions. As there, what a
    request leaves out comes from the model's generation_config.json, and only then from here.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 or -1: no limit")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop = []
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        """Read an explicit null as "left out", as OpenAI does for every optional field."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`. A null or empty prompt means the start of a document.

    `logprobs` may go up to 20 where OpenAI stops at 5, as vLLM's does.
    """

    prompt: Prompt
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=20)

    @model_validator(mode="before")
    @classmethod
    def _null_prompt(cls, data: object) -> object:
        if isinstance(data, dict) and "prompt" in data and data["prompt"] is None:
            return {**data, "prompt": ""}
        return data


class ContentPart(_Body):
    type: str
    text: str | None = None


class FunctionCall(_Body):
    """A call an assistant made; `arguments` is JSON in a string, as OpenAI has it."""

    name: str
    arguments: str


class ToolCall(_Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    """One turn. Content may be parts, of which text is supported."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")],
            Discriminator(_content_kind),
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(_Body):
    """`parameters` is a JSON schema; calls always keep to it, whatever `strict` says."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Body):
    name: str


class NamedToolChoice(_Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedToolChoice, Tag("<named>")],
    Discriminator(_choice_kind),
]


class JsonSchemaFormat(_Body):
    """The answer always keeps to the schema, whatever `strict` says."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, object] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`. Without a limit the answer may fill the context."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, object] = {}

    @property
    def token_limit(self) -> int | None:
        """The newer name wins over the deprecated one."""
        return self.max_completion_tokens or self.max_tokens


class InputItem(_Body):
    """One turn of a response's input; its content may be parts, of which text is supported."""

    type: str = "message"
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")],
            Discriminator(_content_kind),
        ]
        | None
    ) = None


def _input_kind(value: object) -> str:
    return "<items>" if isinstance(value, list) else "<text>"


class ResponseRequest(GenerationFields):
    """`POST /v1/responses`: text in, text out. Without a limit the answer may fill the context."""

    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1), Tag("<items>")],
        Discriminator(_input_kind),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=1)
    chat_template_kwargs: dict[str, object] = {}


class TokenizeRequest(_Body):
    """`POST /tokenize`, as vLLM has it: a text prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, object] = {}


class DetokenizeRequest(_Body):
    """`POST /detokenize`, as vLLM has it."""

    model: str | None = None
    tokens: list[Token]
