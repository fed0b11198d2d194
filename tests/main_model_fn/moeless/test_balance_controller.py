"""The policies on a real model: experts move in and out, functions are asked for, answers stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from main_model_fn.live_partition import LivePartition
from main_model_fn.moeless.balance_controller import BalanceController
from main_model_fn.moeless.load_book import LoadBook
from main_model_fn.moeless.runtime_control import RuntimeControl
from remoe.checkpoint import Checkpoint
from remoe.moeless.function_balance import BalanceRules, FunctionShare, Policy
from tests.main_model_fn.test_live_partition import deployment_of, layers_of
from tests.tiny_model import EXPERTS, LAYERS, InProcessTransport, new_meter, split

REMOTE = ((2, 3),) * LAYERS
PROFILE = [[0.25] * EXPERTS] * LAYERS


class Wishes(RuntimeControl):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__({}, None)
        self.asked: list[tuple[str, int]] = []

    def scale(self, name: str, replicas: int, *, for_s: float) -> None:
        self.asked.append((name, replicas))


class Platform:
    """A split model, and a controller whose turns and clock are the test's."""

    def __init__(self, model_dir: Path, policy: Policy, rules: BalanceRules) -> None:
        self.now = 0.0
        self.meter = new_meter()
        checkpoint = Checkpoint.open(model_dir)
        self.model = split(model_dir, REMOTE, InProcessTransport(model_dir), self.meter)
        self.live = LivePartition(
            self.model, checkpoint, deployment_of(checkpoint, REMOTE), self.meter
        )
        self.book = LoadBook(LAYERS, EXPERTS)
        self.wishes = Wishes()
        self.controller = BalanceController(
            self.live,
            self.book,
            policy=policy,
            functions=[FunctionShare("all", 0, LAYERS - 1, 0.2)],
            rules=rules,
            runtime=self.wishes,
            clock=lambda: self.now,
        )

    def steps(self, loads: list[float], count: int = 4) -> None:
        for _ in range(count):
            for layer in range(LAYERS):
                self.book.record(layer, np.array(loads))

    @property
    def resident(self) -> list[int]:
        return [len(layer.local.residents.experts) for layer in layers_of(self.model)]


@pytest.fixture
def platform(tiny_model_dir: Path) -> Callable[..., Platform]:
    def make(policy: Policy, **rules: float) -> Platform:
        settings = {"expert_gb": 0.01, "room_gb": 1.0, **rules}
        return Platform(tiny_model_dir, policy, BalanceRules(**settings))  # type: ignore[arg-type]

    return make


def test_load_moves_experts_in_and_silence_moves_them_out(
    platform: Callable[..., Platform],
) -> None:
    here = platform("moeless")
    tokens = torch.tensor([[5, 9, 3, 7]])
    with torch.inference_mode():
        before = here.model(tokens).logits
    here.controller.opened("a", None, 2)
    here.controller.decide()
    assert here.resident == [2] * LAYERS  # nothing was seen yet
    here.steps([1, 1, 1, 1])
    here.controller.decide()
    assert here.resident == [EXPERTS] * LAYERS
    assert here.meter.main_memory_gb == pytest.approx(1.5 + 2 * LAYERS * 0.01)
    assert here.wishes.asked == [("all", 0)]
    with torch.inference_mode():
        after = here.model(tokens).logits
    assert torch.allclose(before, after, atol=1e-5)
    report = here.controller.report()
    assert report is not None
    assert (report.attached, report.replicas) == (2 * LAYERS, {"all": 0})
    here.controller.closed("a")
    here.now = 59.0
    here.controller.decide()
    assert here.resident == [EXPERTS] * LAYERS
    here.now = 60.0
    here.controller.decide()
    assert here.resident == [2] * LAYERS
    assert here.meter.main_memory_gb == 1.5


def test_in_joint_mode_a_prompt_moves_them_in_before_its_first_step(
    platform: Callable[..., Platform],
) -> None:
    for policy, resident in (("moeless", 2), ("joint", EXPERTS)):
        here = platform(policy)
        here.controller.opened("a", PROFILE, 2)
        here.controller.decide()
        assert here.resident == [resident] * LAYERS


def test_nothing_is_moved_while_the_planner_would_serve_all_as_planned(
    platform: Callable[..., Platform],
) -> None:
    here = platform("joint")
    here.controller.opened("a", PROFILE, 2, policy="remoe")
    here.steps([1, 1, 1, 1])
    here.controller.decide()
    assert (here.resident, here.wishes.asked) == ([2] * LAYERS, [])
    report = here.controller.report()
    assert report is not None  # loads are told all the same
    assert (report.attached, report.replicas, report.layer_cv) == (0, {}, [0.0] * LAYERS)
    here.controller.opened("b", PROFILE, 2, policy="joint")
    here.controller.decide()
    assert here.resident == [EXPERTS] * LAYERS
    here.controller.closed("b")
    here.controller.decide()
    assert here.resident == [EXPERTS] * LAYERS  # warm, and moving them out again would cost
    here.controller.closed("a")
    here.now = 60.0
    here.controller.decide()
    assert here.resident == [2] * LAYERS


def test_what_comes_in_flight_corrects_what_the_prompt_foretold(
    platform: Callable[..., Platform],
) -> None:
    here = platform("joint", room_gb=0)
    here.controller.opened("a", PROFILE, 2)
    here.controller.decide()
    assert here.wishes.asked == [("all", 1)]
    here.steps([1, 1, 0, 0])
    here.controller.decide()
    assert here.wishes.asked == [("all", 1), ("all", 0)]


def test_a_wish_for_replicas_is_renewed_while_it_stands(
    platform: Callable[..., Platform],
) -> None:
    here = platform("moeless", room_gb=0, most_replicas=2)
    here.controller.opened("a", None, 2)
    here.steps([1, 1, 20, 1])
    for here.now in (0.0, 1.0, 9.0, 10.0):
        here.controller.decide()
    assert here.wishes.asked == [("all", 2)] * 2
    assert here.resident == [2] * LAYERS


def test_a_new_plan_becomes_the_base(platform: Callable[..., Platform]) -> None:
    here = platform("moeless")
    here.controller.opened("a", None, 2)
    here.steps([1, 1, 1, 1])
    here.controller.decide()
    planned = deployment_of(
        Checkpoint.open(here.live._checkpoint.model_dir), ((3,),) * LAYERS, "plan-next"
    )
    here.live.change(msgspec.structs.replace(planned, main_memory_gb=1.8))
    here.controller.decide()
    assert here.resident == [EXPERTS] * LAYERS
    assert here.meter.main_memory_gb == pytest.approx(1.8 + LAYERS * 0.01)
    assert here.live.deployment.plan_id == "plan-next"
