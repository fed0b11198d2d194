from __future__ import annotations

from main_model_fn.breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_opens_after_a_failure_and_doubles_its_patience() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, cooldown_s=1.0, max_cooldown_s=3.0)
    assert breaker.allows
    for waited in (1.0, 2.0, 3.0, 3.0):
        breaker.failed()
        clock.now += waited - 0.01
        before = breaker.allows
        clock.now += 0.02
        assert (before, breaker.allows) == (False, True)


def test_a_success_closes_it_and_forgets() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, cooldown_s=1.0)
    breaker.failed()
    breaker.failed()
    breaker.succeeded()
    assert breaker.allows
    breaker.failed()
    clock.now += 1.01
    assert breaker.allows


def test_calls_that_left_together_fail_as_one() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, cooldown_s=1.0)
    for _ in range(5):
        breaker.failed()
    allowed = []
    for waited in (1.01, 1.01, 1.0):
        clock.now += waited
        allowed.append(breaker.allows)
        if len(allowed) == 1:
            breaker.failed()  # the second time it is patient for twice as long
    assert allowed == [True, False, True]
