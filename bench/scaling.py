"""Where more A10 stop paying, from the plan's arithmetic: the tables of docs/scaling.md. Nothing here is measured.

    python -m bench.scaling                         print the tables
    python -m bench.scaling --write docs/scaling.md     and put each between its marks in the page

Machines of four A10 on PCI Express, joined by 25 or 100 Gbit/s. Every rank count trains the same steps of STEP conversations, so with
more ranks each computes less between two exchanges. What each rank sends is held against real ranks by bench/wire.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.config import Base, Compute, Config, EngineKind, MethodKind, changed
from tunesmith.hardware import CARDS, Machine
from tunesmith.plan import Plan, PlanError, make_plan
from tunesmith.plan.network import Traffic, network_bytes_per_s, traffic
from tunesmith.plan.pace import speed_of

LOCAL, STEP, TOKENS = 4, 1024, 1024
"""Cards of a machine, conversations of a step, tokens of each."""
RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
NETWORKS = (25.0, 100.0)
"""Gbit/s of each machine."""
TOO_DEAR = 1.5
"""Cost of a conversation, against the cheapest number of ranks, from which on more of them do not pay."""
A10 = CARDS["a10"]
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, Qwen3-4B": {"model.known_as": "qwen3-4b", "method.kind": MethodKind.lora},
    "QLoRA, Llama-3.1-8B": {"model.known_as": "llama-3.1-8b", "method.kind": MethodKind.lora, "method.base": Base.nf4},
    "full, Qwen3-0.6B": {"model.known_as": "qwen3-0.6b", "method.kind": MethodKind.full},
    "full, Qwen3-1.7B": {"model.known_as": "qwen3-1.7b", "method.kind": MethodKind.full},
}
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {"engine.kind": EngineKind.accelerate, "engine.zero": 0},
    "FSDP2": {"engine.kind": EngineKind.accelerate, "engine.zero": 0, "engine.fsdp": True},
    **{f"ZeRO {zero}": {"engine.kind": EngineKind.deepspeed, "engine.zero": zero} for zero in (1, 2, 3)},
}


@dataclass(frozen=True)
class Way:
    """One method by one engine on so many ranks: its plan, and what each rank sends."""

    plan: Plan
    traffic: Traffic

    def waiting_s(self, gbit_per_s: float) -> float:
        """Seconds of a step for communication, if nothing overlaps."""
        config = changed(self.plan.config, {"hardware.network_gbit_per_s": gbit_per_s})
        link = speed_of(A10, config.precision.compute).link_bytes_per_s
        return self.traffic.seconds(self.plan.world_size, self.plan.local_size, link, network_bytes_per_s(config))

    @property
    def own_s(self) -> float:
        """Seconds of a step without communication."""
        return self.plan.step_s - self.plan.time["communication"]

    def hidden_s(self, gbit_per_s: float) -> float:
        """Seconds of communication that pass behind computing at best: what the engines start early enough.

        DDP and ZeRO 1 send gradients during the backward of a step's last micro-batch, ZeRO 2 during each, and FSDP2 and ZeRO 3 fetch
        the next layer during all of forward and backward. What ZeRO 1 and 2 gather after the update nobody computes beside.
        """
        plan, config = self.plan, self.plan.config
        computing, waiting = plan.time["matmul"] + plan.time["memory"] + plan.time["operators"], self.waiting_s(gbit_per_s)
        if config.engine.fsdp or config.engine.zero == 3:
            return min(waiting, computing)
        # In units of a forward: backward is as much for the activations and as much again for weights that are trained.
        backward = 1 + (config.method.kind is MethodKind.full) + config.engine.checkpointing
        behind = computing * backward / (1 + backward) / (1 if config.engine.zero == 2 else plan.accumulation)
        return min(waiting * self.traffic.reduced / self.traffic.sent, behind)

    def efficiency(self, gbit_per_s: float, *, overlap: bool) -> float:
        """Share of a step in which a rank does not wait for others."""
        waiting = self.waiting_s(gbit_per_s) - (self.hidden_s(gbit_per_s) if overlap else 0.0)
        return self.own_s / (self.own_s + waiting)

    def card_s(self, gbit_per_s: float) -> float:
        """Seconds of one card that a conversation costs, if nothing overlaps."""
        return self.plan.world_size * (self.own_s + self.waiting_s(gbit_per_s)) / STEP


@cache
def way(method: str, engine: str, ranks: int) -> Way | None:
    """The faster of recomputing layers and not, of those that fit; None: neither does, or the plan refuses it."""
    config = Config(name="scaling")
    config.model.path = config.data.train = "none.json"
    config.data.max_tokens, config.train.conversations_per_step = TOKENS, STEP
    config.hardware.card, config.precision.compute = A10.key, Compute.bf16
    local = min(ranks, LOCAL)
    machine = Machine("cuda", A10.names * local, (A10.memory_gib,) * local, 32, 128.0)
    found = []
    for checkpointing in (False, True):
        asked = changed(config, {**METHODS[method], **ENGINES[engine], "engine.checkpointing": checkpointing})
        try:
            found.append(make_plan(asked, machine, ranks, local_size=local))
        except PlanError:
            continue
    if not found:
        return None
    plan = min(found, key=lambda plan: plan.step_s)
    return Way(plan, traffic(plan.shape, plan.config, ranks, plan.accumulation, plan.trained_weights))


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def size(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"


def bytes_table(ranks: int = 16) -> str:
    """What a rank sends in a step, and how many micro-batches that is."""

    def rows() -> Iterator[list[str]]:
        for method in METHODS:
            for engine in ENGINES:
                if found := way(method, engine, ranks):
                    sent = found.traffic
                    parts = [size(part) if part else "—" for part in (sent.reduced, sent.scattered, sent.gathered)]
                    times = [*map(found.waiting_s, NETWORKS), found.own_s]
                    yield [method, engine, str(found.plan.accumulation), *parts, size(sent.sent), *(f"{time:.3g} s" for time in times)]
                else:
                    yield [method, engine, "does not go", *["—"] * 7]

    head = ["", "", "micro-batches", "all-reduce", "reduce-scatter", "all-gather", "sent a step"]
    return table([*head, *(f"at {network:g} Gbit/s" for network in NETWORKS), "computing"], rows())


def efficiency_table(network: float) -> str:
    """Share of a step that is not waiting, in per cent: without overlap, and with all the overlap there can be."""

    def cell(found: Way | None) -> str:
        if found is None:
            return "—"
        low, high = (round(100 * found.efficiency(network, overlap=overlap)) for overlap in (False, True))
        return f"{low}" if low == high else f"{low}–{high}"

    rows = ([method, engine, *(cell(way(method, engine, ranks)) for ranks in RANKS)] for method in METHODS for engine in ENGINES)
    return table(["", "", *(f"{ranks:,}" for ranks in RANKS)], rows)


def limits(method: str, engine: str, network: float) -> tuple[int, int, int]:
    """The most ranks of RANKS that wait less than half of a step, without overlap and with; that cost less than TOO_DEAR. 0: none."""
    found = {ranks: one for ranks in RANKS if (one := way(method, engine, ranks))}
    if not found:
        return 0, 0, 0
    cheapest = min(one.card_s(network) for one in found.values())
    low, high = (max((n for n, one in found.items() if one.efficiency(network, overlap=late) >= 0.5), default=0) for late in (False, True))
    return low, high, max(n for n, one in found.items() if one.card_s(network) <= TOO_DEAR * cheapest)


def limits_table() -> str:
    """Where it stops paying: the most ranks, of RANKS, before each limit."""

    def rows() -> Iterator[list[str]]:
        for method in METHODS:
            for engine in ENGINES:
                cells = []
                for low, high, cheap in (limits(method, engine, network) for network in NETWORKS):
                    cells += [f"{low:,}" if low == high else f"{low:,}–{high:,}", f"{cheap:,}"] if cheap else ["—", "—"]
                yield [method, engine, *cells]

    head = [
        words
        for network in NETWORKS
        for words in (f"at least half computing, {network:g} Gbit/s", f"at most {TOO_DEAR} x the price, {network:g} Gbit/s")
    ]
    return table(["", "", *head], rows())


def tables() -> dict[str, str]:
    """Every computed table of docs/scaling.md, by the name that its marks have there."""
    return {
        "bytes": bytes_table(),
        **{f"efficiency-{network:g}": efficiency_table(network) for network in NETWORKS},
        "limits": limits_table(),
    }


def marked(page: str) -> dict[str, str]:
    """What stands between marks in a page, by their names."""
    return {name: text for name, text in re.findall(r"<!-- (\S+) -->\n(.*?)\n<!-- end -->", page, re.S)}


def written(page: str) -> str:
    """The page with every computed table put in anew."""
    for name, text in tables().items():
        start, rest = page.split(mark := f"<!-- {name} -->\n")
        page = f"{start}{mark}{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    asked = parser.parse_args()
    if asked.write:
        asked.write.write_text(written(asked.write.read_text("utf-8")), "utf-8")
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
