"""Early stopping: all ranks at the same step, the best weights are the result, resumed with the count, and it is said why."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest

from tests.conftest import Finished, launch
from tests.test_plan import HERE, config_of
from tests.test_resume import trained, with_fault
from tunesmith.checkpoint import Best
from tunesmith.plan import problems, run_id

# A rate that grows to 20 helps for a few steps and then spoils the adapter.
QUIET = ["eval.before=false", "eval.conversations=1"]
WORDS = [*QUIET, "train.steps=12", "optim.warmup_steps=8", "optim.schedule=constant", "optim.lr=20", "train.eval_every=1"]


def test_the_lowest_is_noted() -> None:
    best = Best()
    seen = [best.see(step, loss) for step, loss in enumerate([math.nan, 3.0, 2.0, 2.0, math.nan, math.inf, 1.5], start=1)]
    assert seen == [False, True, True, False, False, False, True]
    assert best == Best(step=7, loss=1.5, waited=0)
    best.see(8, 1.6)
    assert best == Best(step=7, loss=1.5, waited=1)


def test_what_cannot_wait_is_refused() -> None:
    (line,) = problems(config_of(train__patience=2), HERE, 1)
    assert line.startswith("train.patience=2: there is no held-out loss to wait for — type data.dev=")
    (line,) = problems(config_of(train__patience=2, data__dev="dev.json", train__eval_every=0), HERE, 1)
    assert line.endswith("type train.eval_every=50")
    assert not problems(config_of(train__patience=2, data__dev="dev.json"), HERE, 1)


def test_with_patience_the_steps_between_evaluations_change_the_run() -> None:
    assert run_id(config_of(train__eval_every=5)) == run_id(config_of())
    assert run_id(config_of(train__patience=2, train__eval_every=5)) != run_id(config_of(train__patience=2))


def dev_losses(done: Finished) -> dict[int, float]:
    return {int(row["step"]): row["dev/loss"] for row in done.metrics}


@pytest.mark.launch
@pytest.mark.parametrize(
    ("launcher", "ranks", "words"),
    [("plain", 2, ["engine=deepspeed", "engine.zero=2"])],
    ids=["ZeRO-2"],
)
def test_ends_early_with_the_best_and_resumes(launcher: str, ranks: int, words: list[str], overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *WORDS, *words, "train.patience=3", "train.keep=1"]
    whole = launch(launcher, [*words, f"outputs={tmp_path / 'whole'}"], ranks)
    whole.outputs = tmp_path / "whole"
    assert whole.code == 0, whole.output
    losses = dev_losses(whole)
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 3 < 12, losses
    status = json.loads((whole.run / "status.json").read_text())
    said = f"step {last} of 12: no lower held-out loss in 3 evaluations; step {best} with dev/loss {losses[best]:.4f} is the result"
    assert (status["step"], status["ended"]) == (last, said)
    assert whole.output.count(f"ended    {said}") == 1
    assert f"ended at {said}" in (whole.run / "report.html").read_text()
    after = json.loads((whole.run / "evaluation.json").read_text())["after"]
    assert after["dev/loss"] == pytest.approx(losses[best], rel=1e-6), "the weights at the end are not the best ones"
    assert sorted(path.name for path in (whole.run / "checkpoints").iterdir()) == [f"step-{step:06d}" for step in (best, last)]

    stopped, _ = with_fault(words, launcher, ranks, f"1:{best + 1}:{int(signal.SIGTERM)}", tmp_path)  # two evaluations in the waiting
    assert f"after step {best + 2} of 12, saved" in stopped.output, stopped.output
    resumed = launch(launcher, words, ranks)
    assert resumed.code == 0, resumed.output
    assert dev_losses(resumed) == losses
    assert json.loads((resumed.run / "status.json").read_text())["ended"] == said
    assert trained(resumed) == trained(whole)


@pytest.mark.launch
def test_the_best_is_the_result_of_a_run_that_goes_to_its_end(overrides: list[str]) -> None:
    done = launch("python", [*overrides, *WORDS, "engine=accelerate", "train.steps=9", "train.patience=50"])
    assert done.code == 0, done.output
    losses = dev_losses(done)
    best = min(losses, key=lambda step: losses[step])
    assert best < 9
    assert f"ended    all 9 steps are done; step {best} with dev/loss" in done.output
    after = json.loads((done.run / "evaluation.json").read_text())["after"]
    assert after["dev/loss"] == pytest.approx(losses[best], rel=1e-6)
