"""The cache of frozen layers: the same losses and gradients, nothing below computed twice, and never a state that is not there."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_flops import KERNELS
from tests.test_methods import stir, trained
from tests.test_model import CPU, config_for, examples, sharing_examples
from tests.test_plan import A10S, HERE, config_of
from tunesmith.config import Base, Batching, Compute, MethodKind, Refusal, changed
from tunesmith.data.batches import Batches, held_out_batches
from tunesmith.data.examples import ListedExamples
from tunesmith.data.layout import Example, MicroBatch
from tunesmith.data.prefixes import Beginnings
from tunesmith.model import FrozenStates, TargetLoss, build_model, decoder_layers
from tunesmith.model.frozen import RECORD, STATES, _runs
from tunesmith.plan import Counts, above_frozen, beside, describe, make_plan, problems, run_id, shape_of, step_flops
from tunesmith.run import RunFolder
from tunesmith.world import World

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

LAYERS, FIRST, WIDTH = 4, 2, 32
CONVERSATIONS = [*sharing_examples(), *examples(5)]
ON = {"method__cache_frozen": True, "method__first_layer": 15}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save(folder)
    return folder


def save(folder: Path, **more: Any) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **more)).save_pretrained(folder)


@dataclass
class Rank:
    """A process of a run, as far as the cache is concerned."""

    module: TargetLoss
    batches: Batches
    states: FrozenStates | None
    ran: list[int] = field(default_factory=list)
    """Numbers of the layers in the order in which they have computed."""

    def gradients(self, step: int, rank: int, ranks: int) -> tuple[float, list[torch.Tensor]]:
        """The sum of the losses of a step's micro-batches on this rank, and their gradients, accumulated."""
        self.module.zero_grad()
        total = 0.0
        for batch in self.batches.micro_batches(step, rank, ranks):
            loss = self.module(batch)
            loss.backward()
            total += loss.item()
        return total, [weight.grad.clone() for weight in trained(self.module).values()]

    def update(self, gradients: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for weight, gradient in zip(trained(self.module).values(), gradients, strict=True):
                weight -= 5e-4 * gradient  # of a sum over some fifty targets


def started(
    base: Path,
    folder: Path | None,
    *,
    batching: Batching = Batching.ragged,
    checkpointing: bool = False,
    prepares: bool = True,
    conversations: Sequence[Example] = CONVERSATIONS,
) -> Rank:
    """A rank's parts, with a cache in `folder` if one is named; prepares: it is the one that makes the file ready."""
    config = config_for(base, r=4, first_layer=FIRST)
    config.engine.checkpointing = checkpointing
    module = build_model(config, base, CPU)
    stir(module)
    for name, weight in trained(module).items():
        weight.data *= 0.1 if "lora_B" in name else 1  # else a last bit grows to more than 1e-5 in two updates
    states = frozen(base, folder, conversations=conversations) if folder else None
    batches = Batches(conversations, 5, 2, 0, batching, beginnings=states.beginnings if states else None)
    if states:
        module.take_states(states)
        if prepares:
            states.prepare()
        states.open()
    made = Rank(module, batches, states)
    for number, layer in enumerate(decoder_layers(module.model)):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: made.ran.append(number))
    return made


def frozen(
    base: Path,
    folder: Path,
    layer: int = FIRST,
    dtype: torch.dtype = torch.float32,
    conversations: Sequence[Example] = CONVERSATIONS,
) -> FrozenStates:
    return FrozenStates(folder, Beginnings(ListedExamples(conversations)), layer, WIDTH, dtype, base, "as_is")


def close(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (one, other))
    return float((a - b).norm() / b.norm()) < 1e-5


# --- which state belongs to which token ------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=6), min_size=1, max_size=8))
def test_each_beginning_has_one_number(texts: list[list[int]]) -> None:
    made = ListedExamples([Example(np.array(text, np.int32), np.arange(len(text)) == len(text) - 1, "made up") for text in texts])
    beginnings = Beginnings(made)
    numbers: dict[tuple[int, ...], int] = {}
    for number, text in enumerate(texts):
        rows = beginnings.rows(number).tolist()
        assert len(rows) == len(text) - 1, "what no target follows is not computed"
        for stop, row in enumerate(rows, start=1):
            assert numbers.setdefault(tuple(text[:stop]), row) == row
    assert sorted(numbers.values()) == list(range(len(beginnings)))


def test_stretches_of_neighbours() -> None:
    assert _runs(np.array([5, 6, 7, -1, -1, 0, 1, 9, 3])) == [(0, 3), (5, 7), (7, 8), (8, 9)]
    assert _runs(np.array([-1])) == []


# --- the same run, without computing anything twice ------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("batching", [Batching.ragged, Batching.packed, Batching.padded])
def test_two_epochs_are_those_without_it(batching: Batching, checkpointing: bool, base: Path, tmp_path: Path) -> None:
    """Losses and gradients of every step; from the second epoch on no layer below the lowest trained one runs, but for evaluations."""
    with_it, without = (started(base, folder, batching=batching, checkpointing=checkpointing) for folder in (tmp_path / "frozen", None))
    dev = held_out_batches(examples(3, seed=9), 3, 0, 1)
    epoch = with_it.batches.steps_per_epoch
    for step in range(2 * epoch):
        with_it.ran.clear()
        (loss, mine), (wanted, theirs) = (one.gradients(step, 0, 1) for one in (with_it, without))
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert close(mine, theirs)
        assert (min(with_it.ran) == FIRST) == (step >= epoch)
        for one, gradients in ((with_it, mine), (without, theirs)):
            one.batches.note(step)
            one.update(gradients)
        with torch.no_grad():
            assert with_it.module(dev[0]).item() == pytest.approx(without.module(dev[0]).item(), rel=1e-5)
        assert 0 in with_it.ran, "held-out conversations are computed from the embedding on"


def test_what_is_kept_is_what_the_layers_gave(base: Path, tmp_path: Path) -> None:
    """To the bit, and to 1e-5 what each conversation alone gives, whichever micro-batch it was in."""
    rank = started(base, tmp_path / "frozen")
    assert rank.states
    given: list[torch.Tensor] = []
    lowest = decoder_layers(rank.module.model)[FIRST]
    lowest.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0].clone()))
    for step in range(rank.batches.steps_per_epoch):
        for batch in rank.batches.micro_batches(step, 0, 1):
            rank.module(batch)
            assert batch.kept
            new = batch.kept.new
            assert torch.equal(rank.states.read(batch.kept.rows[new]), given[-1][new])
        rank.batches.note(step)
    assert rank.states.beginnings.written.all()
    for number, example in enumerate(CONVERSATIONS):
        with torch.no_grad():
            rank.module(held_out_batches([example], 1, 0, 1)[0])
        kept = rank.states.read(rank.states.beginnings.rows(number))
        assert float((kept - given[-1]).abs().max() / given[-1].abs().max()) < 1e-5


def test_two_ranks_write_each_state_once_and_read_each_others(base: Path, tmp_path: Path) -> None:
    alone = started(base, None)
    ranks = [started(base, tmp_path / "frozen", prepares=number == 0) for number in range(2)]
    written: list[np.ndarray] = []
    for rank in ranks:
        assert rank.states
        rank.states.write = lambda rows, states, write=rank.states.write: (written.append(rows), write(rows, states))[1]  # type: ignore[method-assign]
    epoch = alone.batches.steps_per_epoch
    for step in range(2 * epoch):
        found = {number: ranks[number].gradients(step, number, 2) for number in ((0, 1), (1, 0))[step % 2]}
        together = [one + other for one, other in zip(found[0][1], found[1][1], strict=True)]
        wanted, theirs = alone.gradients(step, 0, 1)
        assert found[0][0] + found[1][0] == pytest.approx(wanted, rel=1e-5)
        assert close(together, theirs)
        alone.update(theirs)
        for rank in ranks:
            rank.batches.note(step)
            rank.update(together)
        if step == epoch - 1:
            for rank in ranks:
                rank.ran.clear()
    rows = np.concatenate(written)
    assert sorted(rows.tolist()) == list(range(len(ranks[0].batches.beginnings or ())))
    dealt = [ranks[0].batches.split(step, 2) for step in range(epoch, 2 * epoch)]
    idle = any(not part for parts in dealt for part in parts[1])
    assert min(ranks[0].ran) == FIRST
    assert min(ranks[1].ran) == (0 if idle else FIRST), "a stand-in is computed as ever"


def test_flops_are_those_that_are_executed(base: Path, tmp_path: Path) -> None:
    """To the last one, for both kinds of micro-batch."""
    begin, draw = np.arange(20), np.random.default_rng(0)
    texts = [np.concatenate([begin, draw.integers(0, 300, 12)]).astype(np.int32) for _ in range(4)]  # equally long: no cell is wasted
    alike = [Example(text, np.arange(len(text)) > 23, "made up") for text in texts]
    rank = started(base, tmp_path / "frozen", conversations=alike)
    shape, method = shape_of(str(base)), config_for(base, r=4, first_layer=FIRST).method
    for step, known in ((0, False), (0, True)):
        work = rank.batches.work(step, 1, 0, known=known)
        assert work == rank.batches.work(step, 1, 0)
        assert not rank.batches.work(step, 1, 0, known=not known).lengths
        with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
            rank.gradients(step, 0, 1)
        planned = step_flops(
            *(above_frozen(shape, method) if known else (shape, method)), work.lengths, work.logits, contexts=work.contexts,
            micro_batches=work.micro_batches,
        )  # fmt: skip
        assert counter.get_total_flops() == planned.executed
        rank.batches.note(step)


# --- what a crash leaves ---------------------------------------------------------------------------------------------


def test_a_later_start_reads_what_was_committed_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """Steps behind the last commit may be torn: they are computed again. In a world of another size, too."""
    folder = tmp_path / "frozen"
    crashed, without = started(base, folder), started(base, None)
    assert crashed.states
    for step in range(2):
        crashed.gradients(step, 0, 1)
        crashed.batches.note(step)
        if step == 0:
            crashed.states.commit()
    committed = {number for number in crashed.batches.conversations(0)}
    torn = crashed.states.beginnings.rows(next(n for n in crashed.batches.conversations(1) if CONVERSATIONS[n].ids[0] != CONVERSATIONS[0].ids[0]))
    crashed.states.write(torn, torch.full((len(torn), WIDTH), torch.nan))
    crashed.states.close()

    for ranks in (1, 2):
        later = started(base, folder)
        assert later.states and later.batches.beginnings
        assert later.batches.beginnings.are_written(sorted(committed))
        assert not later.batches.beginnings.written[torn].any()
        for step in range(later.batches.steps_per_epoch):
            found = [later.gradients(step, rank, ranks) for rank in range(ranks)]
            wanted = [without.gradients(step, rank, ranks) for rank in range(ranks)]
            assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)
            later.batches.note(step)
        later.states.close()


def test_what_belongs_to_something_else_is_not_read(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "frozen"
    save(base)

    def have(states: FrozenStates) -> int:
        states.prepare()
        states.open()
        states.close()
        return int(states.beginnings.written.sum())

    def fill() -> int:
        states = frozen(base, folder)
        states.prepare()
        states.open()
        states.beginnings.written[:] = True
        states.commit()
        states.close()
        return len(states.beginnings)

    assert have(frozen(base, folder)) == 0
    count = fill()
    assert have(frozen(base, folder)) == count
    assert have(frozen(base, folder, layer=FIRST + 1)) == 0, "another layer"
    fill()
    assert have(frozen(base, folder, dtype=torch.bfloat16)) == 0, "another type"
    fill()
    os.utime(base / "model.safetensors")
    assert have(frozen(base, folder)) == 0, "other weights"
    fill()
    (folder / STATES).write_bytes((folder / STATES).read_bytes()[:-4])
    assert have(frozen(base, folder)) == 0, "a file that ends early"
    fill()
    record = (folder / RECORD).read_text()
    (folder / RECORD).write_text(record[:-9])
    assert have(frozen(base, folder)) == 0, "a record that ends early"
    assert json.loads(record)["written"] == [[0, count]]
    frozen(base, folder).remove()
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_come_back_to_the_bit(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    states = frozen(base, tmp_path / "frozen", dtype=dtype)
    states.prepare()
    states.open()
    rows, numbers = np.array([7, 8, 3, 0]), torch.randn(4, WIDTH).to(dtype)
    states.write(rows, numbers)
    assert torch.equal(states.read(np.array([3, -1, 7, 8, 0])), numbers[[2, 0, 0, 1, 3]] * torch.tensor([[1], [0], [1], [1], [1]], dtype=dtype))
    with pytest.raises(RuntimeError, match="layer 2 is given"):
        states.write(rows, numbers.double())
    states.close()


# --- what is refused, and what the plan says -------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no frozen layer": ({"method__first_layer": 0}, "method.first_layer=0 trains every layer from the lowest on — type method.first_layer=15,"),
    "full": ({"method__kind": MethodKind.full, "method__first_layer": 0}, "method.kind=full trains every layer — type method=lora method.first_layer=15,"),
    "prefix": ({"method__kind": MethodKind.prefix, "method__first_layer": 0}, "method.kind=prefix trains a prefix that every layer sees — type method=lora"),
    "prompt": ({"method__kind": MethodKind.prompt, "method__first_layer": 0}, "method.kind=prompt trains a prompt that every layer sees — type method=lora"),
    "tied head": ({"method__modules_to_save": ["lm_head"]}, "method.modules_to_save trains the embedding, which is the head too, below all layers — type"),
    "noise": ({"optim__neftune_alpha": 5.0}, "optim.neftune_alpha=5 puts other noise below all layers each time — type optim.neftune_alpha=0,"),
    "int8": ({"method__base": Base.int8}, "method.base=int8 rounds a token's numbers by what is in the micro-batch beside it — type method.base=as_is,"),
    "ZeRO 3": ({"engine__zero": 3}, "under engine.zero=3 all ranks gather every layer together, and none may leave one out — type engine.zero=2,"),
    "streaming": ({"data__streaming": True}, "data.streaming=true keeps no tokens, by which a state is found — type data.streaming=false,"),
    "one epoch": ({"train__epochs": 1.0}, "train.epochs=1 computes nothing twice — type train.epochs=3,"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_be_the_same_is_refused(settings: dict[str, Any], said: str) -> None:
    shape = shape_of("somewhere", "smollm2-135m")
    config = config_of(**{**ON, **settings})
    (line,) = problems(config, HERE, 1, shape)
    assert line.startswith(f"method.cache_frozen=true: {said}")
    assert line.endswith("or method.cache_frozen=false")
    assert not problems(changed(config, {"method.cache_frozen": False}), HERE, 1, shape)


def test_layers_in_another_type_and_several_machines_are_refused() -> None:
    shape = shape_of("somewhere", "smollm2-135m")
    config = config_of(**ON, hardware__card="a10", precision__compute=Compute.bf16, precision__fp32_layers=["layers.3"])
    config = changed(config, {"engine.kind": type(config.engine.kind).accelerate})
    assert any("precision.fp32_layers makes states of a type that is not planned for" in line for line in problems(config, A10S, 4, shape))
    (line,) = problems(config_of(**ON), HERE, 4, shape, local_size=2)
    assert "2 machines" in line
    assert not problems(config_of(**ON), HERE, 2, shape, local_size=2)


def test_a_model_that_drops_numbers_at_random_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "base", attention_dropout=0.1)
    with pytest.raises(Refusal, match=r"below layer 2 this model drops numbers at random while it trains \(attention_dropout 0.1\)"):
        started(tmp_path / "base", tmp_path / "frozen")


def test_a_disk_without_room_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**4, 10**4))
    with pytest.raises(Refusal, match=r"GiB for \d+ states, and 9.3e-06 GiB are free in .* — .* or type method.cache_frozen=false"):
        frozen(base, tmp_path / "frozen").prepare()
    assert not (tmp_path / "frozen").exists()


def test_a_run_without_room_is_refused_before_its_model_loads(tmp_path: Path) -> None:
    config = config_of(**ON, outputs=str(tmp_path))
    plan = make_plan(config, HERE, 1, Counts(400, tokens=40_000, longest_tokens=200, beginnings=10**13))
    with pytest.raises(Refusal, match=r"GiB free in outputs=.*, the checkpoints need about 0.1 GiB and the states 21457672.1 GiB — .* method.cache_frozen=false"):
        RunFolder.of(config, plan.run_id, World()).open(config, plan, "data")


def test_the_plan_says_what_it_takes_and_saves() -> None:
    config = config_of(**ON, train__epochs=4.0, hardware__peak="1e11", train__save_every=0)
    off = changed(config, {"method.cache_frozen": False})
    before = make_plan(config, HERE, 1)
    assert "cache    576 numbers x 4 bytes a token on disk; a step of tokens that are there takes" in describe(before)
    on, plain = (
        make_plan(one, HERE, 1, Counts(400, tokens=40_000, longest_tokens=200, beginnings=count)) for one, count in ((config, 31_000), (off, 0))
    )
    assert on.cache
    assert on.cache_gib == 31_000 * 576 * 4 / 2**30
    share = 1 - on.cache.flops.executed / on.flops.executed
    shape, tokens, scores = on.shape, 16 * 200, 16 * 200 * 201 // 2
    assert on.flops.executed - on.cache.flops.executed == 15 * (2 * shape.matmul_weights_per_layer * tokens + 4 * shape.query_width * scores)
    assert f"cache    {on.cache_gib:.3g} GiB more on disk: 31,000 tokens x 576 numbers x 4 bytes; a step of tokens that are there takes {share:.0%} fewer FLOPs, {on.cached_step_s:.3g} s" in describe(on)  # fmt: skip
    assert (on.flops, on.step_s, on.memory) == (plain.flops, plain.step_s, plain.memory)
    assert on.steps == 100
    assert on.hours == pytest.approx((25 * on.step_s + 75 * on.cached_step_s) / 3600)
    assert on.predicted(cached=True)["plan/step_s"] == on.cached_step_s < on.step_s == on.predicted()["plan/step_s"]
    assert "cache " not in describe(plain)
    assert run_id(config) == run_id(off)
    rows = [{"time/step_s": second, "data/cached_tokens": cached} for second, cached in ((9.0, 0), (9.0, 0), (9.0, 0), (4.0, 0), (2.0, 7))]
    assert beside(on, rows) == f"step {on.step_s:.3g} s predicted, 4 measured; cached step {on.cached_step_s:.3g} s predicted, 2 measured"
    once = make_plan(changed(config, {"train.steps": 20}), HERE, 1, Counts(400, tokens=40_000, longest_tokens=200, beginnings=31_000))
    assert any("nothing is read again" in note for note in once.notes)


def test_the_states_have_the_type_that_was_planned(base: Path, tmp_path: Path) -> None:
    """NF4 makes norms and embedding fp32, and so what goes from layer to layer."""
    assert make_plan(config_of(**ON, method__base=Base.nf4, precision__compute=Compute.bf16), HERE, 1).cache.number_bytes == 2  # DeepSpeed
    config = config_for(base, r=4, first_layer=FIRST, base=Base.nf4)
    module = build_model(config, base, CPU)
    states = frozen(base, tmp_path / "frozen")
    module.take_states(states)
    states.prepare()
    states.open()
    batches = Batches(CONVERSATIONS, 5, 5, 0, Batching.ragged, beginnings=states.beginnings)
    found: list[MicroBatch] = batches.micro_batches(0, 0, 1)
    first = module(found[0]).item()
    batches.note(0)
    (again,) = batches.micro_batches(0, 0, 1)
    assert again.kept and again.kept.known
    assert module(again).item() == pytest.approx(first, rel=1e-6)
