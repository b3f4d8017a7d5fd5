"""Runs side by side: what is found, what is judged and on which evidence, and the page in a real browser."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.browser import CHROMIUM, Browser
from tests.conftest import ROOT, environment, launch
from tests.wandb_server import WandbServer
from tunesmith import cli
from tunesmith.compare import Run, compare, difference, find_runs, glance
from tunesmith.compare.noise import judge_settings
from tunesmith.compare.table import _explained, _influence, measure, pareto, ranks
from tunesmith.config import Refusal
from tunesmith.metrics.totals import totals
from tunesmith.metrics.uncertainty import between, f1_interval, spread, student, wilson
from tunesmith.report.terminal import show_comparison

LRS = (1e-2, 1e-3)


def make_run(outputs: Path, lr: float, seed: int, loss: float, state: str = "completed", f1: float = 0.8, step_s: float = 1.0, **more: Any) -> Path:
    """A run folder as training leaves it: 20 steps of step_s seconds, with a held-out loss at the end."""
    run = outputs / "lights" / f"{round(lr * 1e4):04d}{seed:04d}"
    run.mkdir(parents=True)
    config = {
        "name": "lights", "outputs": "outputs", "model": {"path": "tiny"}, "data": {"train": "train.json"},
        "optim": {"lr": lr, **more.get("optim", {})}, "train": {"seed": seed}, "hardware": {"price_per_h": more.get("price", 0.5)},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "status.json").write_text(json.dumps({"state": state, "step": 20, "steps": 20, "data": more.get("data", "d0"), "updated": 1.7e9}))
    (run / "environment.json").write_text(json.dumps({"node": more.get("node", "n1"), "world_size": 2, "versions": {"torch": more.get("torch", "2.13")}}))
    (run / "plan.json").write_text(json.dumps({"card": "cpu", "micro_batch": 4}))
    rows = [
        {"step": step, "time": 1.7e9 + step, "train/loss": 3 / step + loss, "time/step_s": step_s, "data/computed_tokens": 100}
        | {"speed/computed_tokens_per_s": 100 / step_s, "speed/mfu": 0.4 / step_s, "memory/peak_gib": 2.0 + lr, "plan/peak_gib": 1.9}
        | ({"dev/loss": loss} if step in (10, 20) else {})
        for step in range(1, 21)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state == "completed":
        after = {"dev/loss": loss, "test/slot_f1": f1, "test/exact_match": 0.5, "conversations": 40, "intervals": {"test/slot_f1": [f1 - 0.1, f1 + 0.1]}}
        (run / "evaluation.json").write_text(json.dumps({"before": {}, "after": after}))
    return run


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Two settings with two seeds each: 0.50 and 0.52 against 0.90 and 0.93."""
    for lr, base in zip(LRS, (0.5, 0.9), strict=True):
        for seed in (0, 1):
            make_run(tmp_path / "outputs", lr, seed, base + seed * (0.02 if lr == 1e-2 else 0.03), step_s=2.0 if lr == 1e-2 else 1.0)
    return tmp_path / "outputs"


@pytest.fixture(autouse=True)
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(refusal: Refusal) -> None:
        raise refusal

    monkeypatch.setattr(cli, "refuse", refuse)


def runs_of(*words: object) -> list[Run]:
    return [Run(path) for path in find_runs(map(str, words))]


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_totals_by_hand() -> None:
    rows = [
        {"step": step, "time/step_s": 9.0 if step <= 4 else 2.0, "data/computed_tokens": 50, "speed/mfu": step / 100, "card/energy_kj": energy}
        for step, energy in ((2, 1.0), (4, 3.0), (6, 0.5), (8, 2.0))
    ]
    found = totals(rows, ranks=2, price_per_h=3.0)
    assert found["run/hours"] == pytest.approx((4 * 9 + 4 * 2) / 3600), "a line stands for the steps since the line before"
    assert found["run/cost"] == pytest.approx(found["run/hours"] * 6)
    assert found["run/tokens"] == 400
    assert found["run/mfu"] == pytest.approx(0.07), "the median without two lines of warm-up"
    assert found["run/energy_kj"] == 5.0, "3 before the restart and 2 after"
    assert totals([]) == {}


def test_intervals_are_those_of_the_books() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(1.0, 10)[1] == pytest.approx(1.0) and wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0)
    # Newcombe 1998, table II, (a): 56/70 - 48/80 is 0.0524 to 0.3339 by Wilson's intervals.
    assert between(56 / 70, wilson(56 / 70, 70), 48 / 80, wilson(48 / 80, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert (student(1), student(4), student(31)) == (12.706, 2.776, pytest.approx(1.96, abs=1e-3))
    assert spread([[1.0, 3.0], [5.0]]) == (pytest.approx(math.sqrt(2)), 1)
    assert spread([[1.0], [5.0]]) == (0.0, 0)


def test_f1_intervals_cover() -> None:
    """Of 60 test sets drawn from one population, about 95 % of the intervals hold its F1."""
    draws, held = random.Random(1), 0
    for _ in range(60):
        counts = [(found, 2, 2) for found in draws.choices([0, 1, 2], weights=[1, 2, 3], k=60)]
        low, high = f1_interval(counts)
        held += low <= (2 + 2 * 3) / 12 <= high
    assert held >= 52
    assert f1_interval([(2, 2, 2)] * 20) == pytest.approx(wilson(1.0, 20)), "no spread is no certainty"


def test_pareto_holds_what_nothing_beats() -> None:
    good, dear = measure("test/slot_f1"), measure("run/hours")
    draws = random.Random(0)
    quality = [draws.choice([None, *range(6)]) for _ in range(40)]
    effort = [draws.choice([None, *range(6)]) for _ in range(40)]
    best = pareto(quality, effort, good, dear)
    points = {place: (q, e) for place, (q, e) in enumerate(zip(quality, effort, strict=True)) if q is not None and e is not None}
    assert best
    for place, (q, e) in points.items():
        beaten = any(u >= q and v <= e and (u, v) != (q, e) for u, v in points.values())
        assert (place in best) != beaten


def test_influence_is_honest_about_few_runs() -> None:
    assert ranks([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
    columns = {"a": [1, 2, 3, 4], "b": ["w", "x", "y", "z"], "c": [1.0, 2.0, 3.0, 4.0]}
    results = ranks([0.1, 0.2, 0.3, 0.4])
    a, b = (_influence(key, columns[key], results, columns) for key in "ab")
    assert (a.share, a.p) == (pytest.approx(1.0), pytest.approx(2 / 24)), "the order and its reverse"
    assert (b.share, b.p) == (pytest.approx(1.0), 1.0), "words that differ in every run explain everything and nothing"
    assert a.with_keys == ["b", "c"]
    assert _explained([1, 1], [1, 2], True) == 0.0
    many = list(range(1, 13))
    assert _influence("k", many, [float(one) for one in many], {"k": many}).p < 0.01


# --- noise ---------------------------------------------------------------------------------------------------------


def test_seeds_decide_what_is_noise() -> None:
    clear = judge_settings([[0, 1], [2, 3]], [0.50, 0.52, 0.90, 0.93], [None] * 4, lower_is_better=True)
    assert [(one.runs, one.verdict) for one in clear] == [([0, 1], "best"), ([2, 3], "outside the noise")]
    # df 2: t 4.303, pooled deviation sqrt((0.0002 + 0.00045) / 2), sqrt(1/2 + 1/2) = 1
    assert clear[1].evidence == f"seeds: ±{4.303 * math.sqrt(0.00065 / 2):.3g}"
    close = judge_settings([[0, 1], [2, 3]], [0.50, 0.60, 0.55, 0.70], [None] * 4, lower_is_better=True)
    assert close[1].verdict == "inside the noise"
    alone = judge_settings([[0], [1], [2]], [0.5, 0.9, 0.5], [None] * 3, lower_is_better=False)
    assert [one.verdict for one in alone] == ["best", "no evidence", "no evidence"]


def test_questions_are_noise_too() -> None:
    intervals = [(0.7, 0.9), (0.6, 0.8)]
    (_, other) = judge_settings([[0], [1]], [0.8, 0.7], intervals, lower_is_better=False)
    assert other.verdict == "inside the noise" and other.evidence.startswith("questions: ")
    # Seeds far apart from each other, questions not: one kind of noise is enough to say so.
    (_, both) = judge_settings([[0, 1], [2, 3]], [0.80, 0.81, 0.75, 0.76], [(0.6, 0.95)] * 4, lower_is_better=False)
    assert both.verdict == "inside the noise"


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_comparison_of_two_settings_and_two_seeds(outputs: Path) -> None:
    found = compare(runs_of(outputs))
    assert found.keys == ["optim.lr", "train.seed"]
    assert (found.quality, found.against) == ("dev/loss", "run/cost")
    assert sorted(map(sorted, found.groups)) == [[0, 1], [2, 3]]
    names = [found.runs[place].config["optim.lr"] for place in found.best]
    assert sorted(names) == [1e-3, 1e-2], "the cheap one and the good one"
    assert [one.verdict for one in found.verdicts("dev/loss")] == ["best", "outside the noise"]
    assert [one.verdict for one in found.verdicts("test/slot_f1")] == ["best", "equal"]
    assert found.runs[0].results["run/cost"] == pytest.approx(20 * found.runs[0].rows[0]["time/step_s"] / 3600 * 2 * 0.5)
    assert found.runs[0].intervals["test/exact_match"] == wilson(0.5, 40), "of a version that wrote none"
    text = io.StringIO()
    show_comparison(found, text)
    assert "outside the noise" in text.getvalue() and "4 runs of 2 settings, 2 degrees of freedom, so margins are wide" in text.getvalue()


def test_what_must_be_known_is_said(outputs: Path, tmp_path: Path) -> None:
    make_run(outputs, 1e-4, 0, 0.4, state="oom")
    make_run(outputs, 5e-4, 0, 0.7, data="d1", torch="2.14", node="n2", price=0.0)
    found = compare(runs_of(outputs))
    told = "\n".join(found.notes)
    for part in ("1 of 6 runs are not complete", "(oom)", "different data", "versions differ: torch", "same machine", "no hardware.price_per_h"):
        assert part in told
    assert found.against == "run/hours", "not all have a price"
    unjudged = next(place for place, run in enumerate(found.runs) if run.state == "oom")
    assert unjudged not in found.best and all(unjudged not in one.runs for one in found.verdicts("dev/loss"))


def test_a_setting_that_an_older_version_lacks_is_no_difference(outputs: Path) -> None:
    make_run(outputs, 1e-2, 7, 0.51, optim={"schedule": "cosine", "momentum": 0.9})
    found = compare(runs_of(outputs))
    assert found.keys == ["optim.lr", "train.seed"]
    assert sorted(map(len, found.groups)) == [2, 3]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", "nowhere"], r"^nowhere: no such folder — name runs"),
        (["compare", "{0}/lights/01000000"], r"^1 run: nothing to compare it with"),
        (["compare", "{0}", "--quality", "dev/los"], r"^--quality dev/los: no run has it — one of dev/loss, "),
        (["compare", "{0}", "--html", "{0}/none/page.html"], r"there is no folder"),
        (["compare", "{0}", "--csv", "{0}/mine.csv"], r"mine.csv: exists, and is no comparison"),
        (["compare", "{0}/*/broken*", "{0}"], r"broken/config.yaml: cannot be read"),
        (["runs", "{0}/lights/01000000/empty"], r"no run in it"),
        (["diff", "{0}", "{0}"], r"not a run folder"),
    ],
)
def test_mistakes_are_one_line(outputs: Path, words: list[str], told: str) -> None:
    (outputs / "mine.csv").write_text("my,own\n")
    (outputs / "lights" / "01000000" / "empty").mkdir()
    if "broken" in str(words):
        (outputs / "lights" / "broken").mkdir()
        (outputs / "lights" / "broken" / "config.yaml").write_text("a: [")
    with pytest.raises(Refusal, match=told) as refused:
        cli.main([word.format(outputs) for word in words])
    assert "\n" not in str(refused.value)
    assert (outputs / "mine.csv").read_text() == "my,own\n"


def test_csv_has_a_row_a_run_and_is_written_anew(outputs: Path, tmp_path: Path) -> None:
    for _ in range(2):
        cli.main(["compare", str(outputs / "li*"), "--csv", str(tmp_path / "runs.csv"), "--quality", "test/slot_f1", "--against", "run/peak_gib"])
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["optim.lr"] for row in rows] == ["0.001", "0.001", "0.01", "0.01"]
    assert [row["pareto"] for row in rows] == ["True", "True", "False", "False"]
    assert (rows[0]["test/slot_f1 low"], rows[0]["against"]) == (str(0.8 - 0.1), "run/peak_gib")


def test_diff_says_what_differs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(outputs, 5e-4, 0, 0.7, data="d1", torch="2.14")
    cli.main(["diff", *(str(outputs / "lights" / name) for name in ("01000000", "00050000"))])
    told = " ".join(capsys.readouterr().out.split())
    assert "optim.lr 0.01 0.0005" in told
    assert "fingerprint d0 d1" in told and "versions.torch 2.13 2.14" in told
    assert "dev/loss 0.500 0.700 +0.2 worse; one run each: no evidence about noise" in told
    assert "run/hours 0.0111 0.00556 -0.00556 better" in told
    parts = [one.part for one in difference(Run(outputs / "lights/01000000"), Run(outputs / "lights/01000000"))]
    assert set(parts) == {"results"}, "a run differs from itself in nothing"


def test_states_and_a_process_that_is_gone(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    alive, gone, far = (make_run(outputs, lr, 3, 0.5, state="running", node=node) for lr, node in ((2e-4, here), (3e-4, here), (4e-4, "far")))
    old = time.time() - 3600
    for path in far.iterdir():
        os.utime(path, (old, old))
    (outputs / "lights" / "waits").mkdir()
    (outputs / "lights" / "waits" / "status.json").write_text(json.dumps({"state": "pending", "job": "17_3", "updated": 1.7e9}))
    make_run(outputs, 6e-4, 3, math.nan, state="never_heard_of")
    with (alive / "lock").open("wb") as lock:
        (gone / "lock").touch()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [glance(run).state for run in (alive, gone, far)] == ["running", "gone", "silent"]
        cli.main(["runs", str(outputs), "--json"])
    found = {one["run"].partition("/")[2]: one for one in json.loads(capsys.readouterr().out)}
    assert len(found) == 9
    assert found["waits"]["state"] == "pending" and found["waits"]["where"] == "job 17_3" and found["waits"]["steps"] == 0
    assert found["00060003"]["state"] == "never_heard_of" and found["00060003"]["loss"] is None
    one = found["01000000"]
    assert (one["state"], one["step"], one["steps"], one["where"], one["dev_loss"]) == ("completed", 20, 20, "n1 x 2", 0.5)
    cli.main(["runs", str(outputs)])
    assert re.search(r"lights/00060003 +never_heard_of +20 of 20 +nan ", capsys.readouterr().out)


@pytest.mark.launch
def test_a_real_run_is_followed_and_told_when_killed(overrides: list[str], tmp_path: Path) -> None:
    """From another process, with the lock that training takes; the watch ends by itself once nothing is left to follow."""
    done = launch("python", [*overrides, "engine=accelerate", "train.steps=3"])
    assert done.code == 0, done.output
    (run,) = find_runs([str(tmp_path / "outputs")])
    assert glance(run).state == "completed"
    intervals = Run(run).intervals
    assert set(intervals) == {"test/exact_match", "test/intent_accuracy", "test/slot_f1"}
    assert all(low <= Run(run).results[name] <= high for name, (low, high) in intervals.items())
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert glance(run).state == "gone", "its lock is free"
    words = [sys.executable, "-m", "tunesmith.cli", "runs", str(tmp_path / "outputs"), "--watch"]
    watched = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment())
    assert watched.returncode == 0 and "gone" in watched.stdout, watched.stderr


def test_looking_at_runs_needs_no_torch(outputs: Path) -> None:
    program = f"import sys\nfrom tunesmith import cli\ncli.main(['compare', {str(outputs)!r}])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(outputs: Path, tmp_path: Path) -> Path:
    run = make_run(outputs, 1e-4, 0, 1.4, state="stopped")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = "</script><b onmouseover='x'>"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = tmp_path / "page.html"
    cli.main(["compare", str(outputs), "--html", str(path)])
    return path


def test_the_page_fetches_nothing_and_what_comes_from_runs_is_text(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "default-src 'none'" in text and 'showSendToCloud: false, plotlyServerURL: ""' in text
    assert not re.search(r"""\b(src|href|action|poster|srcset)\s*=|@import|url\(|https?://|<link|<iframe""", text)
    assert "<b onmouseover" not in text and text.count("</script>") == 3
    assert len(text.encode()) < 2_600_000


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: what the page does is not tested")


@needs_chromium
def test_the_page_in_a_browser(page: Path) -> None:
    with Browser() as browser:
        browser.open(page, "document.documentElement.dataset.ready === 'yes'")
        dim = "[...document.querySelectorAll('#runs tbody tr.off')].map(row => row.querySelector('th').dataset.value)"
        verdicts = "[...document.querySelectorAll('#verdicts tr')].map(row => row.cells[4].textContent)"
        assert browser.js("[...document.querySelectorAll('.chart')].map(chart => chart.querySelectorAll('.trace').length)") == [5, 6, 5]
        assert browser.js(verdicts) == ["best", "outside the noise"]
        # A point of the parallel coordinates is clicked: one value of the first axis, whose runs are kept.
        browser.click("document.querySelectorAll('#parallel .trace')[0].querySelector('.point')")
        browser.wait("Object.keys(state.filters).length === 1")
        assert 0 < len(browser.js(dim)) < 5
        assert browser.js("document.querySelectorAll('#filters button').length") == 1
        browser.click("document.querySelector('#filters button')")
        browser.wait(f"{dim}.length === 0")
        # A box is switched off.
        browser.click("document.querySelector('#runs tbody input')")
        browser.wait(f"{dim}.length === 1")
        # Pointing at a point tells its run.
        browser.hover("document.querySelectorAll('#pareto .points path')[1]")
        browser.wait("document.querySelector('#pareto .hoverlayer').textContent.includes('lights/')")
        assert browser.js("document.querySelectorAll('#runs tr.hot').length") == 1
        # Other axes: what is best, and what is noise, follow.
        browser.js("(() => { const s = document.querySelector('#quality'); s.value = 'test/slot_f1'; s.dispatchEvent(new Event('change')); })()")
        assert browser.js(verdicts) == ["best", "equal"]
        stars = "[...document.querySelectorAll('#runs .star:not([hidden])')].length"
        assert browser.js(stars) == 2, "equally good, and cheaper"
        browser.js("(() => { const s = document.querySelector('#over'); s.value = 'run/cost'; s.dispatchEvent(new Event('change')); })()")
        assert browser.js("document.querySelector('#curves').layout.xaxis.title.text") == "cost"
        # Sorting by a number, both ways.
        header = "[...document.querySelectorAll('#runs thead button')].find(button => button.textContent.startsWith('held-out'))"
        first = "document.querySelector('#runs tbody tr th').dataset.value"
        browser.click(header)
        assert browser.js(first) == "lights/01000000"
        browser.click(header)
        assert browser.js(first) == "lights/00010000"
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith(("file:", "blob:", "data:"))] == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_on_a_phone(page: Path, dark: bool) -> None:
    with Browser(390, 800, dark) as browser:
        browser.open(page, "document.documentElement.dataset.ready === 'yes'")
        assert browser.js("document.documentElement.scrollWidth") <= 390, "nothing but tables and charts scrolls sideways"
        assert browser.js("document.querySelector('#runs tbody tr').offsetHeight") < 80
        light = "(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3)(getComputedStyle({}).{})"
        background = browser.js(light.format("document.querySelector('section')", "backgroundColor"))
        ink = browser.js(light.format("document.body", "color"))
        assert (background < 80 < 180 < ink) if dark else (ink < 80 < 180 < background)
        assert browser.errors == []


# --- W&B -----------------------------------------------------------------------------------------------------------


def view(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith.cli", "wandb-view", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment(extra))


def test_a_workspace_is_saved(tmp_path: Path) -> None:
    with WandbServer() as server:
        done = view("lights", "--quality", "test/slot_f1", HOME=str(tmp_path), **server.environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{server.url}/somebody/lights?nw=abc"
        (sent,) = server.sent("upsertView")
        assert (sent["entityName"], sent["projectName"]) == ("somebody", "lights")
        spec = sent["spec"]
        for part in ("Parallel Coordinates Plot", "Parameter Importance", "Run Comparer", "config:optim.value.lr", "summary:run/cost", "summary:test/slot_f1"):
            assert part in spec
        refused = view("lights", "--entity", "me", WANDB_BASE_URL=server.url, HOME=str(tmp_path))
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert refused.stderr.splitlines()[-1].startswith("tunesmith: wandb-view lights: ")
