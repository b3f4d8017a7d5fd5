"""Up to 1,024 ranks without a cluster: the plan, who gets which conversation, the words that start 128 nodes, and docs/scaling.md."""

from __future__ import annotations

import base64
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import scaling, wire
from launcher import slurm
from launcher.nodes import ROOT, WAYS, Meeting, by_ssh, deepspeed_env_text, for_pdsh, hostfile_text, in_slurm
from tests.test_plan import A10S, FULL, LORA, ON_A10, config_of
from tests.test_slurm import PLACE, golden
from tunesmith.config import Batching, EngineKind
from tunesmith.data.batches import Batches
from tunesmith.data.examples import Example, Examples, ListedExamples
from tunesmith.hardware import FAKE_MACHINE
from tunesmith.plan import Plan, make_plan
from tunesmith.plan.memory import held_bytes
from tunesmith.plan.network import REUSED
from tunesmith.plan.shapes import KNOWN

WORLDS = (1, 2, 4, 6, 8, 48, 96, 128, 512, 768, 1024)
SHAPE = KNOWN["qwen3-0.6b"]
NODE = replace(A10S, device_names=A10S.device_names[:1] * 8, memory_gib=A10S.memory_gib[:1] * 8)


def planned(world: int, **values: Any) -> Plan:
    config = config_of(**{**ON_A10, "model__known_as": SHAPE.name, "train__conversations_per_step": 3072, **values})
    return make_plan(config, NODE, world, local_size=min(world, 8))


# --- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FULL, LORA])
def test_any_number_of_ranks_makes_the_same_steps(kind: Any) -> None:
    """What is set is the step: ranks divide it, micro-batches cover it with less than one round to spare, and it is the same run."""
    plans = [planned(world, method__kind=kind) for world in WORLDS]
    assert len({(plan.run_id, plan.conversations_per_step, plan.flops.useful, plan.trained_weights) for plan in plans}) == 1
    for plan in plans:
        places = plan.micro_batch * plan.accumulation * plan.world_size
        assert 3072 <= places < 3072 + plan.accumulation * plan.world_size
        assert plan.nodes == -(-plan.world_size // 8)
        assert 0 < plan.efficiency <= 1
    assert all(after.time["matmul"] < before.time["matmul"] for before, after in pairwise(plans)), "each rank computes less"


def test_memory_of_a_rank_never_grows_with_ranks_or_stage() -> None:
    """Weights, gradients and optimizer of a rank; at equal micro-batches all else stays, but for what several ranks need at all."""
    states = {
        (zero, world): sum(held_bytes(SHAPE, planned(world, method__kind=FULL, engine__zero=zero).config, world).values())
        for zero in range(4)
        for world in WORLDS
    }
    for zero in range(4):
        assert all(states[zero, b] <= states[zero, a] for a, b in pairwise(WORLDS))
    for world in WORLDS[1:]:
        assert all(states[zero + 1, world] < states[zero, world] for zero in range(3))
    whole = [planned(world, method__kind=FULL, engine__zero=3, train__micro_batch=1).memory_gib for world in WORLDS[1:]]
    assert whole == sorted(whole, reverse=True)
    # bf16 weights, bf16 and fp32 gradients, fp32 master and two moments (2 + 6 + 12 bytes) are split to nothing, stage by stage.
    assert [states[zero, 1024] / SHAPE.total_weights for zero in range(4)] == pytest.approx([2 + 2 + 12, 2 + 2, 2, 0], abs=0.03)


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_those_of_rings(world: int) -> None:
    """Of S bytes a ring sends (n - 1) / n S for a reduce-scatter or an all-gather, and both for an all-reduce; a machine's network as much."""
    ring, weights, ends = (world - 1) / world, SHAPE.total_weights, SHAPE.embedding_weights + SHAPE.hidden

    a = 3072 // world

    def sent(**values: Any) -> float:
        plan = planned(world, method__kind=FULL, train__micro_batch=1, **values)
        assert plan.accumulation == a
        return plan.sent

    assert sent(engine__kind=EngineKind.accelerate, engine__zero=0) == pytest.approx(2 * 4 * weights * ring), "DDP's gradients are fp32"
    assert sent(engine__zero=0) == pytest.approx(2 * 2 * weights * ring)
    assert sent(engine__zero=1) == pytest.approx((2 + 1) * 2 * weights * ring), "reduced everywhere, then gathered"
    assert sent(engine__zero=2) == pytest.approx((2 * a + 1) * 2 * weights * ring), "reduced after each micro-batch"
    assert sent(engine__zero=3) == pytest.approx(a * (3 * weights - min(weights, REUSED / 2)) * 2 * ring)
    recomputed = a * (3 * weights - min(weights, REUSED / 3)) * 2 * ring
    assert sent(engine__zero=3, engine__checkpointing=True) == pytest.approx(recomputed)
    if world > 1:  # of one rank there is nothing to split
        fsdp = a * ((2 * weights - ends) * 2 + weights * 4) * ring
        assert sent(engine__kind=EngineKind.accelerate, engine__zero=0, engine__fsdp=True) == pytest.approx(fsdp)


# --- the data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples() -> Examples:
    lengths = np.random.default_rng(0).integers(2, 200, 5000)
    return ListedExamples([Example(np.arange(n, dtype=np.int32), np.arange(n) == n - 1, "") for n in lengths])


@pytest.mark.parametrize("tokens", [0, 120_000], ids=["conversations", "tokens"])
@pytest.mark.parametrize("batching", Batching)
def test_1024_ranks_train_the_steps_of_one(examples: Examples, batching: Batching, tokens: int) -> None:
    """The same conversations in the same steps, each on one rank, whatever the ranks; and a step is asked for without those before it."""

    def batches() -> Batches:
        return Batches(examples, 2048, 2, 7, batching, tokens_per_step=tokens, row=256, attention_cost=0.001)

    one, epoch = batches(), batches().steps_per_epoch
    steps = range(epoch - 1, epoch + 1)  # the last of an epoch, perhaps short, and the first of the next
    wanted = {step: sorted(one.conversations(step)) for step in steps}
    assert epoch > 2 and sorted(chain(*(one.conversations(step) for step in range(epoch)))) == list(range(len(examples)))
    for world in (1, 2, 8, 1024):
        uninterrupted = batches()
        dealt = {step: uninterrupted.split(step, world) for step in range(epoch - 1, epoch + 1)}
        for step in steps:
            assert sorted(chain(*chain(*dealt[step]))) == wanted[step]
            assert len(dealt[step]) == world and len({len(parts) for parts in dealt[step]}) == 1
        assert batches().split(epoch, world) == dealt[epoch], "resumed there"


# --- the words -----------------------------------------------------------------------------------------------------

MEETING = Meeting(tuple(f"node{number:03}" for number in range(1, 129)), 8, 29500)
WORDS = ["+exp=lora_a10", "train.conversations_per_step=1024", "data.system='It is ours, \"really\" $HOME'"]
SECRETS = {
    "WANDB_API_KEY": "hidden-wandb",
    "HF_TOKEN": "hidden-hub",
    "AWS_SECRET_ACCESS_KEY": "hidden-cloud",
    "NCCL_AUTH": "hidden-odd",
    "HTTPS_PROXY": "http://me:hidden-proxy@host",
}
ENVIRONMENT = {"PATH": "/shared/me/.venv/bin:/usr/bin", "HOME": "/home/me", "NCCL_SOCKET_IFNAME": "eth0", "WANDB_MODE": "online", **SECRETS}
LONGEST_WORD, LONGEST_LINE = 128 * 2**10, 2**21
"""Bytes that Linux takes as one argument (MAX_ARG_STRLEN: 32 pages of 4 KiB), and as all of a command (a quarter of an 8 MiB stack)."""


def commands() -> Iterator[tuple[str, list[str]]]:
    for via in WAYS[:-1]:
        yield f"in a job, --via {via}", in_slurm(via, MEETING, WORDS, hostfile="/shared/me/hostfile", cpus=32)
    for via in ("deepspeed", "torchrun", "accelerate"):
        started = by_ssh(via, MEETING, WORDS, ENVIRONMENT, hostfile="/shared/me/hostfile")
        for number in sorted({0, len(started) - 1}):
            yield f"by ssh, --via {via}, command {number + 1} of {len(started)}", started[number]


def test_golden_words_of_128_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 ranks by each way there is: none too long for a shell, none with a secret."""
    monkeypatch.chdir(ROOT)
    lines = [
        f"# {MEETING.size:,} ranks on {len(MEETING.hosts)} nodes, by each way to start them. ROOT and PYTHON are of the machine.",
        "", "# hostfile, the first and the last line", *(hosts := hostfile_text(MEETING).splitlines())[:: len(MEETING.hosts) - 1],
        "", "# .deepspeed_env", *deepspeed_env_text(ENVIRONMENT).splitlines(),
    ]  # fmt: skip
    for head, command in commands():
        assert max(len(word.encode()) for word in command) < LONGEST_WORD
        assert sum(len(word.encode()) + 9 for word in [*command, *ENVIRONMENT.values()]) < LONGEST_LINE, (
            "each with its end and a pointer to it"
        )
        lines += ["", f"# {head}", shlex.join(command).replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")]
    assert len(hosts) == 128
    # deepspeed hands nodes and slots to each of them in one word.
    slots = {host: list(range(MEETING.ranks)) for host in MEETING.hosts}
    assert len(base64.urlsafe_b64encode(json.dumps(slots).encode())) < LONGEST_WORD / 10
    text = "\n".join(lines) + "\n"
    assert "hidden" not in text + json.dumps(for_pdsh(ENVIRONMENT, Path("/shared/me/.deepspeed_env")))
    golden("launch_128_nodes.txt", text)


def test_golden_script_of_128_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE_MACHINE, json.dumps({"kind": "cpu", "cores": 8, "ram_gib": 64}))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    plan = slurm.plan_for(WORDS, 128, 8)
    assert (plan.world_size, plan.nodes) == (1024, 128)
    script = slurm.sbatch_text(plan, PLACE, [WORDS], via="torchrun", nodes=128)
    assert "hidden" not in script
    golden("slurm_128_nodes.sbatch", script)


# --- docs/scaling.md -----------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/scaling.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["bytes", "efficiency-25", "efficiency-100", "limits"])
def test_the_page_has_the_tables_of_the_plan(name: str) -> None:
    computed = scaling.tables()
    assert computed.keys() | {"measured"} == scaling.marked(PAGE).keys()
    assert scaling.marked(PAGE)[name] == computed[name], "python -m bench.scaling --write docs/scaling.md"


def test_overlap_hides_no_more_than_there_is() -> None:
    for method in scaling.METHODS:
        for engine in scaling.ENGINES:
            if found := scaling.way(method, engine, 64):
                for network in scaling.NETWORKS:
                    assert 0 <= found.hidden_s(network) <= found.waiting_s(network) < found.waiting_s(network / 2)
                    assert 0 < found.efficiency(network, overlap=False) <= found.efficiency(network, overlap=True) <= 1
                    assert found.card_s(network) > 64 * found.own_s / scaling.STEP


def room(run: wire.Run) -> float:
    """Losses and norms travel too, some kB; and a weight stays gathered whole or not at all, of 400,000 numbers here."""
    return 0.005 if run.reused == REUSED else 0.04


def test_what_was_measured_is_what_is_predicted_now() -> None:
    """The page's measured bytes, of a run long ago, against today's prediction; every run is there with 2 ranks and with 4."""
    rows = [row.strip("| ").split(" | ") for row in scaling.marked(PAGE)["measured"].splitlines()[2:]]
    assert [row[0] for row in rows] == list(map(str, wire.runs()))
    for run, row in zip(wire.runs(), rows, strict=True):
        for ranks, measured in zip((2, 4), row[2::2], strict=True):
            assert float(measured) * 1e6 == pytest.approx(wire.on_gloo(run.predicted(ranks)), rel=room(run)), run


@pytest.mark.launch
def test_real_ranks_send_what_is_predicted() -> None:
    """Each kind of engine in bf16 with three micro-batches a step: every byte of gloo's connections, as the kernel counts them."""
    full = {run.engine: run for run in wire.runs() if run.kind is FULL and run.accumulation == 3 and not run.checkpointing}
    assert full["ZeRO 3"].reused < REUSED
    wanted = [full[engine] for engine in ("DDP", "FSDP2", "ZeRO 2", "ZeRO 3")]
    found = wire.measured(2, [wire.runs().index(run) for run in wanted])
    assert [run for run, _ in found] == wanted
    for run, said in found:
        assert max(said) == pytest.approx(wire.on_gloo(run.predicted(2)), rel=room(run)), run
