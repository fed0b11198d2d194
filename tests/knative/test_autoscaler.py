"""The autoscaler against scenarios from Knative's rules, and properties of any load."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler import Autoscaler
from knative.policy import ScalingPolicy


class Cluster:
    """A clock, an autoscaler on it, and replicas that are ready one tick after they are asked."""

    def __init__(
        self, policy: ScalingPolicy, *, concurrency_limit: int = 0, grace_s: float = 30.0
    ) -> None:
        self.now = 0.0
        self.ready = 0
        self.desired = 0
        self.autoscaler = Autoscaler(
            policy,
            container_concurrency=concurrency_limit,
            clock=lambda: self.now,
            grace_s=grace_s,
        )

    def run(self, seconds: int, load: Callable[[float], float] | float = 0.0) -> list[int]:
        """Sample each second, tick every two; returns the desired scale at each tick."""
        history = []
        for _ in range(seconds):
            self.now += 1
            level = load(self.now) if callable(load) else load
            self.autoscaler.record(level)
            if level and not self.ready and not self.desired:
                self.desired = self.autoscaler.activate()
            if self.now % 2 == 0:
                starting = max(0, self.desired - self.ready)
                self.desired = self.autoscaler.decide(ready=self.ready, starting=starting).desired
                self.ready = self.desired
                history.append(self.desired)
        return history


def test_initial_scale_zero_starts_nothing_and_one_starts_one() -> None:
    assert Cluster(ScalingPolicy(initial_scale=0)).run(10) == [0] * 5
    cluster = Cluster(ScalingPolicy(initial_scale=3))
    assert cluster.run(2) == [3]


def test_the_stable_mean_over_the_target_decides() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, target=10))
    assert cluster.run(120, 34.0)[-1] == 5  # 34 over 70 % of 10


def test_it_sleeps_after_a_silent_window_and_the_grace() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, window_s=60), grace_s=30)
    cluster.run(10, 1.0)
    history = cluster.run(120)
    # The window forgets the last request at 60 s, and the grace runs from then.
    assert history.index(0) * 2 in range(88, 93)


def test_retention_longer_than_the_grace_governs() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, window_s=60, retention_s=120), grace_s=30)
    cluster.run(10, 1.0)
    history = cluster.run(240)
    assert history.index(0) * 2 in range(178, 183)


def test_a_replica_that_was_never_called_stays_one_window() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=1, window_s=60), grace_s=0)
    history = cluster.run(80)
    assert history.index(0) * 2 in range(60, 66)


def test_a_call_during_the_grace_starts_it_over() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, window_s=60), grace_s=30)
    cluster.run(10, 1.0)
    assert 0 not in cluster.run(80)
    assert 0 not in cluster.run(2, 1.0)
    assert 0 not in cluster.run(88)
    assert cluster.run(6)[-1] == 0


def test_min_scale_never_sleeps() -> None:
    assert set(Cluster(ScalingPolicy(min_scale=2)).run(300)) == {2}


def test_a_surge_panics_and_holds_until_a_window_after_it() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=1, target=10, window_s=60))
    cluster.run(60, 5.0)
    surge = cluster.run(10, 200.0)
    # A six-second mean sees it long before the sixty-second mean does.
    assert surge[1] >= 15
    peak = max(surge)
    # Panic began within the first four seconds of the surge, and lasts a window from its last.
    assert set(cluster.run(50, 5.0)) == {peak}
    assert cluster.run(60, 5.0)[-1] < peak


def test_scaling_down_halves_at_most_each_tick() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=16, target=1))
    cluster.run(2)
    assert cluster.ready == 16
    assert cluster.run(6) == [8, 4, 2]


def test_scale_down_delay_holds_the_highest_count() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=4, target=1, scale_down_delay_s=20))
    cluster.run(2)
    assert cluster.autoscaler.decide(ready=4, starting=0).desired <= 4
    history = Cluster(ScalingPolicy(initial_scale=0, target=10, scale_down_delay_s=20, window_s=6))
    history.run(20, 60.0)
    peak = history.desired
    # The mean falls within 6 s; the count stays until the delay after it, and panic, are over.
    assert history.run(18)[-1] == peak
    assert history.run(40)[-1] < peak


def test_activation_scale_starts_several_at_once() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, activation_scale=3))
    assert cluster.autoscaler.activate() == 3
    cluster = Cluster(ScalingPolicy(initial_scale=0, activation_scale=3, max_scale=2))
    assert cluster.autoscaler.activate() == 2


def test_a_start_longer_than_the_window_is_not_cut_short() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, window_s=6))
    cluster.autoscaler.activate()
    for _ in range(100):
        cluster.now += 2
        cluster.autoscaler.record(0.0)
        assert cluster.autoscaler.decide(ready=0, starting=1).desired == 1


loads = st.lists(st.floats(0, 500), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    load=loads,
    least=st.integers(0, 3),
    more=st.integers(0, 5),
    target=st.floats(0.5, 50),
)
def test_any_load_stays_within_the_bounds(
    load: list[float], least: int, more: int, target: float
) -> None:
    policy = ScalingPolicy(
        min_scale=least, max_scale=least + more, initial_scale=least, target=target
    )
    cluster = Cluster(policy)
    history = cluster.run(len(load) * 4, lambda now: load[int(now) % len(load)])
    most = (least + more) or None
    assert all(count >= least for count in history)
    assert most is None or all(count <= most for count in history)


@settings(max_examples=60, deadline=None)
@given(level=st.floats(0.1, 500), target=st.floats(0.5, 50))
def test_a_steady_load_ends_with_enough_replicas_and_no_more(level: float, target: float) -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, target=target))
    count = cluster.run(400, level)[-1]
    assert count * target * 0.7 >= level * (1 - 1e-9)
    assert (count - 1) * target * 0.7 < level * (1 + 1e-9) or count == 1


@settings(max_examples=40, deadline=None)
@given(load=loads)
def test_silence_always_ends_at_zero_and_traffic_never_does(load: list[float]) -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, target=10))
    busy = [max(0.01, level) for level in load]
    assert 0 not in cluster.run(len(busy) * 2, lambda now: busy[int(now) % len(busy)])
    assert cluster.run(400)[-1] == 0


def test_what_is_asked_for_is_kept_within_bounds_until_it_ends() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, max_scale=2, window_s=6), grace_s=0)
    cluster.autoscaler.ask(3, 10)
    assert cluster.run(10)[:4] == [2] * 4
    assert cluster.run(20)[-1] == 0


def test_a_function_let_go_sleeps_before_its_window_ends_and_a_call_keeps_it() -> None:
    cluster = Cluster(ScalingPolicy(initial_scale=0, window_s=60), grace_s=0)
    assert cluster.run(4, load=1)[-1] == 1
    cluster.autoscaler.ask(0, 10)
    assert cluster.run(2) == [0]
    assert cluster.run(4, load=1)[-1] == 1
    cluster.autoscaler.ask(0, 10)
    assert cluster.run(4, load=1) == [1, 1]
