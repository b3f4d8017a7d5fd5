"""Peaks that others have measured on cards beside what the plan's arithmetic says of the same runs.

    python -m bench.published

Their programs are not ours, so what differs is said row by row: they make logits at every position, hold them until backward is over
(2 or 4 bytes each beside our 12), and PEFT's comparison has no autocast. The rest is what a plan uses: replay, states, fragments and,
where a whole card was read, the context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunesmith.config import Base, Compute, Config, EngineKind, MethodKind
from tunesmith.plan.memory import CONTEXT_GIB, FRAGMENTS, GIB, WORKSPACE_GIB, held_bytes, setting_of
from tunesmith.plan.replay import Block, Heap, Setting, Step
from tunesmith.plan.shapes import KNOWN, ModelShape

PEFT = "huggingface/peft, method_comparison/MetaMathQA/results"
FACTORY = "hiyouga/LLaMA-Factory, wiki page Performance comparison (April 2024)"
LLAMA2 = ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, 4096)


@dataclass(frozen=True)
class Row:
    what: str
    source: str
    gb: float
    """Measured, 1e9 bytes."""
    shape: ModelShape
    setting: Setting
    tokens: int
    states: float
    """Bytes of weights and optimizer."""
    held: int
    """Bytes a logit that is held beside ours."""
    context: bool
    """Whether the figure has the CUDA context in it."""

    @property
    def predicted_gb(self) -> float:
        heap = Heap()
        kept = [Block(heap, self.states, "weights"), Block(heap, self.held * self.tokens * self.shape.vocab, "logits")]
        Step(heap, self.shape, self.setting, self.tokens, self.tokens)
        del kept
        lost = FRAGMENTS * sum(heap.at_peak[part] for part in ("activations", "logits", "buffers"))
        return (heap.peak + lost + (CONTEXT_GIB + WORKSPACE_GIB) * GIB * self.context) / 1e9


def rows() -> list[Row]:
    """PEFT: Llama-3.2-3B in bf16 on an L40S, 4 x 768 tokens at most, the most that was reserved. LLaMA-Factory: Llama-2-7B by QLoRA."""
    llama, found = KNOWN["llama-3.2-3b"], []
    for what, gb, rank, targets in (
        ("LoRA r=32 on q and v (June 2025)", 22.27, 32, ["q_proj", "v_proj"]),
        ("LoRA r=10 on the MLP (October 2025)", 24.71, 10, ["gate_proj", "up_proj", "down_proj"]),
    ):
        config = _config(rank, targets)
        setting = replace(setting_of(llama, config, accumulates=False), joined=False, again=False, autocast=False, whole_logits=True)
        states = sum(held_bytes(llama, config, 1)[name] for name in ("weights", "optimizer"))
        found.append(Row(what, PEFT, gb, llama, setting, 4 * 768, states, 2, False))
    config = _config(0, [])
    setting = replace(setting_of(llama, config, accumulates=False), autocast=False, whole_logits=True, stored=2, ends=2, linear=2)
    found.append(Row("full, all in bf16 (June 2025)", PEFT, 37.24, llama, setting, 4 * 768, 6 * llama.total_weights, 2, False))
    config = _config(8, ["all-linear"])
    config.method.base, config.engine.checkpointing = Base.nf4, True
    setting = replace(setting_of(LLAMA2, config, accumulates=True), joined=False, again=False, whole_logits=True, stored=2)
    states = sum(held_bytes(LLAMA2, config, 1).values()) - 2 * LLAMA2.embedding_weights  # embedding and head stay in halves there
    for tokens, gb in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)):
        found.append(Row(f"QLoRA r=8, 1 x {tokens:,} tokens, recomputed", FACTORY, gb, LLAMA2, setting, tokens, states, 4, True))
    return found


def _config(rank: int, targets: list[str]) -> Config:
    config = Config(name="published")
    config.precision.compute, config.engine.kind = Compute.bf16, EngineKind.accelerate
    config.method.kind = MethodKind.lora if rank else MethodKind.full
    config.method.r, config.method.targets = rank or 16, targets
    config.hardware.card = "a100_40"
    return config


def table() -> str:
    """The rows as Markdown, as printed in docs/hardware.md."""
    lines = ["| run | measured GB | predicted GB | error | source |", "|---|---|---|---|---|"]
    lines += [f"| {r.what} | {r.gb:g} | {r.predicted_gb:.1f} | {r.predicted_gb / r.gb - 1:+.0%} | {r.source} |" for r in rows()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
