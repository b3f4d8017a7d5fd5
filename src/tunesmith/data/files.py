"""From a spec (files, folders, globs, hub data sets, weights) to records, each with its place; nothing is checked here but bytes.

What cannot be read is yielded in the record's stead, as a Mistake: one broken line of a million is one finding, not the end.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import orjson
from pyarrow import ArrowException, parquet

from tunesmith.config import Refusal

READABLE = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
HUB = "hub:"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put one in front
CELLS_OF_JSON = ("conversations", "messages", "tools", "history", "metadata")
CHUNK_BYTES = 2**20
"""Lines are handed on in pieces of about this size: small enough to balance processes, large enough to be worth a message."""
CHUNK_RECORDS = 500
BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile)

Found = tuple[str, Any]
"""(place, record), or (place, Mistake)."""


class Mistake(ValueError):
    """What is wrong with one record: its text begins with the place; `kind` sorts mistakes in a report."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Lines:
    """Whole lines of a .jsonl, not yet parsed: what is handed to another process."""

    path: Path
    number: int
    """Line number of the first one, from 1."""
    start: int
    """Where it begins in the file, in bytes."""
    data: bytes

    @property
    def size(self) -> int:
        """Bytes of the source that this covers."""
        return len(self.data)

    def records(self) -> Iterator[Found]:
        """(place, record or Mistake) of each line that is not empty."""
        for number, line in self._lines():
            yield (place := f"{self.path}:{number}"), _line(line, place)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first byte in the file, bytes) of each line that is not empty."""
        start = self.start
        for number, line in enumerate(self.data.split(b"\n"), self.number):
            if _without_mark(line, number).strip():
                yield start, len(line)
            start += len(line) + 1

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(self.data.split(b"\n"), self.number):  # a JSON text may hold U+2028 or a \r as it is
            if (line := _without_mark(line, number)).strip():
                yield number, line


@dataclass(frozen=True)
class Records:
    """Records of any other kind of file, parsed already."""

    found: tuple[Found, ...]
    size: int = 0

    def records(self) -> Iterator[Found]:
        """(place, record or Mistake) of each."""
        return iter(self.found)


Chunk = Lines | Records


@dataclass(frozen=True)
class Source:
    """One part of a spec, between its commas."""

    name: str
    """As it was typed, without its weight."""
    weight: float
    """Copies in an epoch; a fraction is a subset."""
    paths: tuple[Path, ...]
    """Its files in order; none for a data set of the hub."""

    def records(self) -> Iterator[Found]:
        """(place, record or Mistake) of all its files; a .jsonl and a .csv are read as they are consumed."""
        for origin in self.paths or (self.name,):
            for chunk in chunks(origin):
                yield from chunk.records()


def chunks(origin: Path | str) -> Iterator[Chunk]:
    """The content of one file, or of a data set of the hub by name, in pieces that other processes can work on."""
    if isinstance(origin, str):
        yield from _batched(_hub(origin))
        return
    name = origin.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet(origin)
        return
    read = _csv if ".csv" in Path(name).suffixes else _lines if ".jsonl" in Path(name).suffixes else _list_or_lines
    place = str(origin)
    try:
        with cast("IO[bytes]", gzip.open(origin) if name.endswith(".gz") else origin.open("rb")) as stream:
            for chunk in read(origin, stream):  # the last place is told when the archive breaks
                yield chunk
                place = f"{origin}:{chunk.number + chunk.data.count(10)}" if isinstance(chunk, Lines) else chunk.found[-1][0]
    except BROKEN_ARCHIVE as error:
        text = f"{origin}: the archive breaks off after {place} ({error}) — compress the file anew"
        yield Records(((str(origin), Mistake("broken_json", text)),))
    except OSError as error:
        raise Refusal(f"{origin}: cannot be read ({error.strerror or error})") from None


def line_at(path: Path, start: int, length: int) -> bytes:
    """A line of a .jsonl, by its place in bytes."""
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _batched(found: Iterable[Found], size: int = 0) -> Iterator[Records]:
    """In pieces; size: bytes of one record, about."""
    waiting = iter(found)
    while some := tuple(islice(waiting, CHUNK_RECORDS)):
        yield Records(some, size * len(some))


def sources(spec: str, folder: Path) -> list[Source]:
    """The parts of a spec; raises Refusal, beginning with the path, for what is not there, not readable or has no valid weight."""
    parts = [spec] if (folder / spec).is_file() else [part.strip() for part in spec.split(",")]
    return [_source(part, folder) for part in parts]


def _source(part: str, folder: Path) -> Source:
    name, weight = part, 1.0
    # The end of a name is a weight only if there is no such file; a glob that ends so is written part*[2].
    if (found := re.fullmatch(r"(.+)\*(\d+(?:\.\d*)?|\.\d+)", part)) and not (folder / part).exists():
        name, weight = found[1], float(found[2])
    if weight == 0:
        raise Refusal(f"{part}: the weight is 0 — a number above 0, or leave {name} out")
    if name.startswith(HUB):
        if not re.fullmatch(r"hub:[\w.-]+/[\w.-]+(:.+)?", name):
            raise Refusal(f"{name}: not a data set of the hub — write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT")
        return Source(name, weight, ())
    path = folder / name
    if path.is_file():
        if not _is_readable(path):
            raise Refusal(f"{path}: no file of this kind can be read — one of {', '.join(READABLE)}")
        return Source(name, weight, (path,))
    if name and path.is_dir():
        inside: Iterable[Path] = path.iterdir()
    elif any(character in name for character in "*?["):
        inside = map(Path, glob.glob(str(path), recursive=True))
    else:
        beside = sorted(p.name for p in path.parent.iterdir() if _is_readable(p)) if path.parent.is_dir() else []
        hint = f"the folder has {', '.join(beside[:8])}" if beside else f"the folder {path.parent} has no .json or .jsonl file"
        raise Refusal(f"{path}: no such file — {hint}")
    if not (readable := sorted(p for p in inside if p.is_file() and _is_readable(p))):
        raise Refusal(f"{path}: no file there can be read — one of {', '.join(READABLE)}")
    return Source(name, weight, tuple(readable))


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(READABLE)


def _list_or_lines(path: Path, stream: IO[bytes]) -> Iterator[Chunk]:
    first = next((line for line in stream if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
    stream.seek(0)
    if first.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        data = stream.read()
        found = list(_list(path, data))
        yield from _batched(found, len(data) // max(1, len(found)))
    else:
        yield from _lines(path, stream)


def _list(path: Path, data: bytes) -> Iterator[Found]:
    def line(position: int) -> str:
        # In a file of one line its number would say nothing.
        return f"{path}:{data.count(10, 0, position) + 1}" if b"\n" in data else str(path)

    if (nul := data.find(b"\0")) >= 0:
        yield str(path), Mistake("nul", f"{line(nul)}: byte {nul} is NUL — the file is damaged, or UTF-16: save it as UTF-8")
        return
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        yield str(path), Mistake("not_utf8", f"{line(error.start)}: byte {error.start} is not UTF-8 — save the file as UTF-8")
        return
    found = _quickly(data.removeprefix(BYTE_ORDER_MARK))
    if found is None:
        found = _json(text, str(path), lines=True)
    if isinstance(found, Mistake):
        yield str(path), found
        return
    escapes = "\\u" in text  # searched once: the text may have megabytes
    for index, record in enumerate(found):
        place = f"{path}#{index}"
        yield place, (_damage(record, place) or record) if escapes else record


def _lines(path: Path, stream: IO[bytes]) -> Iterator[Lines]:
    number, start = 1, 0
    waiting: list[bytes] = []
    size = 0
    try:
        for line in stream:  # bytes end with \n alone
            waiting.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield Lines(path, number, start, b"".join(waiting))
                number, start = number + len(waiting), start + size
                waiting, size = [], 0
    except BROKEN_ARCHIVE:
        if waiting:  # what was read before the break is told before it
            yield Lines(path, number, start, b"".join(waiting))
        raise
    if waiting:
        yield Lines(path, number, start, b"".join(waiting))


def _line(line: bytes, place: str) -> Any:
    """The record of a line, or a Mistake that says which byte is wrong."""
    found = _quickly(line)
    if found is None:
        if (nul := line.find(b"\0")) >= 0:
            return Mistake("nul", f"{place}: byte {nul} of the line is NUL — the file is damaged, or UTF-16: save it as UTF-8")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            return Mistake("not_utf8", f"{place}: byte {error.start} of the line is not UTF-8 — save the file as UTF-8")
        found = _json(text, place)
    return _damage(found, place) or found if b"\\u" in line else found


def _quickly(data: bytes) -> Any:
    """The JSON value by orjson, which takes only what is beyond doubt; None: let the slow and talkative parser look at it."""
    try:
        # orjson would round integers of more than 64 bits.
        return orjson.loads(data) if not re.search(rb"\d{19}", data) else None
    except orjson.JSONDecodeError:
        return None


def _without_mark(line: bytes, number: int) -> bytes:
    return line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def _json(text: str, place: str, lines: bool = False) -> Any:
    """The JSON value, or a Mistake; the last of equal keys counts."""
    try:
        return json.loads(text, parse_constant=no_json)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}" if lines else place
        return Mistake("broken_json", f"{where}: not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        return Mistake("broken_json", f"{place}: not JSON that can be read ({error})")


def no_json(constant: str) -> None:
    """Refuse NaN and Infinity, which Python's reader would take: no model could say them in a call that is read back."""
    raise ValueError(f"{constant} is no JSON")


def _damage(record: Any, place: str) -> Mistake | None:
    """What JSON's escapes let into a text and no tokenizer takes."""
    if isinstance(record, Mistake):
        return None
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            if "\0" in value:
                return Mistake("nul", f"{place}: a text has the character NUL (\\u0000) — take it out")
            if half := re.search("[\ud800-\udfff]", value):
                return Mistake("not_utf8", f"{place}: a text has half a character (\\u{ord(half[0]):04x}) — write both halves or none")
    return None


def _csv(path: Path, stream: IO[bytes]) -> Iterator[Records]:
    yield from _batched(_rows(path, stream))


def _rows(path: Path, stream: IO[bytes]) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)  # a conversation in one cell may be long
    # Bytes that are no UTF-8 become half characters, so that they are told by the row they stand in.
    wrapper = TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(wrapper)
    header: list[str] | None = None
    while True:
        place = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield place, Mistake("nul" if "NUL" in str(error) else "broken_json", f"{place}: not CSV ({error})")
            continue
        if row is None:
            wrapper.detach()  # the stream is its opener's to close
            return
        if damage := _damage(row, place):
            what = "NUL" if damage.kind == "nul" else "not UTF-8"
            yield place, Mistake(damage.kind, f"{place}: a byte of the row is {what} — save the file as UTF-8")
        elif header is None:
            header = row
        elif len(row) > len(header):
            text = f"{place}: {len(row)} cells, the header has {len(header)} — put a text with commas into quotes"
            yield place, Mistake("broken_json", text)
        elif row:
            yield place, _cells(dict(zip(header, row, strict=False)), place)


def _cells(record: dict[str, Any], place: str) -> dict[str, Any] | Mistake:
    for key in CELLS_OF_JSON:
        text = record.get(key, "")
        if text == "":
            record.pop(key, None)
        elif not isinstance(text, str):  # a column of lists or structs
            continue
        elif key in ("conversations", "messages") or text.lstrip().startswith(("[", "{")):
            record[key] = _json(text, f"{place}: {key}")
            if isinstance(record[key], Mistake):
                return Mistake("broken_json", str(record[key]))
    return record


def _parquet(path: Path) -> Iterator[Records]:
    try:
        with parquet.ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(CHUNK_RECORDS) for row in batch.to_pylist())
            found = ((f"{path}#{index}", _cells(_without_null(row), f"{path}#{index}")) for index, row in enumerate(rows))
            yield from _batched(found, path.stat().st_size // max(1, table.metadata.num_rows))
    except ArrowException as error:
        raise Refusal(f"{path}: cannot be read as Parquet ({_first_line(error)}) — write the file anew") from None


def _hub(name: str) -> Iterator[Found]:
    for index, row in enumerate(_rows_of_hub(name)):
        yield f"{name}#{index}", _without_null(row)


def content_name(name: str) -> str:
    """What tells one version of a hub's data set from another."""
    return f"{name} {getattr(_rows_of_hub(name), '_fingerprint', '')}"


@cache
def _rows_of_hub(name: str) -> Any:
    load = _load_dataset(name)
    dataset, _, split = name.removeprefix(HUB).partition(":")
    try:
        return load(dataset, split=split or "train")
    except Exception as error:  # of the network, of the hub, of the set's own files
        raise Refusal(
            f"{name}: the data set cannot be had ({_first_line(error)}) — where there is no network, copy its files here and name them"
        ) from None


def _load_dataset(name: str) -> Callable[..., Iterable[dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise Refusal(f"{name}: reading it needs the package datasets — pip install 'tunesmith[hub]'") from None
    return load_dataset  # type: ignore[no-any-return]  # an optional package, without types here


def _without_null(value: Any) -> Any:
    """A table gives every struct the keys of all others, filled with null: what is null was most likely never there."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
