"""The local runtime's own pace; functions' annotations say the rest."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RuntimeOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """Times in seconds. `window_s` and `progress_deadline_s`, if set, replace every function's.

    The scale-to-zero grace is 0 here: it is the longest Knative waits for its activator to be in
    the request path, and the supervisor, which holds the socket, is there at once.
    """

    tick_s: float = 2.0
    sample_s: float = 1.0
    scale_to_zero_grace_s: float = 0.0
    window_s: float | None = None
    progress_deadline_s: float | None = None
    # A replica that fails is restarted at once if it had worked, and then ever more slowly.
    backoff_first_s: float = 1.0
    backoff_most_s: float = 30.0
    # After that many failures in a row, callers get 503 rather than wait.
    failures_until_refusal: int = 3
    # A replica that lived this long starts a new row of failures.
    stable_after_s: float = 10.0
    # At shutdown; a replica scaled down has its function's whole timeout.
    stop_grace_s: float = 10.0
