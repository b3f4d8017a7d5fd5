"""Searches: what words leave open, what is refused before the first trial, what is pruned, and real trials that a second start goes on with."""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from launcher.__main__ import main
from launcher.search import Asked, Checked, Curve, Study, cards_of, check, exit_code, share_of, table
from launcher.space import space_of
from launcher.sweep import Outcome, Stop
from tests.conftest import ROOT, environment
from tunesmith.compare import find_runs, glance
from tunesmith.compose import choices
from tunesmith.config import Refusal
from tunesmith.hardware import Machine

SMALL = Machine(kind="cpu", cores=2, ram_gib=16.0)
LR = "optim.lr=tag(log,interval(1e-5,1e-2))"


# --- words, checks -------------------------------------------------------------------------------------------------


def test_words_mean_what_they_mean_to_hydra() -> None:
    space = space_of(["+exp=lora_cpu", LR, "method.r=range(8,33,8)", "method.alpha=interval(1,64)", "train.seed=1", "method=glob(lora*)"])
    assert space.ranges == {
        "optim.lr": FloatDistribution(1e-5, 1e-2, log=True),
        "method.r": IntDistribution(8, 32, step=8),
        "method.alpha": FloatDistribution(1, 64),
        "method": CategoricalDistribution([one for one in choices("method") if one.startswith("lora")]),
    }
    point = {"optim.lr": 0.000123456, "method.r": 16, "method.alpha": 63.99999, "method": "lora"}
    assert space.at(point) == ["+exp=lora_cpu", "optim.lr=0.0001235", "method.r=16", "method.alpha=64.0", "train.seed=1", "method=lora"]
    assert space.changed(point) == ["optim.lr=0.0001235", "method.r=16", "method.alpha=64.0", "method=lora"]
    assert space.size == math.inf
    assert space_of(["method.r=interval(3.5,9)"]).ranges == {"method.r": IntDistribution(4, 9)}, "a whole number, as the setting is one"
    assert space_of(["optim.lr=1e-4,2e-4", "method.r=4,8,16", "+optim.beta1=range(0.8,0.95,0.05)"]).size == 2 * 3 * 3
    assert space_of(["train.micro_batch=range(1,5)"]).size == 4, "beside auto it is a number"


def test_corners_are_all_combinations_of_ends_or_each_end_by_itself() -> None:
    assert space_of([LR, "method.r=8,16,32"]).corners() == [{"optim.lr": lr, "method.r": r} for lr in (1e-5, 1e-2) for r in ("8", "16", "32")]
    keys = [f"optim.{name}" for name in ("lr", "beta1", "beta2", "eps", "clip")]
    corners = space_of([f"{key}=interval(0,1)" for key in keys]).corners()
    assert len(corners) == 1 + len(keys) + 1
    assert [sum(corner.values()) for corner in corners] == [0, *[1] * len(keys), len(keys)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+exp=lora_cpu"], r"nothing is left open — type values or an interval"),
        (["optim.lr=interval(1e-3,1e-5)"], r"override optim\.lr=interval.* has no two values"),
        (["optim.lr=tag(log,interval(0,1))"], r"a logarithmic scale begins above 0"),
        (["method.r=tag(log,range(8,33,8))"], r"no steps of 8 — type tag\(log,interval\(8,32\)\)"),
        (["method.r=tag(big,interval(8,32))"], r"knows the tag log"),
        (["data.train=interval(1,2)"], r"data\.train is not a number — type its values"),
        (["method=glob(zzz*)"], r"a choice of nothing \(options: full, "),
        (["optim.lr=1e-4,2e-4,"], r"override optim\.lr=1e-4,2e-4,: "),
    ],
)
def test_words_that_are_no_space(words: list[str], says: str) -> None:
    with pytest.raises(Refusal, match=says):
        space_of(words)


def checked(overrides: Sequence[str], *words: str, trials: int = 6, **asked: Any) -> Checked:
    return check([*overrides, "train.eval_every=1", *words], Asked(trials, **asked), SMALL, 1)


def test_what_is_wrong_at_a_corner_is_said_before_the_first_trial(overrides: list[str], tmp_path: Path) -> None:
    def problems(*words: str, **asked: Any) -> list[str]:
        with pytest.raises(Refusal) as refusal:
            checked(overrides, *words, **asked)
        return str(refusal.value).splitlines()

    (found,) = problems("optim.lr=interval(-1,1)", "method.r=4,8")
    assert found.startswith("at optim.lr=-1.0 method.r=4 and at 1 more corner: optim.lr=-1.0: must be above 0")
    found, _ = problems(LR, "optim.lrr=1,2")  # a line a word
    assert "optim.lrr: no such key — did you mean optim.lr?" in found
    (found,) = problems(LR, "data.train=absent.json")
    assert "absent.json: no such file" in found
    assert problems(LR, "data.dev=") == ["data.dev: empty, and a search goes by the held-out loss — type data.dev= a file of held-out conversations"]
    (found,) = problems(LR, "train.eval_every=7")
    assert found.startswith("train.eval_every=7 of 7 steps: no held-out loss on the way to prune by — type train.eval_every=1, or --no-prune")
    assert checked(overrides, LR, "train.eval_every=0", prune=False).corners
    assert "optim.lr" not in (found := problems(LR, "train.save_every=interval(1,9)")[0])
    assert found.startswith("train.save_every: its values change nothing of the result")
    assert problems(LR, "data.dev=dev.json,test.json".replace(",", "\\,"), "data.max_tokens=100,200")[0].startswith("the trials differ in model, template")
    assert problems("method.r=2,4,8", trials=3) == ["--search 3: these words are 3 runs in all — leave --search out, and each is run"]
    assert not (tmp_path / "outputs").exists()


def test_a_search_is_found_again_by_what_it_is(overrides: list[str]) -> None:
    folder = checked(overrides, LR).folder
    assert folder.parent.name == "tiny" and folder.name.startswith("search-")
    same = [checked(overrides, LR, trials=40), checked(overrides, LR, "tracker=wandb", parallel=2), checked(overrides, LR, prune=False)]
    other = [checked(overrides, LR, seed=1), checked(overrides, LR, "train.seed=1"), checked(overrides, LR.replace("1e-2", "1e-3"))]
    assert {one.folder for one in same} == {folder}
    assert len({folder, *(one.folder for one in other)}) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--search", "4", "--slurm"], "--slurm --search: a search decides after each trial"),
        (["--search", "4", "nodes=2"], "--search: trials run on this machine"),
        (["--search", "0"], "--search and --parallel are at least 1"),
        (["--parallel", "2"], "--parallel, --seed and --no-prune belong to --search"),
    ],
)
def test_what_the_launcher_refuses(words: list[str], says: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(refusal: Refusal) -> None:
        raise refusal

    monkeypatch.setattr("launcher.__main__.refuse", refused)
    with pytest.raises(Refusal, match=says):
        main([*overrides, LR, *words])


def test_without_optuna_the_launcher_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.__main__ import search

    for name in ("launcher.search", "launcher.space"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Refusal, match=r"needs the package optuna — pip install 'tunesmith\[sweep\]'"):
        search(argparse.Namespace(), [])


def test_trials_side_by_side_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    four = Machine(kind="cuda", device_names=("NVIDIA A10",) * 4, memory_gib=(22.0,) * 4, cores=16, ram_gib=64.0)
    share = share_of(four, 2)
    assert (len(share.device_names), len(share.memory_gib), share.cores, share.ram_gib) == (2, 2, 8, 32.0)
    with pytest.raises(Refusal, match="this machine has 4 cards, a trial needs one — type --parallel 4"):
        share_of(four, 5)
    assert share_of(SMALL, 2).cores == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [cards_of(slot, 2) for slot in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert cards_of(1, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"} and cards_of(1, 0) == {}


# --- proposals and pruning, by Optuna itself -----------------------------------------------------------------------

SPACE = [LR, "method.r=4,8,16"]


def ending(changed: Sequence[str]) -> Outcome:
    """How a trial would end: a valley at lr=1e-3, r=8; failures to the right of it."""
    lr, r = (float(word.split("=")[1]) for word in changed)
    return Outcome("nan", "loss nan") if lr > 5e-3 else Outcome("completed", "", abs(math.log10(lr) + 3) + abs(r - 8) / 8)


def go_on(study: Study, trials: int, ending: Callable[[Sequence[str]], Outcome] = ending) -> None:
    for _ in range(trials):
        if (trial := study.propose()) is not None:
            study.tell(trial, ending(study.space.changed(trial.params)))


def test_a_search_that_is_interrupted_proposes_what_one_that_is_not_does(tmp_path: Path) -> None:
    space, asked = space_of(SPACE), Asked(14)
    whole = Study(tmp_path, space, asked)
    go_on(whole, 14)
    (tmp_path / "pieces").mkdir()
    for _ in range(7):
        pieces = Study(tmp_path / "pieces", space, asked)
        go_on(pieces, 2)
        with (tmp_path / "pieces" / "journal.log").open("a") as journal:
            journal.write('{"op_code":5,"worker_id"')  # a kill in the middle of a line
    again = Study(tmp_path / "pieces", space, asked)
    assert list(whole.tried.items()) == list(pieces.tried.items()) == list(again.tried.items())
    assert again.propose() is None and len(again.tried) == 14
    best = min(one.loss for one in again.tried.values() if one and one.loss is not None)
    assert best < 0.5 and {one.state for one in again.tried.values() if one} == {"completed", "nan"}


def test_no_run_is_tried_twice(tmp_path: Path) -> None:
    study = Study(tmp_path, space_of(["method.r=2,4,8,16", "train.seed=1,2"]), Asked(7))
    go_on(study, 9, lambda changed: Outcome("completed", "", 1.0 + (changed[0] != "method.r=4")))
    assert len(study.tried) == 7 and study.propose() is None


def test_what_was_stopped_goes_on_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    ends = iter(["completed", "failed", "nan", "stopped", "completed"])
    go_on(Study(tmp_path, space_of(SPACE), Asked(5)), 4, lambda _: Outcome(state := next(ends), "", 1.0 if state == "completed" else None))
    study = Study(tmp_path, space_of(SPACE), Asked(5))
    first = list(study.tried)
    assert [one and one.state for one in study.tried.values()] == ["completed", None, "nan", None]
    proposed = [study.propose() for _ in range(4)]
    words = [tuple(study.space.changed(trial.params)) for trial in proposed if trial]
    assert words[:2] == [first[1], first[3]] and words[2] not in first and proposed[3] is None
    for trial in proposed[:3]:
        assert trial is not None
        study.tell(trial, Outcome("completed", "", 0.5))
    assert [one and one.state for one in Study(tmp_path, space_of(SPACE), Asked(5)).tried.values()] == ["completed"] * 2 + ["nan"] + ["completed"] * 2


def write_curve(run: Path, losses: Sequence[float], steps: int, torn: bool = False) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": "running", "steps": steps}))
    lines = "".join(json.dumps({"step": step, "train/loss": 9.0, "dev/loss": loss}) + "\n" for step, loss in enumerate(losses, start=1))
    (run / "metrics.jsonl").write_text(lines + '{"step": 99, "dev/l' * torn)


def test_what_falls_behind_is_pruned_at_the_rungs_and_nowhere_else(tmp_path: Path) -> None:
    """27 steps: rungs after 3 and 9 of them, and one of three goes on at each."""
    study = Study(tmp_path, space_of(SPACE), Asked(20))

    def pruned_at(offset: float, steps: int = 27, prune: bool = True) -> int:
        """The step whose loss ends the trial; 0: none does."""
        trial = study.propose()
        assert trial is not None
        run = tmp_path / f"run{trial.number}"
        curve, losses = Curve(run, trial, prune), [5 + offset - 2 * step / steps for step in range(1, steps + 1)]
        for done in range(1, steps + 1):
            write_curve(run, losses[:done], steps, torn=done % 2 == 0)
            if why := curve.look():
                assert why == f"step {done} of {steps}: dev/loss {losses[done - 1]:.4f} is not in the best third"
                assert curve.look() == why
                study.tell(trial, Outcome("pruned", why, losses[done - 1]))
                return done
        study.tell(trial, Outcome("completed", "", losses[-1]))
        return 0

    assert pruned_at(0.0) == 0, "the first has nobody to fall behind"
    assert pruned_at(0.5) == 3
    assert pruned_at(0.5, prune=False) == 0
    assert pruned_at(-0.1) == 0, "the best so far"
    assert pruned_at(-0.05, steps=54) == 6, "second of four, and a rung lies where a share of the run does"
    assert pruned_at(-0.06) == 3, "second of five"
    assert pruned_at(-0.08) == 9, "second of six goes on, to be second of three at the next rung"


def test_the_table_has_the_best_first_and_what_to_type(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    search = checked(overrides, LR, "method.r=2,4", trials=4)
    tried = {
        ("optim.lr=0.001", "method.r=2"): Outcome("pruned", "step 3 of 7: ...", 0.9),
        ("optim.lr=0.002", "method.r=4"): Outcome("completed", "", 1.2),
        ("optim.lr=0.01", "method.r=4"): Outcome("oom", "rank 0 ran out of memory"),
        ("optim.lr=0.003", "method.r=2"): Outcome("completed", "", 1.1),
    }
    text = table(search, tried)
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["4", "2", "1", "3"]
    assert "best     trial 4 with dev/loss 1.1000: optim.lr=0.003 method.r=2" in text
    assert re.search(r"type     python -m launcher name=tiny .* optim\.lr=0\.003 method\.r=2 train\.seed=1,2,3 ", text)
    assert f"tunesmith compare {search.folder} --html" in text
    assert "trial 3: oom, rank 0 ran out of memory" in text
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = Stop()
    assert exit_code(list(tried.values()), 4, stop) == 1
    answers = [Outcome("completed", "", 1.0), Outcome("pruned"), Outcome("nan")]
    assert exit_code(answers, 3, stop) == 0
    assert exit_code(answers[1:], 2, stop) == 1, "nothing was found"
    stop.times = 1
    assert exit_code(answers, 3, stop) == 0, "it came too late"
    assert exit_code(answers, 4, stop) == exit_code([*answers, Outcome("stopped")], 4, stop) == 75


# --- real ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_search_that_is_stopped_goes_on_prunes_what_falls_behind_and_runs_nothing_twice(overrides: list[str], tmp_path: Path) -> None:
    """Three trials, in the order that this seed gives: a good one, one that diverges at once, one that learns nothing. SIGTERM comes with the second."""
    words = [
        *overrides, "engine=accelerate", "eval.before=false", "eval.after=false", "train.steps=180", "train.eval_every=20", "optim.warmup_steps=0",
        "optim.lr=choice(1e-8,1e-2,1e30)", "method.r=2,4", "--search", "3", "--seed", "26", "--via", "python",
    ]  # fmt: skip
    full = [sys.executable, "-m", "launcher", *words]
    said = ""
    with subprocess.Popen(full, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as first:
        assert first.stdout is not None
        for line in first.stdout:
            said += line
            if line.startswith("trial 2 of 3: optim.lr"):
                first.send_signal(signal.SIGTERM)
    assert first.returncode == 75, said
    assert "trial 1 of 3: completed, dev/loss" in said and "the same command goes on" in said
    results = {path: path.read_bytes() for path in tmp_path.glob("outputs/*/*/adapter/*.safetensors")}
    assert len(results) == 1
    second = subprocess.run([*full, "--parallel", "2"], cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=120)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "trial 1 of 3: " not in second.stdout, "what has ended is not run again"
    assert re.search(r"trial \d of 3: nan, FloatingPointError: step 2: loss nan", second.stdout), second.stdout
    assert re.search(r"trial \d of 3: pruned, dev/loss [\d.]+, step \d+ of 180: dev/loss [\d.]+ is not in the best third", second.stdout), second.stdout
    (folder,) = tmp_path.glob("outputs/tiny/search-*")
    runs = find_runs([str(folder)])
    assert sorted(glance(run).state for run in runs) == ["completed", "nan", "stopped"]
    (note,) = [glance(run).note for run in runs if glance(run).state == "stopped"]
    assert note.startswith("pruned: step ")
    assert {path.resolve() for path in find_runs([str(tmp_path / "outputs")])} == {path.resolve() for path in runs}, "each once"
    third = subprocess.run(full, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=60)
    assert third.returncode == 0 and "train.py" not in third.stdout, "nothing is left to start"
    assert third.stdout.endswith(second.stdout[second.stdout.rindex("trial  ") :]), "the same table"
    assert "best     trial 1 with" in third.stdout
    assert results == {path: path.read_bytes() for path in results}
