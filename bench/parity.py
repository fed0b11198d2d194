"""Is the split model the model? Greedy tokens and logits of a running platform against `generate`.

    remoe up --dtype float32            # in one terminal
    python bench/parity.py --prompts PROMPT_SETS --count 50 --tokens 64

The platform's main function generates over its own HTTP endpoint, with whatever partition it
loaded; the reference is transformers' unmodified model on the same checkpoint and dtype. The
logits are compared in this process, with the running expert functions behind the split model,
against transformers' plain ("eager") experts; how far its default experts are from those is the
yardstick.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from knative.local.run_dir import RunDir
from main_model_fn.http_transport import HttpTransport
from main_model_fn.loading import load_split_model
from main_model_fn.metering import StepMeter
from remoe.generation import GenerateEvent, GenerateRequest, SamplingParams
from remoe.home import remoe_home
from remoe.plan import Deployment
from remoe.topology import Topology


def prompts_of(folder: Path, count: int) -> Iterator[str]:
    """The first prompt of each set, then the second of each, and so on, up to `count`."""
    sets = [
        (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")
        for path in sorted(folder.glob("*/prompts.jsonl*"))
    ]
    if not sets:
        raise SystemExit(f"{folder} holds no SET/prompts.jsonl files")
    found = 0
    while found < count:
        for lines in sets:
            if found < count:
                yield json.loads(next(lines))["prompt"]
                found += 1


def generate(main_url: str, prompt: list[int], tokens: int, stop: list[int]) -> list[int]:
    """Greedy tokens of the running main function."""
    request = GenerateRequest(
        request_id="parity",
        plan_id=None,
        prompt_tokens=prompt,
        max_new_tokens=tokens,
        stop_tokens=stop,
        sampling=SamplingParams(temperature=0),
    )
    answer: list[int] = []
    with urllib.request.urlopen(  # noqa: S310
        f"{main_url}/v1/generate", data=msgspec.json.encode(request), timeout=600
    ) as lines:
        for line in lines:
            event = msgspec.json.decode(line, type=GenerateEvent)
            assert event.error is None, event.error
            answer += event.tokens
    return answer


def split_twin(topology: Topology, deployment: Deployment, dtype: torch.dtype) -> PreTrainedModel:
    """The running deployment's split model in this process, for its logits."""
    layers, experts = deployment.partition.layers, deployment.partition.experts
    return load_split_model(
        Path(topology.model_dir),
        partition=deployment.partition,
        dtype=dtype,
        device=torch.device("cpu"),
        transport=HttpTransport(topology, timeout_s=60),
        function_memory_gb=dict.fromkeys(range(layers), 0.0),
        meter=StepMeter(layers=layers, experts=experts, main_memory_gb=0.0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="folder of SET/prompts.jsonl")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="the dtype the platform runs in")
    parser.add_argument("--longest", type=int, default=1024, help="prompts are cut to this")
    args = parser.parse_args()

    topology = Topology.load(RunDir(remoe_home()).topology)
    with urllib.request.urlopen(f"{topology.main_url}/v1/deployment") as reply:  # noqa: S310
        deployment = msgspec.json.decode(reply.read(), type=Deployment)
    partition, dtype = deployment.partition, getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(topology.model_dir)
    reference = AutoModelForCausalLM.from_pretrained(topology.model_dir, dtype=dtype).eval()
    twin = split_twin(topology, deployment, dtype)
    stop = [tokenizer.eos_token_id]

    same_answers = same_tokens = tokens = 0
    largest_logit = ours = librarys = 0.0
    for number, text in enumerate(prompts_of(args.prompts, args.count)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"][-args.longest :]
        ids = torch.tensor([prompt])
        with torch.no_grad():
            default_logits = reference(ids).logits
            default_experts = reference.config._experts_implementation  # noqa: SLF001
            reference.set_experts_implementation("eager")
            plain_logits = reference(ids).logits
            reference.set_experts_implementation(default_experts)
            ours = max(ours, float((plain_logits - twin(ids).logits).abs().max()))
        librarys = max(librarys, float((plain_logits - default_logits).abs().max()))
        largest_logit = max(largest_logit, float(plain_logits.abs().max()))
        output = reference.generate(
            ids,
            max_new_tokens=args.tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=stop,
        )
        expected = [token for token in output[0, len(prompt) :].tolist() if token not in stop]
        got = generate(topology.main_url, prompt, args.tokens, stop)
        agreeing = next(
            (i for i, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]),
            min(len(expected), len(got)),
        )
        same_answers += expected == got
        same_tokens += agreeing
        tokens += max(len(expected), len(got))
        print(
            f"{number + 1:3d} {'same' if expected == got else f'differs at {agreeing}':>14}"
            f"  {len(prompt)} + {len(expected)} tokens",
            flush=True,
        )

    remote = partition.remote_count / (partition.layers * partition.experts)
    print(
        f"\n{args.dtype}, {remote:.0%} of experts remote, {platform.processor() or platform.machine()}"
    )
    print(f"answers equal: {same_answers} of {args.count}")
    print(f"tokens equal up to the first difference: {same_tokens} of {tokens}")
    print(f"largest logit difference: {ours:.3g} (largest logit {largest_logit:.3g}); ")
    print(f"of transformers' default experts from its plain ones: {librarys:.3g}")


if __name__ == "__main__":
    main()
