"""The trace that ships: two minutes made up, small enough for a laptop and a small model.

`python -m loadgen.default_trace` writes it again. It has what makes real traces hard on a serverless
platform: bursts, and half a minute of silence in which functions go to sleep.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loadgen.arrivals import arrival_times
from loadgen.rates import RateProfile
from loadgen.readers.own import write_own_trace
from loadgen.trace import TracedRequest

__all__ = ["DEFAULT_TRACE", "generate"]

DEFAULT_TRACE = Path(__file__).parent / "data" / "default_trace.jsonl"
_SEED = 9
_STAGES = "0.2@40s,0@35s,0.2..0.6@30s,0.3@15s"


def generate() -> list[TracedRequest]:
    """Bursty arrivals (burstiness 0.5); log-normal lengths shaped like Azure's, and far shorter.

    Azure's conversation hour has medians of 1,020 prompt and 129 output tokens, this 64 and 16.
    """
    random = np.random.default_rng(_SEED)
    profile = RateProfile.parse(_STAGES)
    times = list(arrival_times(profile, burstiness=0.5, random=random))
    requests = []
    for time_s in times:
        prompt = int(np.clip(random.lognormal(np.log(64), 0.8), 16, 256))
        output = int(np.clip(random.lognormal(np.log(16), 0.7), 2, 48))
        requests.append(TracedRequest(time_s - times[0], prompt, output))
    return requests


if __name__ == "__main__":
    write_own_trace(DEFAULT_TRACE, generate())
