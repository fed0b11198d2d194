"""`python -m evaluation.whole_model DEVICE MODEL_DIR`: a model on one device, from nothing.

What the paper's CPU and GPU are: transformers loads everything and writes one token. Prints the
seconds of each stage as JSON.
"""

from __future__ import annotations

import json
import sys
import time

__all__ = ["main"]


def main() -> None:
    device, model_dir = sys.argv[1:]
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    libraries = time.perf_counter()
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").to(device).eval()
        loaded = time.perf_counter()
        logits = model(torch.ones((1, 8), dtype=torch.long, device=device)).logits
        logits[0, -1].argmax().item()
    sys.stdout.write(
        json.dumps(
            {
                "libraries": libraries - start,
                "model": loaded - libraries,
                "first token": time.perf_counter() - loaded,
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
