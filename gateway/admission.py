"""From a checked request to a job: tokens, limits and sampling, or an error before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gateway.config import GatewaySettings
from gateway.conversation import turns
from gateway.guidance import grammar_for, offered_tools
from gateway.policy import check_policy
from gateway.replies import Detokenized, Tokenized
from gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    Message,
    Prompt,
    ResponseRequest,
    TokenizeRequest,
    Tool,
)
from gateway.response_input import messages_of
from gateway.sampling import sampling_params
from gateway.text import TextModel
from remoe.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedParameterError,
)
from remoe.generation import SamplingParams

__all__ = ["Admission", "Job"]


@dataclass(frozen=True, slots=True)
class Job:
    """One admitted request. Choice `i` is sample `i % samples` of prompt `i // samples`.

    Of the samples of a prompt the `n` best are answered with. `echo` has the prompts' texts if the
    answer begins with them. `logprobs` is the number of alternatives, None for none at all. `asked`
    is the request where the reply repeats some of it.
    """

    kind: Literal["chat", "completions", "responses"]
    model: str
    prompts: tuple[list[int], ...]
    max_new_tokens: tuple[int, ...]
    sampling: tuple[SamplingParams, ...]
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    stream: bool
    include_usage: bool
    n: int = 1
    echo: tuple[str, ...] = ()
    logprobs: int | None = None
    shows_logprobs: bool = True
    grammar: str | None = None
    calls_tools: bool = False
    timeout_s: float | None = None
    asked: ResponseRequest | None = None

    @property
    def prompt_logprobs(self) -> int | None:
        """Alternatives for the prompt's tokens: an echoed prompt is scored like its answer."""
        if not self.echo:
            return None
        return 0 if self.logprobs is None and 0 in self.max_new_tokens else self.logprobs

    @property
    def samples(self) -> int:
        return len(self.sampling)

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.samples

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class Admission:
    """Admits requests for one model."""

    def __init__(self, model: str, text: TextModel, settings: GatewaySettings) -> None:
        self._model = model
        self._text = text
        self._settings = settings

    def check_model(self, model: str) -> None:
        """Raise ModelNotFoundError, which names what there is, for any other model."""
        if model != self._model:
            raise ModelNotFoundError(
                f"The model '{model[:200]}' does not exist here. This server has "
                f"'{self._model}'; GET /v1/models lists what there is.",
                param="model",
            )

    async def chat(self, request: ChatRequest, *, timeout_s: float | None = None) -> Job:
        self._check(request, prompts=1, samples=request.n)
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' may only be given together with 'logprobs': true.",
                param="top_logprobs",
            )
        tools = offered_tools(request)
        shaped = request.response_format is not None and request.response_format.type != "text"
        if tools or shaped or request.logprobs:
            await self._text.vocabulary.load()
        grammar = grammar_for(request, self._text.vocabulary)
        prompt = await self._text.encode(
            self._lay_out(request, tools, messages=request.messages),
            special_tokens=False,
            param="messages",
        )
        limit = self._limit(
            prompt,
            request.token_limit,
            default=None,
            prompt_field="messages",
            limit_field="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        )
        return self._job(
            "chat",
            request,
            [prompt],
            [limit],
            logprobs=request.top_logprobs if request.logprobs else None,
            grammar=grammar,
            calls_tools=bool(tools),
            timeout_s=timeout_s,
        )

    async def response(self, request: ResponseRequest, *, timeout_s: float | None = None) -> Job:
        self._check(request, prompts=1, samples=1)
        messages = messages_of(request)
        prompt = await self._text.encode(
            self._lay_out(request, messages=messages), special_tokens=False, param="input"
        )
        limit = self._limit(
            prompt,
            request.max_output_tokens,
            default=None,
            prompt_field="input",
            limit_field="max_output_tokens",
        )
        job = self._job("responses", request, [prompt], [limit], timeout_s=timeout_s)
        # Its last event has the usage, always.
        return replace(job, include_usage=True, asked=request)

    def _lay_out(
        self,
        request: ChatRequest | ResponseRequest | TokenizeRequest,
        tools: Sequence[Tool] = (),
        *,
        messages: Sequence[Message],
    ) -> str:
        """The conversation as the model reads it."""
        template = self._text.chat_template
        if template is None:
            raise InvalidRequestError(
                f"The model '{self._model}' has no chat template; use /v1/completions.",
                param="messages",
            )
        if tools and template.knows_tools and not template.speaks_hermes:
            raise UnsupportedParameterError(
                "'tools' are not supported with this model: its chat template writes calls in a "
                "format of its own, which this server does not read. Send the request without "
                "tools, or use a model whose template writes <tool_call>.",
                param="tools",
            )
        native = template.knows_tools and template.speaks_hermes
        return template.render(
            turns(messages, tools, native_tools=native),
            request.chat_template_kwargs,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if native else (),
            add_generation_prompt=getattr(request, "add_generation_prompt", True),
        )

    async def completion(
        self, request: CompletionRequest, *, timeout_s: float | None = None
    ) -> Job:
        texts, token_lists = _split(request.prompt)
        samples = _candidates(request)
        self._check(request, prompts=len(texts) + len(token_lists), samples=samples)
        if request.max_tokens == 0 and not request.echo:
            raise InvalidRequestError(
                "'max_tokens' 0 generates nothing, which only makes sense with 'echo': true, to "
                "score the prompt. Ask for at least 1 token.",
                param="max_tokens",
            )
        if request.logprobs is not None:
            await self._text.vocabulary.load()
        prompts = [
            await self._text.encode(text, special_tokens=True, param="prompt")
            or list(self._text.document_start)
            for text in texts
        ]
        for tokens in token_lists:
            self._check_tokens(tokens)
            prompts.append(tokens)
        limits = [
            self._limit(
                prompt,
                request.max_tokens if "max_tokens" in request.model_fields_set else None,
                default=request.max_tokens,
                prompt_field="prompt",
                limit_field="max_tokens",
            )
            for prompt in prompts
        ]
        echo = [*texts, *map(self._text.decode, token_lists)] if request.echo else []
        # Candidates are compared by their log-probabilities, asked for or not.
        compared = 0 if samples > request.n else None
        return self._job(
            "completions",
            request,
            prompts,
            limits,
            samples=samples,
            echo=echo,
            logprobs=compared if request.logprobs is None else request.logprobs,
            shows_logprobs=request.logprobs is not None,
            timeout_s=timeout_s,
        )

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        """The tokens of a text, or of a conversation with the chat template around it."""
        self.check_model(request.model or self._model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequestError(
                "Give either 'prompt' or 'messages', and not both.", param="prompt"
            )
        chat = request.messages is not None
        messages = request.messages or []
        text = self._lay_out(request, messages=messages) if chat else request.prompt or ""
        special = request.add_special_tokens
        tokens = await self._text.encode(
            text,
            special_tokens=not chat if special is None else special,
            param="messages" if chat else "prompt",
        )
        return Tokenized(
            count=len(tokens),
            max_model_len=self._text.context_length,
            tokens=tokens,
            token_strs=[self._text.tokenizer.id_to_token(token) or "" for token in tokens]
            if request.return_token_strs
            else None,
        )

    def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        self.check_model(request.model or self._model)
        if request.tokens:
            self._check_tokens(request.tokens, param="tokens")
        return Detokenized(prompt=self._text.decode(request.tokens))

    def _check(self, request: GenerationFields, *, prompts: int, samples: int) -> None:
        """What can be refused before any text is tokenized."""
        self.check_model(request.model)
        check_policy(request)
        if request.stream_options is not None and not request.stream:
            raise InvalidRequestError(
                "'stream_options' may only be given together with 'stream': true.",
                param="stream_options",
            )
        if request.n > self._settings.max_samples:
            raise UnsupportedParameterError(
                f"'n' is limited to {self._settings.max_samples} on this server, got {request.n}. "
                "Send several requests instead.",
                param="n",
            )
        if prompts * samples > self._settings.max_choices:
            raise InvalidRequestError(
                f"{prompts} prompts with {samples} answers each are {prompts * samples} choices; "
                f"one request may ask for {self._settings.max_choices}. Send several requests.",
                param="prompt",
            )

    def _check_tokens(self, tokens: list[int], *, param: str = "prompt") -> None:
        highest = max(tokens)
        if highest >= self._text.vocab_size:
            raise InvalidRequestError(
                f"Token {highest} in '{param}' is not one of the model's {self._text.vocab_size} "
                f"tokens (0 to {self._text.vocab_size - 1}).",
                param=param,
            )

    def _limit(
        self,
        prompt: list[int],
        given: int | None,
        *,
        default: int | None,
        prompt_field: str,
        limit_field: str,
    ) -> int:
        """How many tokens may be generated: what was asked if it fits, else what is left."""
        context = self._text.context_length
        left = context - len(prompt)
        # A prompt that is only scored may fill the context.
        if left < (given != 0):
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, your "
                f"{prompt_field} resulted in {len(prompt)} tokens, which leaves no room for an "
                f"answer. Please reduce the length of the {prompt_field}.",
                param=prompt_field,
            )
        if given is not None and given > left:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{len(prompt) + given} tokens ({len(prompt)} in the {prompt_field}, {given} in "
                f"the completion). Please reduce the length of the {prompt_field}, or "
                f"'{limit_field}' to at most {left}.",
                param=limit_field,
            )
        return min(left, default or left) if given is None else given

    def _job(
        self,
        kind: Literal["chat", "completions", "responses"],
        request: GenerationFields,
        prompts: list[list[int]],
        limits: list[int],
        *,
        samples: int | None = None,
        echo: Sequence[str] = (),
        logprobs: int | None = None,
        shows_logprobs: bool = True,
        grammar: str | None = None,
        calls_tools: bool = False,
        timeout_s: float | None = None,
    ) -> Job:
        options = request.stream_options
        return Job(
            kind=kind,
            model=self._model,
            prompts=tuple(prompts),
            max_new_tokens=tuple(limits),
            sampling=tuple(
                sampling_params(
                    request,
                    self._text.sampling,
                    sample=sample,
                    vocab_size=self._text.vocab_size,
                )
                for sample in range(samples or request.n)
            ),
            stops=request.stops,
            stop_tokens=() if request.ignore_eos else self._text.stop_tokens,
            stream=request.stream,
            include_usage=options is not None and options.include_usage,
            n=request.n,
            echo=tuple(echo),
            logprobs=logprobs,
            shows_logprobs=shows_logprobs,
            grammar=grammar,
            calls_tools=calls_tools,
            timeout_s=timeout_s,
        )


def _candidates(request: CompletionRequest) -> int:
    """How many answers to generate for each prompt: `best_of`, of which the best are shown."""
    best_of = request.best_of or request.n
    if best_of < request.n:
        raise InvalidRequestError(
            f"'best_of' must be at least 'n', which is {request.n}; got {best_of}.",
            param="best_of",
        )
    if request.stream and best_of > request.n:
        raise InvalidRequestError(
            "With 'best_of' larger than 'n' the answers must be complete before they can be "
            "compared, so they cannot be streamed.",
            param="best_of",
        )
    return best_of


def _split(prompt: Prompt) -> tuple[list[str], list[list[int]]]:
    """The texts and the token lists of a prompt, one of which is empty."""
    if isinstance(prompt, str):
        return [prompt], []
    texts = [entry for entry in prompt if isinstance(entry, str)]
    token_lists = [entry for entry in prompt if isinstance(entry, list)]
    tokens = [entry for entry in prompt if isinstance(entry, int)]
    return texts, [*token_lists, tokens] if tokens else token_lists
