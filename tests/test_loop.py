"""The rate of each step."""

from __future__ import annotations

import pytest

from tunesmith.config import Optim, Schedule
from tunesmith.loop import learning_rate


def rates(steps: int, **words: object) -> list[float]:
    optim = Optim(**{"lr": 1.0, "warmup_steps": 4, **words})  # type: ignore[arg-type]
    return [learning_rate(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", Schedule)
def test_every_schedule_warms_up_and_keeps_to_its_bounds(schedule: Schedule) -> None:
    found = rates(40, schedule=schedule, min_lr_ratio=0.1)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(0.1 <= rate <= 1 for rate in found[4:])
    assert found[4:] == sorted(found[4:], reverse=True)


def test_wsd_is_constant_and_then_falls_in_a_line() -> None:
    found = rates(100, schedule=Schedule.wsd, decay_share=0.2)
    assert found[4:81] == [1.0] * 77
    assert found[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert rates(100, schedule=Schedule.wsd, decay_share=0.2, min_lr_ratio=0.5)[90] == pytest.approx(0.75)


def test_wsd_at_its_edges() -> None:
    assert rates(50, schedule=Schedule.wsd, decay_share=0.0)[4:] == [1.0] * 46
    assert rates(50, schedule=Schedule.wsd, decay_share=1.0)[4:] == pytest.approx([(50 - step) / 50 for step in range(4, 50)])
