"""Decoding and prefill of real MoE shapes on one GPU and the processors beside it.

    python -u -m bench.heterogeneous --out results.json

Weights are random and made here, from the published configurations alone. All contenders run the
same transformers model, whose experts are: all on the GPU; all on the CPU, with everything else
(Remoe without a GPU); in the CPU's memory and fetched whole, layer by layer, by accelerate's
`cpu_offload`; or Remoe's, with none or a part of them in the GPU's memory. Decoding is one stream
after a prompt of 32 random tokens: Remoe's through its engine, as it serves; the others' pass by
pass, with random tokens.

The floor of decoding is the bytes of a token's experts over the rates at which the CPU reads memory
and pinned memory reaches the GPU, both measured here, alone and together. Each figure is appended
to --out as soon as it is known. Needs transformers, accelerate, structlog, msgspec, llguidance, a C
compiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bench.heterogeneous.contenders import Contenders, going_on
from bench.heterogeneous.host import PROCESSORS, Weights
from bench.heterogeneous.results import BEGAN, Results, table
from bench.heterogeneous.shapes import CONFIGS
from main_model_fn.machine import SPINS_BESIDE_GPU
from main_model_fn.split import EXPERTS_IMPLEMENTATION, split_experts_forward
from remoe.kernel import native_library
from remoe.kernel.interface import KernelUnavailableError
from remoe.kernel.native_library import native_variants


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=190, help="end after about so long")
    parser.add_argument("--limit", type=float, default=4, help="seconds for one figure, at most")
    parser.add_argument("--hot", nargs="+", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--prefills", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--spins", type=int, default=SPINS_BESIDE_GPU)
    parser.add_argument("--fewer", type=int, default=1, help="kernel threads less than processors")
    parser.add_argument("--slices", type=int, default=0, help="of an expert; 0: as Remoe chooses")
    parser.add_argument("--skip-offload", action="store_true")
    parser.add_argument("--skip-others", action="store_true", help="not all on the GPU")
    parser.add_argument("--skip-cpu", action="store_true", help="not all on the CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny layers: does it run at all?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out)
    torch.set_num_threads(1)  # beside the kernel's, as main_model_fn/native_threads.py does
    try:
        native_variants()
    except KernelUnavailableError:
        subprocess.run([sys.executable, "-m", "remoe.kernel.native.build"], check=True)
        native_library.open_library.cache_clear()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, split_experts_forward)
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    results.add(
        what="machine",
        gpu=gpu,
        processors=PROCESSORS,
        torch=torch.__version__,
        transformers=transformers.__version__,
        accelerate=accelerate.__version__,
        kernel=native_variants()[0],
    )
    weights = Weights(1 << 25 if args.tiny else 31 << 30, device)
    for name in args.models:
        if time.perf_counter() - BEGAN > args.seconds - 10:
            break
        going_on(results, name, lambda: Contenders(name, args, weights, results).run())  # noqa: B023
    table(results)


if __name__ == "__main__":
    main()
