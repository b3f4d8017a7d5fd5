"""Walks through the combinations of method, precision, engine, optimizer and checkpointing, on real ranks of a CPU.

    python -m tests.matrix MODEL ONE.json                                        one rank
    torchrun --nproc-per-node 2 -m tests.matrix MODEL TWO.json                   two
    python -m tests.matrix MODEL ONE.json LoRA/FSDP2/bf16/AdamW                  that one alone
    python -m tests.matrix page ONE.json TWO.json > docs/matrix.md

Each combination trains four updates of a small model, is held against what must be so, and is told in one record. One process walks
through all of them, as Hydra's multirun does.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from heapq import heapify, heappop, heappush
from itertools import combinations as combined
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tunesmith import checkpoint, engine, loop, metrics, model
from tunesmith.compose import compose
from tunesmith.config import Base, Batching, Compute, Config, Int8, changed, leaves
from tunesmith.data.batches import Batches
from tunesmith.data.examples import ListedExamples
from tunesmith.data.layout import Example
from tunesmith.hardware import prepare_environment, this_machine
from tunesmith.model.int8 import quantise_layers
from tunesmith.plan import Counts, Plan, PlanError, make_plan
from tunesmith.run import leave
from tunesmith.world import World, this_world

METHODS = {
    "full": ["method=full"],
    "LoRA": ["method=lora"],
    "rsLoRA": ["method=lora", "method.rslora=true"],
    "DoRA": ["method=lora", "method.dora=true"],
    "LoRA+": ["method=lora", "method.b_lr_ratio=2"],
    "LoRA from layer 1": ["method=lora", "method.first_layer=1"],
    "LoRA to layer 0": ["method=lora", "method.last_layer=0"],
    "LoRA and embedding": ["method=lora", "method.modules_to_save=[embed_tokens]"],
    "QLoRA (NF4)": ["method=qlora"],
    "LoRA on INT8": ["method=lora_int8"],
    "LoRA on INT8, dynamic": ["method=lora_int8", "precision.int8=dynamic"],
    "prefix": ["method=prefix", "method.virtual_tokens=5"],
    "prompt": ["method=prompt", "method.virtual_tokens=5", "optim.lr=0.3"],
}
ENGINES = {
    "Accelerate": ["engine=accelerate"],
    "FSDP2": ["engine=fsdp"],
    "ZeRO 0": ["engine=deepspeed", "engine.zero=0"],
    "ZeRO 1": ["engine=deepspeed", "engine.zero=1"],
    "ZeRO 2": ["engine=deepspeed", "engine.zero=2"],
    "ZeRO 3": ["engine=deepspeed", "engine.zero=3"],
    "ZeRO 2, offload": ["engine=deepspeed", "engine.zero=2", "engine.offload=true"],
    "ZeRO 3, offload": ["engine=deepspeed", "engine.zero=3", "engine.offload=true"],
}
PRECISIONS = {"fp32": ["precision=fp32"], "bf16": ["precision=bf16"], "fp16": ["precision=fp16"]}
OPTIMIZERS = {
    "AdamW": [],
    "AdamW 8 bit": ["optim.name=adamw_8bit"],
    "paged AdamW 8 bit": ["optim.name=paged_adamw_8bit"],
    "Adafactor": ["optim.name=adafactor", "optim.lr=3e-3"],
    "SGD": ["optim.name=sgd", "optim.lr=1"],
}
CHECKPOINTING = {"": [], "checkpointing": ["engine.checkpointing=true"], "checkpointing every 2": ["engine.checkpointing=true", "engine.checkpoint_every=2"]}
SOME = ("full", "LoRA", "QLoRA (NF4)", "prefix")
"""Of each way to keep weights one method: for what does not look at the method."""
USUAL = ("LoRA", "Accelerate", "fp32", "AdamW", "")
STEPS, SAVED = 4, 2
LOOKED_AT = 2
"""Conversations whose logits are compared."""
Names = tuple[str, str, str, str, str]
"""Of a combination: method, engine, precision, optimizer, checkpointing."""
TABLES: tuple[dict[str, list[str]], ...] = (METHODS, ENGINES, PRECISIONS, OPTIMIZERS, CHECKPOINTING)


def combinations() -> Iterator[Names]:
    """Every method and engine, then one thing more at a time."""
    spread = [name for name in ENGINES if "offload" not in name]
    yield from ((*names, "fp32", "AdamW", "") for names in product(METHODS, spread))
    yield from ((*names, "fp32", "AdamW", "") for names in product(SOME, ENGINES) if names[1] not in spread)
    yield from ((*names, "AdamW", "") for names in product(SOME, spread, ("bf16", "fp16")))
    for optimizer in list(OPTIMIZERS)[1:]:
        yield from ((*names, "fp32", optimizer, "") for names in product(("full", "LoRA"), spread))
    for checkpointing, methods in (("checkpointing", list(METHODS)), ("checkpointing every 2", list(SOME))):
        yield from ((*names, "fp32", "AdamW", checkpointing) for names in product(methods, ("Accelerate", "ZeRO 3")))


Pair = tuple[int, str, int, str]
"""Two things of a combination, each with its place there."""


def pairs(names: Names) -> set[Pair]:
    """Any two things that are together in a combination."""
    return {(i, names[i], j, names[j]) for i, j in combined(range(len(names)), 2)}


def alone(pair: Pair) -> Names:
    """The combination in which these two are all that is chosen."""
    chosen = list(USUAL)
    chosen[pair[0]], chosen[pair[2]] = pair[1], pair[3]
    return chosen[0], chosen[1], chosen[2], chosen[3], chosen[4]


def mixtures(is_legal: Callable[[Names], bool]) -> list[Names]:
    """Several things at a time: so few combinations that any two things which go together are together in one that trains."""
    everything: list[Names] = list(product(*TABLES))
    apart = {pair for names in everything for pair in pairs(names)}
    apart = {pair for pair in apart if not is_legal(alone(pair))}
    met = {pair for names in combinations() for pair in pairs(names)}
    found = []
    random.Random(0).shuffle(everything)  # else those of equal worth would have the same neighbours
    heap = [(-len(of - met), number) for number, names in enumerate(everything) if not (of := pairs(names)) & apart]
    heapify(heap)
    while heap:
        worth, number = heappop(heap)
        names = everything[number]
        if (now := -len(pairs(names) - met)) != worth:  # others have met some since; it only becomes less
            heappush(heap, (now, number))
        elif worth and is_legal(names):
            met |= pairs(names)
            found.append(names)
    return found


def name_of(names: Names) -> str:
    return "/".join(filter(None, names))


def named(name: str) -> Names:
    method, engine, precision, optimizer, *checkpointing = name.split("/")
    return method, engine, precision, optimizer, "".join(checkpointing)


def baseline(names: Names) -> Names:
    """What a combination's loss is held against: one process in fp32."""
    return names[0], "Accelerate", "fp32", names[3], ""


def words_of(names: Sequence[str]) -> list[str]:
    return [word for table, name in zip(TABLES, names, strict=True) for word in table[name]]


def conversations(count: int, vocabulary: int) -> list[Example]:
    draw, made = np.random.default_rng(0), []
    for length in draw.integers(6, 30, count):
        targets = draw.random(length) < 0.5
        targets[-1] = True
        made.append(Example(draw.integers(3, vocabulary, length).astype(np.int32), targets, "made up"))
    return made


class Walk:
    """One process's way through the combinations."""

    def __init__(self, folder: Path, world: World, out: Path):
        self.folder, self.world, self.out = folder, world, out
        self.machine = this_machine()
        self.device = torch.device("cpu")
        self.examples = ListedExamples(conversations(8, 300))
        self.common = [
            "name=matrix", "model=local", f"model.path={folder}", "data=local", "data.train=x.json", "data.max_tokens=64", f"train.steps={STEPS}",
            "train.conversations_per_step=8", f"train.micro_batch={4 // world.size}", "optim.lr=1e-2", "optim.warmup_steps=0", "optim.schedule=constant",
            "method.r=4", "hardware.peak=1e14", "hardware.threads=1", "engine.timeout_s=60", "tracker=none",
        ]  # fmt: skip

    def plan(self, words: Sequence[str]) -> tuple[Config, Plan]:
        config = compose([*self.common, *words])
        return config, self.planned(config, self.world.size)

    def planned(self, config: Config, ranks: int) -> Plan:
        return make_plan(config, self.machine, ranks, Counts(len(self.examples), longest_tokens=30), model_folder=self.folder)

    def typed(self, words: Sequence[str]) -> Config:
        """What these words compose to, each composed once: Hydra takes fifteen times as long as the plan."""
        in_order = sorted(words, key=lambda word: "." in word.partition("=")[0])  # a group does not take back what is typed beside it
        return changed(self.usual, {path: value for word in in_order for path, value in self.meaning(word).items()})

    @cached_property
    def usual(self) -> Config:
        return compose(self.common)

    @cache  # noqa: B019  # there is one walk in a process
    def meaning(self, word: str) -> dict[str, Any]:
        """What a word sets: one setting, or all of a group."""
        path = word.partition("=")[0]
        composed = compose([*self.common, word])
        return {name: attrgetter(name)(composed) for name, _ in leaves(composed) if name == path or name.startswith(f"{path}.")}

    def is_legal(self, names: Names) -> bool:
        """With two ranks, which more goes together with than with one."""
        try:
            self.planned(self.typed(words_of(names)), 2)
        except PlanError:
            return False
        return True

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """What becomes of a combination: trains, or refused with the plan's lines; raises AssertionError where it breaks a promise."""
        words = words_of(names)
        start = time.perf_counter()
        try:
            config, plan = self.plan(words)
        except PlanError as error:
            instead = self.instead(words, error.problems, self.world.size)
            return {"names": names, "ranks": self.world.size, "outcome": "refused", "lines": error.problems, "instead": instead}
        facts = self.train(config, plan)
        return {"names": names, "ranks": self.world.size, "outcome": "trains", "seconds": round(time.perf_counter() - start, 2), **facts}

    def instead(self, words: Sequence[str], lines: Sequence[str], ranks: int) -> list[str]:
        """What the refusal says to type, which must be legal."""
        typed = list(words)
        for _ in range(3):  # what is typed for one line may meet another rule
            for line in lines:
                assert line.count(" — type ") == 1 and "\n" not in line, line
                first = re.split(r", or |, ", line.partition(" — type ")[2])[0].split()
                assert first and all(re.fullmatch(r"[a-z_.]+=\S*", word) for word in first), line
                typed += first
            try:
                self.planned(self.typed(typed), ranks)
            except PlanError as error:
                lines = error.problems
            else:
                return typed[len(words) :]
        raise AssertionError(f"{words}: typing {typed[len(words) :]} is refused too: {lines}")

    def foresee(self, names: Names, ranks: int) -> bool:
        """Whether a combination is legal, without training it; raises AssertionError where what the refusal says to type is not."""
        words = words_of(names)
        try:
            self.planned(self.typed(words), ranks)
        except PlanError as error:
            self.instead(words, error.problems, ranks)
            return False
        return True

    def train(self, config: Config, plan: Plan) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(engine_broadcast(folder, self.world))
            parts = self.parts(config, plan, place)
            worker = parts.engine
            batches = parts.batches.micro_batches(0, self.world.rank, self.world.size)
            before, frozen, first = copied(worker.trained_state()), fingerprint(worker), mean(worker.evaluate(batches))
            assert all(weight.dtype is torch.float32 for weight in trained(worker)) or plan.deepspeed, "trainable weights are fp32"
            assert not innermost(worker).state, "the optimizer has taken a step already"
            for step in range(SAVED):
                numbers = loop.take_step(parts, step)
                assert 0 < numbers["speed/mfu"] <= numbers["speed/hfu"] < 1, numbers
            assert parts.checkpoints.save(SAVED)
            for step in range(SAVED, STEPS):
                loop.take_step(parts, step)
            after, last = copied(worker.trained_state()), mean(worker.evaluate(batches))
            assert last < first, f"the loss went from {first} to {last}"
            assert fingerprint(worker) == frozen, "a frozen weight changed"
            if before is not None and after is not None:
                same = [name for name in before if torch.equal(before[name], after[name])]
                assert not same, f"not trained: {same}"
            checkpoint.export(worker, place / "result")
            with torch.no_grad(), worker.for_generation() as inside:  # by all ranks: each may have a part of the weights
                logits = [logits_of(inside, example) for example in list(self.examples)[:LOOKED_AT]]
            if self.world.is_main:
                self.read_again(config, place / "result", after, last, logits)
            worker.close()

            again = self.parts(config, plan, place)
            assert again.checkpoints.restore() == SAVED
            for step in range(SAVED, STEPS):
                loop.take_step(again, step)
            resumed = again.engine.trained_state()
            if after is not None and resumed is not None:
                differ = [name for name in after if not torch.equal(after[name], resumed[name])]
                assert not differ, f"resumed to other bits: {differ}"
            again.engine.close()
            return {"loss": [round(first, 4), round(last, 4)]}

    def parts(self, config: Config, plan: Plan, place: Path) -> loop.Training:
        worker = engine.build_engine(config, plan, self.world, model.build_model(config, self.folder, self.device), self.device)
        batches = Batches(self.examples, 8, plan.micro_batch, 0, Batching.ragged, attention_cost=plan.attention_cost)
        meter, saves = metrics.Meter(self.device, self.world.size, 1e14), checkpoint.Checkpoints(place / "checkpoints", worker, 2)
        sensors: Any = metrics.CardSensors(self.device)
        nothing: Any = None
        return loop.Training(config, plan, worker, batches, [], meter, sensors, nothing, saves, nothing)

    def read_again(
        self, config: Config, result: Path, after: dict[str, torch.Tensor] | None, loss: float, logits: Sequence[torch.Tensor]
    ) -> None:
        """The result, loaded the plain way, gives the logits and the loss that training ended with."""
        assert after is not None
        if config.method.base is not Base.as_is:
            saved = load_file(result / "adapter_model.safetensors")
            stored = {name.removeprefix("model.").replace(".default", ""): weight for name, weight in after.items()}
            assert saved.keys() == stored.keys()
            assert all(torch.equal(saved[name], stored[name]) for name in saved)
        loaded, examples = plain(config, self.folder, result), list(self.examples)
        room = 1e-4 if config.precision.compute is Compute.fp32 and config.method.base is Base.as_is else 0.03
        for example, given in zip(examples, logits, strict=False):
            found = logits_of(loaded, example)
            apart = float((found - given).norm() / found.norm())
            assert apart < room, f"the export's logits are {apart:.2g} of their norm away from the run's"
        found = plain_loss(loaded, examples)
        assert abs(found - loss) < room * loss, f"the export's loss is {found}, the run's {loss}"


def engine_broadcast(item: str, world: World) -> str:
    box = [item]
    if world.size > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def copied(state: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    return None if state is None else {name: weight.clone() for name, weight in state.items()}


def trained(worker: engine.Engine) -> list[torch.Tensor]:
    return [weight for weight in worker.loss_module.parameters() if weight.requires_grad]


def innermost(worker: engine.Engine) -> torch.optim.Optimizer:
    """The optimizer that was made for it, inside of what Accelerate and DeepSpeed put around it."""
    found: Any = worker
    while hasattr(found, "engine") or hasattr(found, "optimizer"):
        found = found.engine if hasattr(found, "engine") else found.optimizer
    assert isinstance(found, torch.optim.Optimizer)
    return found


def fingerprint(worker: engine.Engine) -> str:
    """Of what this rank holds of all frozen weights."""
    total = hashlib.sha256()
    for _, layer in sorted(worker.loss_module.named_modules()):
        if (scales := getattr(layer, "scales", None)) is not None:  # of int8
            total.update(scales.numpy().tobytes())
    for _, weight in sorted(worker.loss_module.named_parameters()):
        if not weight.requires_grad:
            held = getattr(weight, "ds_tensor", weight.data)  # ZeRO 3 keeps a rank's part there
            held = held.to_local() if hasattr(held, "to_local") else held
            total.update(held.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def mean(found: tuple[float, int]) -> float:
    return found[0] / found[1]


def plain(config: Config, folder: Path, result: Path) -> Any:
    """A result as transformers, PEFT and bitsandbytes load it, on the base that it was trained beside; int8 by our own layers is ours."""
    if config.method.base is Base.as_is:
        return model.read_adapter(result, folder)
    dtype = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[config.precision.compute.value])
    given: dict[str, Any] = {}
    if config.method.base is Base.nf4:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    elif config.precision.int8 is Int8.bnb:
        given["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
    if not given:
        quantise_layers(base, torch.device("cpu"))
    return PeftModel.from_pretrained(base, result).eval()


@torch.no_grad()
def logits_of(loaded: Any, example: Example) -> torch.Tensor:
    """[tokens, vocabulary] of a conversation alone, by the library's own forward."""
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    logits: torch.Tensor = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]  # behind virtual tokens
    return logits.float()


def plain_loss(loaded: Any, examples: Sequence[Example]) -> float:
    """Nats a target token, each conversation alone."""
    total, count = 0.0, 0
    for example in examples:
        logits, targets = logits_of(loaded, example), torch.from_numpy(example.targets[1:])
        total += float(F.cross_entropy(logits[:-1][targets], torch.from_numpy(example.ids[1:].astype(np.int64))[targets], reduction="sum"))
        count += int(targets.sum())
    return total / count


def page(walks: Sequence[Sequence[dict[str, Any]]]) -> str:
    """docs/matrix.md from the records of the walks with one rank and with two."""
    found = {(*record["names"], record["ranks"]): record for walk in walks for record in walk}
    reasons: dict[str, int] = {}

    def cell(*names: str) -> str:
        told = []
        for ranks in (1, 2):
            record = found[(*names, ranks)]
            if record["outcome"] == "trains":
                told.append(str(ranks))
                continue
            numbers = [reasons.setdefault(line.partition(": ")[2], len(reasons) + 1) for line in record["lines"]]
            told.append("no " + " ".join(f"[{number}]" for number in numbers))
        return told[0] if told[0] == told[1] else ", ".join(told)

    def table(corner: str, rows: Sequence[str], columns: Sequence[str], names: Any) -> list[str]:
        lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        return [*lines, *(f"| {row} | {' | '.join(cell(*names(row, column)) for column in columns)} |" for row in rows), ""]

    spread, offload = ([name for name in ENGINES if ("offload" in name) is is_offload] for is_offload in (False, True))
    trains = sum(record["outcome"] == "trains" for record in found.values())
    lines = [
        "# What goes together", "",
        "This page is written from what `tests/test_matrix.py` finds: a 2-layer Llama, on a CPU, with one rank and with two. "
        f"Of {len(found)} combinations {trains} train and {len(found) - trains} are refused by the plan.", "",
        "A cell says with how many ranks the combination trains, and has a number in brackets where the plan refuses it. To train means that",
        "",
        "- the loss falls, and HFU is at least MFU and below 1;",
        "- every weight that is to be trained has changed, in fp32 (DeepSpeed's halves: beside an fp32 copy), and no other has, to the bit;",
        "- a run that goes on from a checkpoint ends with the same bits as one that never stopped;",
        "- the loss is that of one process by Accelerate in fp32 (to 0.2 %, in halves to 2 %);",
        "- the export, loaded by plain transformers, PEFT and bitsandbytes, gives the logits and the loss that training ended with "
        "(to 1e-4, in halves and beside a quantised base to 3 %; logits: of their norm); beside a quantised base, the same weights to the bit.", "",
        "A refusal is a line with what to type instead, and the test types it: what comes out is legal. "
        "What a card can do is in [doctor.md](doctor.md); what its memory holds, `tunesmith plan --fit` says. No card has run this test yet.", "",
        "## Methods and engines", "", "fp32, AdamW.", "",
        *table("method", list(METHODS), spread, lambda row, column: (row, column, "fp32", "AdamW", "")),
        *table("method", list(SOME), offload, lambda row, column: (row, column, "fp32", "AdamW", "")),
        "## Halves", "",
    ]  # fmt: skip
    for precision in ("bf16", "fp16"):
        lines += table(precision, list(SOME), spread, lambda row, column, precision=precision: (row, column, precision, "AdamW", ""))
    lines += ["## Optimizers", ""]
    for method in ("full", "LoRA"):
        lines += table(method, list(OPTIMIZERS), spread, lambda row, column, method=method: (method, column, "fp32", row, ""))
    lines += ["## Activation checkpointing", ""]
    for checkpointing, methods in (("checkpointing", list(METHODS)), ("checkpointing every 2", list(SOME))):
        lines += table(
            checkpointing, methods, ["Accelerate", "ZeRO 3"],
            lambda row, column, checkpointing=checkpointing: (row, column, "fp32", "AdamW", checkpointing),
        )  # fmt: skip
    mixed = [tuple(record["names"]) for record in walks[0] if tuple(record["names"]) not in set(combinations())]
    lines += [
        "## Several things at a time", "",
        "Chosen so that any two things which go together are together in one of these or above; the last are what losses are held "
        "against. What three or more together are refused for, the plan knows: a test asks it for five hundred of the others.", "",
        "| method | engine | type | optimizer | checkpointing | ranks |", "|---" * 6 + "|",
        *(f"| {' | '.join(names)} | {cell(*names)} |" for names in mixed), "",
    ]  # fmt: skip
    lines += ["## Why not", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    folder, out, *only = sys.argv[1:]
    if folder == "page":
        print(page([json.loads(Path(file).read_text()) for file in (out, *only)]), end="")
        return
    world = this_world()
    prepare_environment(on_cpu=True)
    walk = Walk(Path(folder), world, Path(out))
    engine.join(compose(walk.common), world, walk.device, 1, 0)
    gc.collect()
    gc.freeze()  # thousands of modules come and go: the collector need not look at the libraries each time
    records = []
    for names in [named(each) for each in only] or [*combinations(), *mixtures(walk.is_legal)]:
        try:
            records.append(walk.record(names))
        except Exception as error:
            print(f"rank {world.rank}: {', '.join(filter(None, names))}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            if world.size > 1:  # the others wait in a collective
                leave(1)
            records.append({"names": names, "ranks": world.size, "outcome": "failed", "error": f"{type(error).__name__}: {error}"})
        if world.is_main:
            print(records[-1], flush=True)
    if world.is_main:
        walk.out.write_text(json.dumps(records))
    leave(0)


if __name__ == "__main__":
    main()
