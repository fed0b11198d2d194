"""`transformers serve`, whole but for the model: its server, handler, generation manager, streamer.

    python -m bench.streaming.transformers_serve MODEL_DIR

Prints its port. Its `generate` answers at once with the token of " processes".
"""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from bench.streaming.upstream import TEXT


class Model:
    device, dtype = torch.device("cpu"), torch.float32
    config = type("Config", (), {"model_type": "llama"})()
    generation_config = GenerationConfig(eos_token_id=0)

    def __init__(self, token: int) -> None:
        self._token = torch.tensor([token])

    def generate(self, *, streamer: Any, generation_config: Any, **rest: Any) -> None:
        streamer.put(rest["input_ids"])
        for _ in range(generation_config.max_new_tokens):
            streamer.put(self._token)
        streamer.end()


class Manager(ModelManager):
    """Manages nothing."""

    def __init__(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def get_model_modality(self, *_: Any, **__: Any) -> Modality:
        return Modality.LLM


class Handler(ChatCompletionHandler):
    found: tuple[str, Model, Any]

    def _resolve_model(self, _: dict[str, Any]) -> tuple[str, Model, Any]:
        return self.found


def main() -> None:
    folder = Path(sys.argv[1])
    logging.disable(logging.WARNING)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    state, manager = GenerationState(continuous_batching=False), Manager()
    handler = Handler(model_manager=manager, generation_state=state)
    handler.found = ("m", Model(tokenizer.encode(TEXT)[0]), tokenizer)
    app = build_server(manager, handler, None, None, None, None, state)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
