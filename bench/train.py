"""Training beside TRL's SFTTrainer: the same conversations, model, adapters, optimizer and threads, by turns on one machine.

    python -m bench.train                       three sets, tunesmith in fp32 and int8, and TRL in an environment of its own
    python -m bench.train --only short          one set; results are kept set by set in bench/results
    python -m bench.train --ablation            tunesmith alone: each part of bench/ablation.py off, and a ladder of them, two rows by turns
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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench import ablation
from bench.protocol import MARK
from bench.sets import SETS, Set, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
ROWS: dict[str, list[str]] = {
    "tunesmith fp32": [],
    "tunesmith fp32, matmul high": ["precision.matmul=high"],
    "tunesmith int8": ["method.base=int8", "precision.int8=dynamic"],
    "tunesmith int8, matmul high": ["method.base=int8", "precision.int8=dynamic", "precision.matmul=high"],
}
"""tunesmith's rows and what each says more; a row that this version refuses is left out, and its refusal printed."""
PEER = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
THREADS, RATE = 2, 2e-4
PEER_LIMIT_GIB = 14.0
"""Memory that the peer's compared setting may take."""
TRIED_LIMIT_GIB = 20.0
"""Memory that a setting may take which is only tried: more than that, and it ends."""
SAME = 0.005
"""How far losses may lie apart that are of one computation."""
LOOKED_AT = 3
"""Updates whose losses are looked at: from the second on, the gradients are in them."""


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
            "tokens": str(work / "ours.json"), "overrides": [], "without": [], "limit_gib": 0,
        }  # fmt: skip
        self._finish(Side([sys.executable, "-m", "bench.train_tunesmith"], self.asked))
        self.facts = json.loads((work / "ours.json").read_text())
        self.asked["tokens"] = ""

    def agree(self, python: Path, work: Path) -> None:
        """Have the peer prepare the same files, and compare all that it would train on."""
        asked = self._peers({"micro_batch": 1, "padding_free": False}) | {"tokens": str(work / "theirs.json"), "order": []}
        self._finish(Side([str(python), "bench/train_trl.py"], asked))
        same_tokens(self.facts, json.loads((work / "theirs.json").read_text()))

    def ours(self, overrides: Sequence[str], without: Sequence[str] = ()) -> Side:
        return Side([sys.executable, "-m", "bench.train_tunesmith"], self.asked | {"overrides": overrides, "without": without})

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
        """The peer's fastest settings within PEER_LIMIT_GIB, by one window each, and all that were tried; the only ones untried."""
        if len(self.set.peer) == 1:
            return self.set.peer[0], []
        tried: list[dict[str, Any]] = []
        for settings in self.set.peer:
            side = self.peer(python, settings | {"limit_gib": TRIED_LIMIT_GIB})
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


def compare(name: str, windows: int, work: Path) -> Iterator[dict[str, Any]]:
    """One set, tunesmith's rows beside the peer."""
    print(f"{name}", flush=True)
    contest, python = Contest(SETS[name], windows, work), peer_python()
    contest.agree(python, work)
    lengths = sorted(len(ids) for ids, _ in contest.facts["train"])
    print(f"  same token ids, targets and weights; {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}", flush=True)
    best, tried = contest.best_peer(python)
    ours = {row: overrides for row, overrides in (ROWS | SETS[name].more).items() if row not in SETS[name].less}
    starts: dict[str, Callable[[], Side]] = {row: partial(contest.ours, overrides) for row, overrides in ours.items()}
    rows = measure(contest, starts | {"TRL": partial(contest.peer, python, best)}, windows)
    first = {row: facts["losses"][0] for row, facts in rows.items() if facts["losses"]}
    if "TRL" in first and abs(first["tunesmith fp32"] / first["TRL"] - 1) > SAME:
        raise Refused(f"the first update's loss is {first}: not the same computation")
    facts = contest.facts
    yield {
        "rows": rows, "peer": best, "tried": tried, "updates": contest.steps - 1, "conversations_per_step": contest.set.per_step,
        "median_tokens": lengths[len(lengths) // 2], "shared": 1 - sum(facts["computed"]) / sum(facts["conversation_tokens"]),
    }  # fmt: skip


def ablate(name: str, windows: int, work: Path) -> Iterator[dict[str, Any]]:
    """One set, tunesmith's rows of bench/ablation.py: each by turns with the one that it is compared with, no more than two at a time.

    Gives what there is after each row: all of them take half an hour.
    """
    print(f"{name}, ablation", flush=True)
    contest = Contest(SETS[name], windows, work)
    rows, found = ablation.rows(), dict[str, dict[str, Any]]()
    for title, row in rows.items():
        if row.beside is None:
            continue
        print(f"  {title}, beside {row.beside}", flush=True)
        starts: dict[str, Callable[[], Side]] = {}
        for one in (row.beside, title):
            starts[one] = partial(contest.ours, rows[one].settings, rows[one].without)
        shown = measure(contest, starts, windows)
        if len(shown) < 2:
            continue  # what was left out has been printed
        other, own = shown.values()
        found.setdefault(row.beside, other | {"kind": rows[row.beside].kind})
        same_losses({one: facts["losses"] for one, facts in ([*found.items(), (title, own)]) if rows[one].same_losses})
        slow, fast = (other, own) if row.kind == "ladder" else (own, other)
        gains = [one / before for before, one in zip(slow["windows"], fast["windows"], strict=True)]
        found[title] = own | {"kind": row.kind, "beside": row.beside, "gain": median(gains), "gains": gains}
        print(f"  {title}: {said_gain(found[title])}", flush=True)
        yield {"rows": {title: found[title] for title in rows if title in found}}


def same_losses(found: dict[str, list[float]]) -> None:
    """Raise Refused unless these rows' first losses are the same: another loss is another computation, whose speed says nothing."""
    (first, wanted), *others = found.items()
    for title, losses in others:
        for number, (one, other) in enumerate(zip(wanted[:LOOKED_AT], losses[:LOOKED_AT], strict=False), 1):
            if not abs(other / one - 1) <= SAME:
                raise Refused(f"{title}: update {number} has a loss of {other}, and {one} with {first!r}: not the same computation")


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
    kinds = {"train": compared, "ablation": ablated}
    paths = {RESULTS / f"{kind}-{name}.json": lines_of for kind, lines_of in kinds.items() for name in SETS}
    lines: list[str] = []
    for path, lines_of in paths.items():
        if path.exists():
            found = json.loads(path.read_text())
            facts = found["machine"]
            head = f"**{path.stem}**: {facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}, "
            lines += lines_of(head + facts["date"], found)
    return "\n".join(lines)


def compared(head: str, found: dict[str, Any]) -> list[str]:
    """A set beside the peer."""
    rows = found["rows"]
    base = "TRL" if "TRL" in rows else next(iter(rows))
    head += f"; {found['median_tokens']} tokens a conversation (median), common beginnings save {found['shared']:.0%}, "
    head += f"{found['conversations_per_step']} conversations an update, {found['updates']} updates; "
    lines = [head + f"TRL {found['machine']['trl']} with {said_of(found['peer'])}", ""]
    lines += [f"| | conversations/s | target tokens/s | over {base} | windows | peak GiB (over imports) | first step s | held-out loss |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        spread = f"{min(row['windows']):.3g} to {max(row['windows']):.3g}"
        lines.append(
            f"| {name} | {row['conversations_per_s']:.3g} | {row['target_tokens_per_s']:.3g} "
            f"| {row['conversations_per_s'] / rows[base]['conversations_per_s']:.2f} | {spread} "
            f"| {row['peak_gib']:.2f} ({row['over_gib']:.2f}) | {row['first_step_s']:.1f} | {row['held_out']:.4f} |"
        )
    if tried := found.get("tried"):
        said = [
            f"{said_of(one)}: " + (f"{one['conversations_per_s']:.3g}/s, {one['peak_gib']:.1f} GiB" if "peak_gib" in one else "failed")
            for one in tried
        ]
        lines += ["", f"Tried for TRL: {'; '.join(said)}."]
    return [*lines, ""]


def ablated(head: str, found: dict[str, Any]) -> list[str]:
    """A set with each part off, and the ladder."""
    rows = found["rows"]
    lines = [head, "", f"Without one part, beside `{ablation.AS_IT_IS}`; gain: what it is faster by than the row.", ""]
    lines += ["| | what it is then | conversations/s | gain | micro-batch | peak GiB (over imports) |", "|---|---|---|---|---|---|"]
    settings = {name: f"`{' '.join(row.settings)}`" for name, row in ablation.rows().items() if row.kind == "settings"}
    parts = {f"without {name}": part.says for name, part in ablation.PARTS.items()}
    for name, row in rows.items():
        if row["kind"] != "ladder":
            lines.append(f"| {name} | {(settings | parts).get(name, '')} | {said_facts(row, said_gain(row))} |")
    lines += ["", "One part after the other; gain: over the row before; together: over the first.", ""]
    lines += ["| | conversations/s | gain | together | micro-batch | peak GiB (over imports) |", "|---|---|---|---|---|---|"]
    together = 1.0
    for name, row in rows.items():
        if row["kind"] == "ladder":
            together *= row.get("gain", 1.0)
            lines.append(f"| {name} | {said_facts(row, f'{said_gain(row)} | {together:.2f}')} |")
    return [*lines, ""]


def said_facts(row: dict[str, Any], gain: str) -> str:
    """The columns that both tables of an ablation have, with what stands between them."""
    return f"{row['conversations_per_s']:.3g} | {gain} | {row['micro_batch']} | {row['peak_gib']:.2f} ({row['over_gib']:.2f})"


def said_gain(row: dict[str, Any]) -> str:
    """The median of the windows' ratios, each of two windows that were taken one after the other, and how far they lie apart."""
    return f"{row['gain']:.2f} ({min(row['gains']):.2f} to {max(row['gains']):.2f})" if "gain" in row else ""


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
        path = RESULTS / f"{'ablation' if asked.ablation else 'train'}-{name}.json"
        with tempfile.TemporaryDirectory() as work:
            measure_set = ablate if asked.ablation else compare
            try:
                for found in measure_set(name, asked.windows, Path(work)):
                    path.write_text(json.dumps(_rounded({"machine": facts, **found}), indent=1) + "\n")
            except Refused as refused:
                raise SystemExit(f"{name}: not compared — {refused}") from None
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
