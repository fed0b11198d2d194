"""From a checked request to a job: tokens, limits and sampling, or an error before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gateway.config import GatewaySettings
from gateway.conversation import turns
from gateway.policy import check_policy
from gateway.requests import ChatRequest, CompletionRequest, GenerationFields, Prompt
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
    """One admitted request. Choice `i` is sample `i % samples` of prompt `i // samples`."""

    kind: Literal["chat", "completions"]
    model: str
    prompts: tuple[list[int], ...]
    max_new_tokens: tuple[int, ...]
    sampling: tuple[SamplingParams, ...]
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    stream: bool
    include_usage: bool

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

    async def chat(self, request: ChatRequest) -> Job:
        self._check(request, prompts=1)
        template = self._text.chat_template
        if template is None:
            raise InvalidRequestError(
                f"The model '{self._model}' has no chat template; use /v1/completions.",
                param="messages",
            )
        text = template.render(turns(request.messages), request.chat_template_kwargs)
        prompt = await self._text.encode(text, special_tokens=False, param="messages")
        limit = self._limit(
            prompt,
            request.token_limit,
            default=None,
            prompt_field="messages",
            limit_field="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        )
        return self._job("chat", request, [prompt], [limit])

    async def completion(self, request: CompletionRequest) -> Job:
        texts, token_lists = _split(request.prompt)
        self._check(request, prompts=len(texts) + len(token_lists))
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
        return self._job("completions", request, prompts, limits)

    def _check(self, request: GenerationFields, *, prompts: int) -> None:
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
        if prompts * request.n > self._settings.max_choices:
            raise InvalidRequestError(
                f"{prompts} prompts with n={request.n} are {prompts * request.n} choices; one "
                f"request may ask for {self._settings.max_choices}. Send several requests.",
                param="prompt",
            )

    def _check_tokens(self, tokens: list[int]) -> None:
        highest = max(tokens)
        if highest >= self._text.vocab_size:
            raise InvalidRequestError(
                f"Token {highest} in 'prompt' is not one of the model's {self._text.vocab_size} "
                f"tokens (0 to {self._text.vocab_size - 1}).",
                param="prompt",
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
        if left < 1:
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
        return given or min(left, default or left)

    def _job(
        self,
        kind: Literal["chat", "completions"],
        request: GenerationFields,
        prompts: list[list[int]],
        limits: list[int],
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
                for sample in range(request.n)
            ),
            stops=request.stops,
            stop_tokens=() if request.ignore_eos else self._text.stop_tokens,
            stream=request.stream,
            include_usage=options is not None and options.include_usage,
        )


def _split(prompt: Prompt) -> tuple[list[str], list[list[int]]]:
    """The texts and the token lists of a prompt, one of which is empty."""
    if isinstance(prompt, str):
        return [prompt], []
    texts = [entry for entry in prompt if isinstance(entry, str)]
    token_lists = [entry for entry in prompt if isinstance(entry, list)]
    tokens = [entry for entry in prompt if isinstance(entry, int)]
    return texts, [*token_lists, tokens] if tokens else token_lists
