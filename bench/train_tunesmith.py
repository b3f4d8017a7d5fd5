"""tunesmith under the comparison of bench/train.py: the rooms that train.py goes through, and its own train loop.

asked["without"] names parts of bench/ablation.py that are switched off first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.ablation import BEFORE_TORCH, PARTS, switch_off
from tunesmith.compose import COMPOSITION_ERRORS, compose, explain
from tunesmith.config import Config, Refusal
from tunesmith.hardware import prepare_environment, this_machine
from tunesmith.plan import make_plan
from tunesmith.world import World


def settings(asked: dict[str, Any]) -> Config:
    """The config of a measurement: the same run as the peer's, and the row's own settings over it."""
    return compose(
        [
            "name=bench", "data=local", "data.folder=", f"data.train={asked['train']}", f"data.dev={asked['dev']}", "data.template=own",
            "data.max_tokens=4096", f"train.steps={asked['steps']}", f"train.conversations_per_step={asked['per_step']}",
            "train.save_every=0", "train.eval_every=0", "optim.schedule=constant", "optim.warmup_steps=0", f"optim.lr={asked['lr']}",
            "engine=accelerate", f"hardware.threads={asked['threads']}", *asked["overrides"],
        ]
    )  # fmt: skip


def main(asked: dict[str, Any]) -> None:
    config, machine, without = settings(asked), this_machine(), set(asked["without"])
    switch_off(without & BEFORE_TORCH)
    prepare_environment(on_cpu=True)
    from bench.protocol import Worker
    from tunesmith import checkpoint, data, engine, loop, metrics, model

    base = model.model_folder(config.model)
    worker = Worker(lambda: loop.held_out(built, parts.dev)["dev/loss"])
    worker.imported()
    switch_off(name for name in PARTS if name in without - BEFORE_TORCH)
    dataset = data.load(config, model.load_tokenizer(base))
    plan = make_plan(config, machine, 1, dataset.counts(config), model_folder=base)
    worker.facts["micro_batch"] = plan.micro_batch
    if asked["tokens"]:
        batches = loop.batches_of(config, plan, dataset)
        order = [number for step in range(plan.steps) for number in batches.conversations(step)]
        works = [batches.work(step, 1) for step in range(plan.steps)]
        rows = {
            name: [[one.ids.tolist(), one.targets.tolist()] for one in part]
            for name, part in (("train", dataset.train), ("dev", dataset.dev))
        }
        facts = {
            "order": order, "trained": plan.trained_weights, "model": str(base), "micro_batch": plan.micro_batch,
            "targets": [work.targets for work in works], "computed": [sum(work.padded_lengths) for work in works],
            "conversation_tokens": [work.conversation_tokens for work in works],
        }  # fmt: skip
        Path(asked["tokens"]).write_text(json.dumps(rows | facts))
        return

    class Windows:
        """A sink: it hears of each update when the loop has done all that belongs to it."""

        def log(self, _: int, numbers: Mapping[str, float]) -> None:
            worker.losses.append(numbers["train/loss"])
            worker.step_done()

        def close(self, *_: object) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        from tunesmith.metrics.sinks import JsonLines
        from tunesmith.run import StopSignal

        device = engine.device_for(World(), config)
        engine.join(config, World(), device, asked["threads"])
        built = engine.build_engine(config, plan, World(), model.build_model(config, base, device), device)
        saves = checkpoint.Checkpoints(Path(folder), built, config.train.keep)
        sinks = metrics.Sinks([JsonLines(Path(folder) / "metrics.jsonl"), Windows()])
        parts = loop.Training.of(config, plan, built, dataset, machine, sinks, saves, StopSignal())
        loop.train(parts, 0)


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    try:
        main(said)
    except COMPOSITION_ERRORS as error:
        sys.exit(explain(error, said["overrides"]).replace("\n", " / "))
    except Refusal as refusal:
        sys.exit(str(refusal).replace("\n", " / "))
