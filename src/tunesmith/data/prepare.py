"""Read, check, render and write a file's conversations once, piece by piece at constant memory; then map what was written.

A prepared file is a folder: `rows.arrow` and `about.json`. It has its name only when it is complete, and the name is a hash
of all it depends on: the source's content, the renderer, the settings, and the code of this room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from tunesmith.config import Data, Overlong, Policy, Refusal
from tunesmith.data.check import Findings, Known, grams
from tunesmith.data.conversations import Conversation, parse_conversation
from tunesmith.data.examples import Example
from tunesmith.data.files import Chunk, Lines, Mistake, content_name, line_at
from tunesmith.data.statistics import Statistics
from tunesmith.data.templates import Rendered, Renderer
from tunesmith.hardware import cache_folder

if TYPE_CHECKING:
    from tunesmith.data.workers import Workers

SPOKEN = ("user", "assistant", "text")
"""Roles whose words count when train and held-out parts are compared: tools and system lines are the same everywhere."""
SETTINGS = ("format", "compat", "max_tokens", "overlong")
COMPARED = ("duplicate", "leak", "overlap")
"""Kinds that are judged when files are put together: their policies leave the files as they are."""


@dataclass(frozen=True)
class Work:
    """All that a process needs to prepare a piece of a file."""

    renderer: Renderer
    data: Data
    part: str
    """train, dev or test."""
    known: Known
    """What train must not overlap with; empty for the held-out parts."""
    is_streaming: bool
    """Keep where each conversation is found instead of its tokens."""


@dataclass(frozen=True)
class Piece:
    """A prepared piece of a file."""

    rows: pa.RecordBatch
    findings: Findings
    statistics: Statistics
    read: int
    """Conversations that were found, those left out included."""
    size: int
    """Bytes of the source."""
    digest: bytes
    """Of tokens and targets."""
    grams: np.ndarray
    """Of a held-out part: what `Known` is made of."""


def prepare_piece(work: Work, chunk: Chunk) -> Piece:
    """Parse, check, render and measure one piece."""
    findings, statistics = Findings(), Statistics()
    found: list[tuple[Conversation, tuple[int, int]]] = []
    read = 0
    if work.is_streaming and not isinstance(chunk, Lines):
        raise Refusal("data.streaming=true: only .jsonl can be read at any place — write the file as .jsonl, or data.streaming=false")
    spans: Iterable[tuple[int, int]] = chunk.spans() if isinstance(chunk, Lines) else iter(lambda: (0, 0), None)
    for (place, record), span in zip(chunk.records(), spans, strict=False):
        read += 1
        doubts: list[Mistake] = []
        try:
            found.append((parse_conversation(record, place, work.data, doubts), span))
        except Mistake as mistake:
            findings.add(mistake.kind, getattr(work.data.check, mistake.kind).name, str(mistake))
            continue
        for doubt in doubts:
            findings.add(doubt.kind, "keep", str(doubt))
    rendered = work.renderer.render_all([conversation for conversation, _ in found])
    kept: list[tuple[Conversation, Rendered, tuple[int, int]]] = []
    for (conversation, span), whole in zip(found, rendered, strict=True):
        fitting = _usable(conversation, whole, work, findings)
        if fitting is not None:
            kept.append((*fitting, span))
            statistics.add(*fitting)
    rows, digest, held_out = _rows(work, kept)
    return Piece(rows, findings, statistics, read, chunk.size, digest, held_out)


def _usable(conversation: Conversation, rendered: Rendered, work: Work, findings: Findings) -> tuple[Conversation, Rendered] | None:
    """The conversation as it will be trained, perhaps cut; None if it is left out. What happens is added to the findings."""
    data, place = work.data, conversation.place
    if (tokens := len(rendered.ids)) > data.max_tokens:
        fitting = fit(conversation, work.renderer, data) if data.overlong is Overlong.cut else None
        if fitting is None:
            action = "fail" if data.overlong is Overlong.error else "skip"
            findings.add("overlong", action, f"{place}: {tokens} tokens", tokens=tokens, place=place)
            return None
        lost = len(conversation.turns) - len(fitting[0].turns)
        findings.add("overlong", "cut", f"{place}: {tokens} tokens, {lost} turns cut", turns=lost, tokens=tokens, place=place)
        conversation, rendered = fitting
    if not rendered.targets[1:].any():
        findings.add("no_target", data.check.no_target.name, place)
        return None
    if rendered.unstopped is not None:
        said = rendered.said[rendered.unstopped]
        text = f"{place}: the answer {said.content[:30] or said.call!r} is learned without a token that stops it — another data.template"
        findings.add("stop_not_trained", data.check.stop_not_trained.name, text)
        if data.check.stop_not_trained is not Policy.keep:
            return None
    return conversation, rendered


def fit(conversation: Conversation, renderer: Renderer, data: Data) -> tuple[Conversation, Rendered] | None:
    """The newest turns from a user turn on, behind the system turns, as many as fit; None if none do or nothing would be learned.

    Cuts lie between turns, so no target and no stop token is ever torn off.
    """
    system = [turn for turn in conversation.turns if turn.role == "system"]
    others = conversation.turns[len(system) :]
    starts = [index for index, turn in enumerate(others) if index and turn.role == "user"]
    best = None
    while starts:  # a later start is shorter: search by halves
        middle = len(starts) // 2
        shorter = replace(conversation, turns=(*system, *others[starts[middle] :]))
        rendered = renderer.render(shorter)
        if len(rendered.ids) <= data.max_tokens:
            best, starts = (shorter, rendered), starts[:middle]
        else:
            starts = starts[middle + 1 :]
    # What is left of a cut conversation may hold no target any more; then it teaches nothing.
    return best if best and best[1].targets[1:].any() else None


def _rows(work: Work, kept: Sequence[tuple[Conversation, Rendered, tuple[int, int]]]) -> tuple[pa.RecordBatch, bytes, np.ndarray]:
    lengths = np.array([len(rendered.ids) for _, rendered, _ in kept], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.empty(0, np.int32), *(rendered.ids for _, rendered, _ in kept)]).astype(np.int32)
    targets = np.concatenate([np.empty(0, bool), *(rendered.targets for _, rendered, _ in kept)])
    counted = targets.copy()
    counted[offsets[:-1]] = False  # nothing predicts the first token
    before = np.concatenate([[0], np.cumsum(counted)])
    last = np.maximum.accumulate(np.where(counted, np.arange(len(ids)), -1))
    runs = np.concatenate([np.empty(0, np.int64), *(_runs(number, rendered) for number, (_, rendered, _) in enumerate(kept))])
    hashed, starts = grams(ids, runs)
    columns: dict[str, Any] = {
        # The path is the same in all rows.
        "place": [conversation.place.removeprefix(origin_of(conversation.place)) for conversation, _, _ in kept],
        "computed": last[offsets[1:] - 1] - offsets[:-1] if len(kept) else np.empty(0, np.int64),
        "target_count": before[offsets[1:]] - before[offsets[:-1]],
        "hash": np.array([_hash(rendered.ids) for _, rendered, _ in kept], np.uint64),
        "overlap": _shares(work.known.found(hashed), starts, offsets),
    }
    if work.is_streaming:
        spans = np.array([span for *_, span in kept], np.int64).reshape(-1, 2)
        columns |= {"start": spans[:, 0], "bytes": spans[:, 1]}
    else:
        columns |= {"ids": _lists(offsets, pa.array(ids)), "targets": _lists(offsets, pa.array(targets))}
    if work.part == "test":
        columns["question"] = [_question(conversation, work.renderer) for conversation, _, _ in kept]
    digest = hashlib.sha256(ids.tobytes() + np.packbits(targets).tobytes()).digest()
    return pa.RecordBatch.from_pydict(columns, _schema(work)), digest, np.unique(hashed) if work.part != "train" else hashed[:0]


def _schema(work: Work) -> pa.Schema:
    fields = {"place": pa.string(), "computed": pa.int64(), "target_count": pa.int64(), "hash": pa.uint64(), "overlap": pa.float64()}
    if work.is_streaming:
        fields |= {"start": pa.int64(), "bytes": pa.int64()}
    else:
        fields |= {"ids": pa.list_(pa.int32()), "targets": pa.list_(pa.bool_())}
    if work.part == "test":
        fields |= {"question": pa.string()}
    return pa.schema(fields)


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _runs(number: int, rendered: Rendered) -> np.ndarray:
    """A number for each token that is its turn's, -1 where the turn's words are not compared."""
    spoken = np.array([*(turn.role in SPOKEN for turn in rendered.said), False])  # the frame is turn -1
    return np.where(spoken[rendered.turns], number * 2**16 + rendered.turns.astype(np.int64), -1)


def _shares(known: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Share of each conversation's stretches of 13 tokens that are known."""
    of = np.searchsorted(offsets, starts, "right") - 1
    every = np.bincount(of, minlength=len(offsets) - 1)[: len(offsets) - 1]
    return np.bincount(of, weights=known, minlength=len(offsets) - 1)[: len(offsets) - 1] / np.maximum(every, 1)


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _question(conversation: Conversation, renderer: Renderer) -> str:
    """The conversation up to its last trained assistant turn, for JSON; empty if it has none."""
    for index in range(len(conversation.turns) - 1, 0, -1):
        turn = conversation.turns[index]
        if turn.role == "assistant" and turn.loss:
            asked = replace(conversation, turns=conversation.turns[:index])
            said = next((t.content for t in reversed(asked.turns) if t.role == "user"), "")
            return json.dumps({"prompt": renderer.prompt(asked), "text": said, "answer": asdict(turn)})
    return ""


def origin_of(place: str) -> str:
    """The file of a place: file:line or file#index."""
    return place[: max(place.rfind(":"), place.rfind("#"))]


# --- on disk -------------------------------------------------------------------------------------------------------


class Prepared:
    """A prepared file, mapped into memory: rows are read where they lie."""

    def __init__(self, origin: Path | str, folder: Path, work: Work):
        about = json.loads((folder / "about.json").read_text("utf-8"))
        self.origin = origin
        self.name = folder.name
        self.read: int = about["read"]
        self.findings = Findings.read(about["findings"])
        self.digest: str = about["digest"]
        self._about = about
        self._work = work
        self._folder = folder
        with pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))) as reader:
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._views: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def statistics(self) -> Statistics:
        return Statistics.read(self._about["statistics"])

    @property
    def grams(self) -> np.ndarray:
        hashes: np.ndarray = np.load(self._folder / "grams.npy", mmap_mode="r")
        return hashes

    def column(self, name: str) -> np.ndarray:
        """All values of a column of numbers."""
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches]) if len(self) else np.empty(0, np.int64)

    def place(self, row: int) -> str:
        """Where a row's conversation was read."""
        return f"{self.origin}{self._value('place', row)}"

    def example(self, row: int) -> Example:
        """A row's conversation; rendered anew where only its place was kept."""
        if self._work.is_streaming:
            rendered = self.rendered(row)[1]
            return Example(rendered.ids, rendered.targets, self.place(row))
        number, inside = self._find(row)
        offsets, ids, bits = self._arrays(number)
        start, stop = int(offsets[inside]), int(offsets[inside + 1])
        flags = np.unpackbits(bits[start // 8 : (stop + 7) // 8], bitorder="little")[start % 8 :][: stop - start]
        return Example(ids[start:stop], flags.astype(bool), self.place(row))

    def question(self, row: int) -> dict[str, Any] | None:
        """A test conversation's question, as `_question` wrote it."""
        text = self._value("question", row)
        return json.loads(text) if text else None

    def rendered(self, row: int) -> tuple[Conversation, Rendered]:
        """A row read from its source again, checked, cut and rendered as it was then (.jsonl only)."""
        assert isinstance(self.origin, Path)
        start, length = self._value("start", row), self._value("bytes", row)
        line = Lines(self.origin, int(self._value("place", row).lstrip(":")), start, line_at(self.origin, start, length))
        place, record = next(line.records(), (self.place(row), None))
        try:
            conversation = parse_conversation(record, place, self._work.data)
            usable = _usable(conversation, self._work.renderer.render(conversation), self._work, Findings())
        except Mistake:
            usable = None
        if usable is None or _hash(usable[1].ids) != self._value("hash", row):
            raise Refusal(f"{place}: the file has changed since this run began — stop, and start again")
        return usable

    def _value(self, name: str, row: int) -> Any:
        number, inside = self._find(row)
        return self._batches[number].column(name)[inside].as_py()

    def _find(self, row: int) -> tuple[int, int]:
        """(batch, row there) of a row."""
        number = int(np.searchsorted(self._firsts, row, "right")) - 1
        return number, row - int(self._firsts[number])

    def _arrays(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(offsets, ids, bits of the targets) of a batch, without a copy."""
        if number not in self._views:
            ids, targets = self._batches[number].column("ids"), self._batches[number].column("targets")
            bits = np.frombuffer(targets.values.buffers()[1] or b"", np.uint8)
            self._views[number] = ids.offsets.to_numpy(), ids.values.to_numpy(), bits
        return self._views[number]


def prepared(origin: Path | str, work: Work, workers: Workers) -> Prepared:
    """A file's conversations, prepared by whoever comes first; others wait on a file, not on a barrier that could time out."""
    folder = Path(work.data.cache) if work.data.cache else cache_folder() / "tokens"
    try:
        target = folder / _name(origin, work, folder)
        if not target.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.is_dir():
                    _write(origin, work, workers, target)
        return Prepared(origin, target, work)
    except OSError as error:
        raise Refusal(
            f"data.cache={folder}: cannot keep the prepared tokens of {origin} there ({error.strerror or error}) — "
            "data.cache=FOLDER with room for about as much as the file, or data.streaming=true"
        ) from None


def _write(origin: Path | str, work: Work, workers: Workers, target: Path) -> None:
    for left in target.parent.glob(f".{target.name}-*"):  # of a start that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        findings, statistics, read, digest = Findings(), Statistics(), 0, hashlib.sha256()
        held_out: list[np.ndarray] = []
        with pa.OSFile(str(draft / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, _schema(work)) as writer:
            for piece in workers.pieces(origin, work):
                writer.write_batch(piece.rows)
                findings.merge(piece.findings)
                statistics.merge(piece.statistics)
                read += piece.read
                digest.update(piece.digest)
                held_out.append(piece.grams)
        np.save(draft / "grams.npy", Known.of(held_out).hashes)
        about = {"read": read, "digest": digest.hexdigest(), "findings": findings.stored(), "statistics": statistics.stored()}
        (draft / "about.json").write_text(json.dumps(about), "utf-8")
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _name(origin: Path | str, work: Work, folder: Path) -> str:
    data = work.data
    settings: dict[str, Any] = {name: str(getattr(data, name)) for name in SETTINGS} | {"part": work.part, "streaming": work.is_streaming}
    settings |= {kind: policy.name for kind, policy in vars(data.check).items() if kind not in COMPARED}
    parts = [_code(), str(origin), _content(origin, folder), work.renderer.key, settings]
    parts.append(hashlib.sha256(work.known.hashes.tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """What this room does is part of what it made: an update never finds what an older version prepared otherwise."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if not file.name.startswith("smart_home"):
            total.update(file.read_bytes())
    return total.hexdigest()


def _content(origin: Path | str, folder: Path) -> str:
    """A hash of the source; remembered with the file's times, so that a second start need not read gigabytes again."""
    if isinstance(origin, str):
        return content_name(origin)
    try:
        return _content_of(origin, folder)
    except OSError as error:
        raise Refusal(f"{origin}: cannot be read ({error.strerror or error})") from None


def _content_of(origin: Path, folder: Path) -> str:
    about = origin.stat()
    mark = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    memory = folder / "sources" / hashlib.sha256(str(origin.resolve()).encode()).hexdigest()[:24]
    if memory.is_file():
        known = json.loads(memory.read_text())
        if known["mark"] == mark:
            return str(known["digest"])
    total = hashlib.sha256()
    with origin.open("rb") as stream:
        while block := stream.read(2**20):
            total.update(block)
    digest = total.hexdigest()
    # A file that is as young as the clock's grain could be changed again without its times showing it.
    if time.time() - max(about.st_mtime, about.st_ctime) > 2:
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft = memory.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"mark": mark, "digest": digest}))
        os.replace(draft, memory)
    return digest
