"""The three sets that training is measured on: real text, the same bytes each time, in a form that every framework reads.

| set | prompt | where from |
|---|---|---|
| short | the model's own system line and a request | the smart-home set, tools left out |
| medium | a question about Python | the manual that Python carries (pydoc), a passage as answer |
| long | 20 tool schemas, the same in every conversation, and a request | the smart-home set |
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model's own template puts in front where nothing is said: written out, so that every framework has it."""
TOOLS = 20
"""Schemas in the long prompt, which has 1,479 tokens with them."""
PASSAGE = 1400
"""Characters that a passage of the manual has at least, but for a topic's last: about 350 tokens."""


@dataclass(frozen=True)
class Set:
    """One set, and how it is measured."""

    name: str
    per_step: int
    """Conversations in an update."""
    steps: int
    """Updates in a window."""
    held_out: int
    """Conversations that the held-out loss is taken over."""
    peer: tuple[dict[str, object], ...]
    """Settings of the peer that are tried: the fastest is compared. Recomputation is off in all of them, which TRL has on by itself. On
    the long set an update takes minutes, and larger micro-batches, and padding-free, were slower (docs/benchmarks.md): there only
    micro-batches of four are tried besides, for the memory that they take."""
    more: dict[str, list[str]] = field(default_factory=dict)
    """Rows of ours beside those of every set."""
    less: tuple[str, ...] = ()
    """Rows of every set that this one has not."""


PADDED, FREE = {"padding_free": False}, {"padding_free": True}
SETS = {
    one.name: one
    for one in (
        Set("short", 8, 2, 32, ({"micro_batch": 8, **PADDED}, {"micro_batch": 4, **PADDED}, {"micro_batch": 8, **FREE})),
        Set("medium", 8, 1, 16, ({"micro_batch": 4, **PADDED}, {"micro_batch": 2, **PADDED}, {"micro_batch": 4, **FREE})),
        Set(
            "long", 32, 1, 8, ({"micro_batch": 1, **PADDED}, {"micro_batch": 4, **PADDED}),
            # Sides stand with all their memory while another one trains: more rows than these and 23 GiB are not enough.
            {"tunesmith fp32, matmul high, nothing shared": ["data.batching=length_grouped", "precision.matmul=high"]},
            ("tunesmith int8", "tunesmith int8, matmul high"),
        ),
    )
}


def write(chosen: Set, folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and dev.jsonl of a set, a conversation a line in OpenAI's form, and name them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": 400, "dev": chosen.held_out}
    if chosen.name == "medium":
        # Every 20th passage is held out.
        passages = list(_manual())
        found = {"train": [p for n, p in enumerate(passages) if n % 20], "dev": passages[::20]}
    else:
        found = {name: list(_requests(folder.parent, name, with_tools=chosen.name == "long")) for name in parts}
    for name, most in parts.items():
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in found[name][:most]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "train.jsonl", folder / "dev.jsonl"


def _requests(cache: Path, part: str, with_tools: bool) -> Iterator[list[dict[str, str]]]:
    """Requests to a smart home, answered by a call in JSON; with tools only those that the first schemas can answer."""
    from tunesmith.data.smart_home import prepare

    made = cache / "smart_home"
    made.mkdir(exist_ok=True)
    prepare(made, language="en", train=2000, dev=100, test=100)
    for record in json.loads((made / f"{part}.json").read_text("utf-8")):
        asked, call = record["conversations"]
        schemas = record["tools"][:TOOLS]
        if with_tools and call["name"] not in {schema["name"] for schema in schemas}:
            continue
        system = "You can call these tools:\n" + json.dumps(schemas) if with_tools else SYSTEM
        answer = json.dumps({"name": call["name"], "arguments": call["parameters"]}, ensure_ascii=False)
        yield [_says("system", system), _says("user", asked["content"]), _says("assistant", answer)]


def _manual() -> Iterator[list[dict[str, str]]]:
    """Passages of Python's manual, each as the answer to a question for it."""
    for topic in sorted(topics):
        passages = [""]
        for paragraph in topics[topic].split("\n\n"):
            if len(passages[-1]) >= PASSAGE:
                passages.append("")
            passages[-1] += paragraph.strip("\n")[: 2 * PASSAGE] + "\n\n"
        for number, passage in enumerate(passages, 1):
            if len(passage) > 400:
                asked = f"What does Python's reference say about {topic}? Give part {number} of {len(passages)}."
                yield [_says("system", SYSTEM), _says("user", asked), _says("assistant", passage.strip())]


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
