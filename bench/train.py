"""Training beside TRL's SFTTrainer: the same conversations, model, adapters, optimizer and threads, by turns on one machine.

    python -m bench.train                       three sets, tunesmith in fp32 and int8, and TRL in an environment of its own
    python -m bench.train --only short          one set; results are kept set by set in bench/results
    python -m bench.train --ablation            tunesmith alone, with one thing changed in each row
    python -m bench.train --table               print what bench/results holds as Markdown

Nothing is compared before both sides have shown that they train on the same token ids, the same targets and as many weights. Each side
is a process; while one takes a window of updates the others stand. The rate of a window is conversations over its whole time; medians
count. TRL's settings are tried first, and its fastest is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.protocol import MARK
from bench.sets import SETS, Set, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
ROWS: dict[str, list[str]] = {"tunesmith fp32": [], "tunesmith int8": ["method.base=int8", "precision.int8=dynamic"]}
"""tunesmith's rows and what each says more; a row that this version refuses is left out, and its refusal printed."""
ABLATION: dict[str, list[str]] = {
    "as it is": [],
    "padded": ["data.batching=padded"],
    "length_grouped": ["data.batching=length_grouped"],
    "one a micro-batch": ["train.micro_batch=1"],
    "recomputed": ["engine.checkpointing=true"],
    "DeepSpeed, ZeRO 2": ["engine=deepspeed"],
}
PEER = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
THREADS, RATE = 2, 2e-4
PEER_LIMIT_GIB = 14.0


class Refused(Exception):
    """A side that does not take what it is asked for."""


class Side:
    """One process that trains when it is told."""

    def __init__(self, command: list[str], asked: dict[str, Any]):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(asked["threads"]), "BENCH_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            [*command, json.dumps(asked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip
        self.per_step = asked["per_step"]
        self.windows: list[float] = []

    def hear(self) -> dict[str, Any]:
        """What it tells next; raises Refused with its last words if it has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        self.process.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        raise Refused(said[-1] if said else f"it ended with code {self.process.returncode}")

    def tell(self, words: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.hear()

    def window(self, steps: int) -> float:
        """Conversations a second over so many updates."""
        seconds = self.tell(f"steps {steps}")["seconds"]
        self.windows.append(steps * self.per_step / seconds)
        return self.windows[-1]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def peer_python() -> Path:
    """The Python of the peer's own environment, made in build/ with the pinned versions if it is not there."""
    pinned = (ROOT / "constraints.txt").read_text()
    folder, done = ROOT / "build" / "bench-trl", ROOT / "build" / "bench-trl" / "made-from.txt"
    python = folder / "bin" / "python"
    if not done.exists() or done.read_text() != pinned:
        print("peer     making build/bench-trl, an environment for TRL alone", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*install, "torch"], check=True)  # first and alone, so that pip does not choose a build with CUDA
        subprocess.run([*install, *PEER], check=True)
        done.write_text(pinned)
    return python


def same_tokens(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise Refused unless both would train on the same ids and targets with equally many weights."""
    if ours["trained"] != theirs["trained"]:
        raise Refused(f"{ours['trained']:,} trained weights here, {theirs['trained']:,} there")
    for part in ("train", "dev"):
        if len(ours[part]) != len(theirs[part]):
            raise Refused(f"{part}: {len(ours[part])} conversations here, {len(theirs[part])} there")
        for number, (one, other) in enumerate(zip(ours[part], theirs[part], strict=True)):
            if one != other:
                where = next((i for i, pair in enumerate(zip(*zip(one, other, strict=True), strict=False)) if pair[0] != pair[1]), 0)
                raise Refused(f"{part}, conversation {number + 1}: ids or targets differ ({len(one[0])} tokens, {len(other[0])}; {where})")


class Contest:
    """One set: its files, the words for each side, and the facts that both agree on."""

    def __init__(self, chosen: Set, windows: int, work: Path):
        self.set = chosen
        self.steps = 1 + windows * chosen.steps + 1  # the last is never taken: it would save and end
        train, dev = write(chosen, ROOT / "build" / "bench-data" / chosen.name)
        self.asked: dict[str, Any] = {
            "train": str(train), "dev": str(dev), "per_step": chosen.per_step, "steps": self.steps, "lr": RATE, "threads": THREADS,
            "tokens": str(work / "ours.json"), "overrides": [],
        }  # fmt: skip
        self._finish(Side([sys.executable, "-m", "bench.train_tunesmith"], self.asked))
        self.facts = json.loads((work / "ours.json").read_text())
        self.asked["tokens"] = ""

    def agree(self, python: Path, work: Path) -> None:
        """Have the peer prepare the same files, and compare all that it would train on."""
        asked = self._peers({"micro_batch": 1, "padding_free": False}) | {"tokens": str(work / "theirs.json"), "order": []}
        self._finish(Side([str(python), "bench/train_trl.py"], asked))
        same_tokens(self.facts, json.loads((work / "theirs.json").read_text()))

    def ours(self, overrides: list[str]) -> Side:
        return Side([sys.executable, "-m", "bench.train_tunesmith"], self.asked | {"overrides": overrides})

    def peer(self, python: Path, settings: dict[str, object]) -> Side:
        return Side([str(python), "bench/train_trl.py"], self._peers(settings))

    def _peers(self, settings: dict[str, object]) -> dict[str, Any]:
        return self.asked | {"model": self.facts["model"], "order": self.facts["order"]} | settings

    @staticmethod
    def _finish(side: Side) -> None:
        """Wait for a side that only shows its tokens."""
        try:
            side.hear()
        except Refused:
            if side.process.returncode:
                raise

    def best_peer(self, python: Path) -> tuple[dict[str, object], list[dict[str, Any]]]:
        """The peer's fastest settings within the memory allowed, by one window each, and all that were tried; the only ones untried."""
        if len(self.set.peer) == 1:
            return self.set.peer[0], []
        tried: list[dict[str, Any]] = []
        for settings in self.set.peer:
            side = self.peer(python, settings)
            try:
                side.hear()
                rate = side.window(self.set.steps)
                tried.append({**settings, "conversations_per_s": rate, "peak_gib": side.tell("loss")["peak_gib"]})
            except Refused as refused:
                tried.append({**settings, "refused": str(refused)})
            finally:
                side.end()
            print(f"  tried  {tried[-1]}", flush=True)
        able = [one for one in tried if one.get("peak_gib", 99) < PEER_LIMIT_GIB]
        best = max(able, key=lambda one: one["conversations_per_s"])
        return {name: best[name] for name in ("micro_batch", "padding_free")}, tried


def measure(contest: Contest, starts: dict[str, Callable[[], Side]], windows: int) -> dict[str, Any]:
    """Start one side after the other, then take the windows by turns; gives what each side showed."""
    found: dict[str, Any] = {}
    sides: dict[str, Side] = {}
    try:
        for name, start in starts.items():
            sides[name] = start()
            try:
                found[name] = sides[name].hear()  # each has the machine for itself until its first update is done
            except Refused as refused:
                print(f"  {name}: left out — {refused}", flush=True)
                sides.pop(name).end()
        for number in range(windows):
            rates = {name: side.window(contest.set.steps) for name, side in sides.items()}
            said = "   ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
            print(f"  window {number + 1} of {windows}, conversations/s: {said}", flush=True)
        per_conversation = sum(contest.facts["targets"][:-1]) / (contest.set.per_step * (contest.steps - 1))
        for name, side in sides.items():
            rate = median(side.windows)
            found[name] |= side.tell("loss")
            found[name] |= {"windows": side.windows, "conversations_per_s": rate, "target_tokens_per_s": rate * per_conversation}
            print(f"  {name}: {rate:.3g} conversations/s, peak {found[name]['peak_gib']:.2f} GiB, held-out {found[name]['held_out']:.4f}")
    finally:
        for side in sides.values():
            side.end()
    return found


def compare(name: str, windows: int, work: Path) -> dict[str, Any]:
    """One set, tunesmith's rows beside the peer."""
    print(f"{name}", flush=True)
    contest, python = Contest(SETS[name], windows, work), peer_python()
    contest.agree(python, work)
    lengths = sorted(len(ids) for ids, _ in contest.facts["train"])
    print(f"  same token ids, targets and weights; {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}", flush=True)
    best, tried = contest.best_peer(python)
    starts: dict[str, Callable[[], Side]] = {row: partial(contest.ours, overrides) for row, overrides in (ROWS | SETS[name].more).items()}
    rows = measure(contest, starts | {"TRL": partial(contest.peer, python, best)}, windows)
    first = {row: facts["losses"][0] for row, facts in rows.items() if facts["losses"]}
    if "TRL" in first and abs(first["tunesmith fp32"] / first["TRL"] - 1) > 0.005:
        raise Refused(f"the first update's loss is {first}: not the same computation")
    facts = contest.facts
    return {
        "rows": rows, "peer": best, "tried": tried, "updates": contest.steps - 1, "conversations_per_step": contest.set.per_step,
        "median_tokens": lengths[len(lengths) // 2], "shared": 1 - sum(facts["computed"]) / sum(facts["conversation_tokens"]),
    }  # fmt: skip


def ablate(name: str, windows: int, work: Path) -> dict[str, Any]:
    """One set, tunesmith with one thing changed in each row."""
    print(f"{name}, ablation", flush=True)
    contest = Contest(SETS[name], windows, work)
    return {"rows": measure(contest, {row: partial(contest.ours, overrides) for row, overrides in ABLATION.items()}, windows)}


def machine() -> dict[str, str]:
    """What a result belongs to."""
    from tunesmith.hardware import this_machine

    def said(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = bool(said("git", "status", "--porcelain", "--untracked-files=no", "--", "src", "bench", ":!bench/results"))
    pinned = [line.partition(";")[0].strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {
        "machine": str(this_machine()),
        "threads": str(THREADS),
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "--short", "HEAD") + " with changes" * changed,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "trl": next(words[1] for words in pinned if words[0] == "trl"),
    }


def table() -> str:
    """All results as Markdown, as printed in docs/benchmarks.md."""
    lines: list[str] = []
    for path in (RESULTS / f"{kind}-{name}.json" for kind in ("train", "ablation") for name in SETS):
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        rows, facts = found["rows"], found["machine"]
        base = "TRL" if "TRL" in rows else "as it is"
        head = f"**{path.stem}**: {facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}, "
        head += facts["date"]
        if "peer" in found:
            head += f"; {found['median_tokens']} tokens a conversation (median), common beginnings save {found['shared']:.0%}, "
            head += f"{found['conversations_per_step']} conversations an update, {found['updates']} updates; "
            head += f"TRL {facts['trl']} with {said_of(found['peer'])}"
        lines += [head]
        lines += [
            "",
            f"| | conversations/s | target tokens/s | over {base} | windows | peak GiB (over imports) | first step s | held-out loss |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for name, row in rows.items():
            spread = f"{min(row['windows']):.3g} to {max(row['windows']):.3g}"
            lines.append(
                f"| {name} | {row['conversations_per_s']:.3g} | {row['target_tokens_per_s']:.3g} "
                f"| {row['conversations_per_s'] / rows[base]['conversations_per_s']:.2f} | {spread} "
                f"| {row['peak_gib']:.2f} ({row['over_gib']:.2f}) | {row['first_step_s']:.1f} | {row['held_out']:.4f} |"
            )
        if found.get("tried"):
            tried = [
                f"{said_of(one)}: {one['conversations_per_s']:.3g}/s, {one['peak_gib']:.1f} GiB"
                for one in found["tried"]
                if "peak_gib" in one
            ]
            lines += ["", f"Tried for TRL: {'; '.join(tried)}."]
        lines += [""]
    return "\n".join(lines)


def said_of(settings: dict[str, Any]) -> str:
    return f"micro-batches of {settings['micro_batch']}, {'padding-free' if settings['padding_free'] else 'padded'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SETS, help="one set instead of all")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return
    RESULTS.mkdir(exist_ok=True)
    for name in [asked.only] if asked.only else SETS:
        facts = machine()  # before: the commit that is measured
        with tempfile.TemporaryDirectory() as work:
            try:
                found = (ablate if asked.ablation else compare)(name, asked.windows, Path(work))
            except Refused as refused:
                raise SystemExit(f"{name}: not compared — {refused}") from None
        path = RESULTS / f"{'ablation' if asked.ablation else 'train'}-{name}.json"
        path.write_text(json.dumps(_rounded({"machine": facts, **found}), indent=1) + "\n")
    print(table())


def _rounded(value: Any) -> Any:
    """Numbers to five digits: more would be noise."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
