"""Log-probabilities as the two endpoints show them.

A token that is part of a character is shown by its bytes: as `\\xe6` in chat, where the exact ones
stand beside it, and as `bytes:\\xe6` in completions, which have no other place for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.choice import TokenPiece
from gateway.replies import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs
from gateway.vocabulary import Vocabulary

__all__ = ["chat_logprobs", "completion_logprobs"]

# JSON has no minus infinity; OpenAI writes this for tokens that cannot come.
_LOWEST = -9999.0


def chat_logprobs(pieces: Sequence[TokenPiece], vocabulary: Vocabulary) -> ChatLogprobs:
    content = []
    for piece in pieces:
        if piece.scored is None:
            continue
        data = vocabulary.token_bytes(piece.token)
        content.append(
            ChatTokenLogprob(
                token=_text(data, ""),
                logprob=max(piece.scored.logprob, _LOWEST),
                bytes=list(data),
                top_logprobs=[
                    ChatTopLogprob(
                        token=_text(other, ""),
                        logprob=max(top.logprob, _LOWEST),
                        bytes=list(other),
                    )
                    for top in piece.scored.top
                    for other in [vocabulary.token_bytes(top.token)]
                ],
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(pieces: Sequence[TokenPiece], vocabulary: Vocabulary) -> CompletionLogprobs:
    """Parallel arrays. The chosen token is always among its alternatives, as OpenAI has it."""
    return CompletionLogprobs(
        tokens=[_text(vocabulary.token_bytes(piece.token), "bytes:") for piece in pieces],
        token_logprobs=[
            max(piece.scored.logprob, _LOWEST) if piece.scored else None for piece in pieces
        ],
        top_logprobs=[_alternatives(piece, vocabulary) for piece in pieces],
        text_offset=[piece.offset for piece in pieces],
    )


def _alternatives(piece: TokenPiece, vocabulary: Vocabulary) -> dict[str, float] | None:
    if piece.scored is None:
        return None
    listed = [(top.token, top.logprob) for top in piece.scored.top]
    found: dict[str, float] = {}
    for token, logprob in [*listed, (piece.token, piece.scored.logprob)]:
        # Two tokens may read the same; the likelier one came first.
        found.setdefault(_text(vocabulary.token_bytes(token), "bytes:"), max(logprob, _LOWEST))
    return found


def _text(data: bytes, prefix: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
