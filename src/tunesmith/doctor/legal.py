"""What each compute capability can do in this program: types, attention kernels, quantised bases, compiling; and what follows.

The table is data. It says what NVIDIA's and the libraries' own documents say; `run_on` says where somebody has tried. On a
real card the doctor runs each kernel and holds the answer against this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tunesmith.config import Base, Compute, Config
from tunesmith.doctor.findings import Finding, fail, ok, warn
from tunesmith.hardware import CARDS, Machine, has_amx
from tunesmith.plan.checks import target
from tunesmith.plan.shapes import multiplies_int8, without_liger

Legal = Literal["yes", "no", "slow"]
NOT_YET = "not yet run on that card"

FEATURES: Mapping[str, str] = {
    "fp32": "precision=fp32",
    "fp16": "precision=fp16",
    "bf16": "precision=bf16",
    "flash": "SDPA's flash kernel",
    "efficient": "SDPA's memory-efficient kernel",
    "cudnn": "SDPA's cuDNN kernel",
    "math": "SDPA without a kernel of its own",
    "flash_attn": "the package flash-attn",
    "flex": "FlexAttention",
    "int8": "method.base=int8",
    "nf4": "method.base=nf4",
    "compile": "torch.compile",
}
"""Columns of the table, and what each of them is."""
ATTENTION = ("flash", "efficient", "cudnn", "math")
"""The columns that the doctor tries on the device itself."""
TAKEN = ("flash", "efficient")
"""The kernels that attention takes in this program, the better one first."""


@dataclass(frozen=True)
class Cell:
    """Whether something is legal on a capability, and why."""

    legal: Legal
    why: str


@dataclass(frozen=True)
class Row:
    """All that one compute capability can do."""

    capability: tuple[int, int] | None
    """None: a CPU."""
    cells: Mapping[str, Cell]
    run_on: str = NOT_YET
    """Where the cells were tried, not only read."""

    @property
    def name(self) -> str:
        return f"{self.capability[0]}.{self.capability[1]}" if self.capability else "CPU"

    @property
    def cards(self) -> str:
        """Rows of the card table with this capability."""
        return ", ".join(card.key for card in CARDS.values() if card.capability == self.capability)


_AMPERE: Mapping[str, Cell] = {
    "fp32": Cell("yes", "plain units: at most half the halves' rate"),
    "fp16": Cell("yes", "tensor cores; its narrow range needs loss scaling, which the engine does"),
    "bf16": Cell("yes", "tensor cores, and fp32's range: no loss scaling"),
    "flash": Cell("yes", "from 8.0, for halves, head size up to 256"),
    "efficient": Cell("yes", "from 5.0, for halves and fp32, with or without a mask"),
    "cudnn": Cell("yes", "from 8.0, for halves"),
    "math": Cell("slow", "writes all n x n scores to memory"),
    "flash_attn": Cell("yes", "version 2 from 8.0, for halves; this program does not need it, SDPA has the kernel"),
    "flex": Cell("yes", "Triton kernels with tensor cores; this program does not use it"),
    "int8": Cell("yes", "LLM.int8 from 7.5: int8 tensor cores, outliers apart"),
    "nf4": Cell("yes", "bitsandbytes from 6.0: 4 bits in memory, matmuls in precision.compute"),
    "compile": Cell("yes", "Triton from 8.0, needs a C compiler; this program does not use it"),
}
_TURING: Mapping[str, Cell] = {
    **_AMPERE,
    "fp32": Cell("yes", "plain units, an eighth of fp16's rate; no tf32"),
    "bf16": Cell("no", "no units for it before 8.0; PyTorch emulates it, and says that it is supported"),
    "flash": Cell("no", "from 8.0"),
    "efficient": Cell("yes", "from 5.0, for fp16 and fp32: the kernel that attention takes here"),
    "cudnn": Cell("no", "from 8.0"),
    "flash_attn": Cell("no", "version 2 from 8.0"),
    "flex": Cell("no", "its kernels need Triton's matmul on tensor cores, which since 3.3 starts at 8.0"),
    "compile": Cell("slow", "pointwise kernels only: Triton's matmul on tensor cores, since 3.3, starts at 8.0"),
}
_GA102 = {**_AMPERE, "flash": Cell("yes", "from 8.0, for halves; head sizes 193 to 224, and above with dropout, do not train here")}
_CPU: Mapping[str, Cell] = {
    "fp32": Cell("yes", "the fastest type on a CPU without AMX"),
    "fp16": Cell("no", "slower than fp32 and overflows; a plan refuses it"),
    "bf16": Cell("slow", "slower than fp32 without AMX"),
    "flash": Cell("yes", "PyTorch's own kernel for CPUs"),
    "efficient": Cell("no", "for CUDA only"),
    "cudnn": Cell("no", "for CUDA only"),
    "math": Cell("slow", "writes all n x n scores to memory"),
    "flash_attn": Cell("no", "for CUDA only"),
    "flex": Cell("no", "forward only on a CPU"),
    "int8": Cell("yes", "bitsandbytes' CPU backend"),
    "nf4": Cell("yes", "bitsandbytes' CPU backend"),
    "compile": Cell("yes", "needs a C++ compiler; this program does not use it"),
}
ROWS: tuple[Row, ...] = (
    Row(None, _CPU, "2 cores of an AMD EPYC: types, SDPA's kernels, int8 and nf4, forward and backward"),
    Row((7, 0), {**_TURING, "int8": Cell("no", "LLM.int8 wants 7.5 for its int8 tensor cores")}),
    Row((7, 5), _TURING),
    Row((8, 0), _AMPERE),
    Row((8, 6), _GA102),
    Row((8, 9), _GA102),
    Row((9, 0), _AMPERE),
)  # fmt: skip


def row_for(capability: tuple[int, int] | None) -> Row | None:
    """The row of a capability (None: a CPU): its own, else the nearest lower one of the same major version, else None."""
    if capability is None:
        return ROWS[0]
    near = [row for row in ROWS if row.capability and row.capability[0] == capability[0] and row.capability <= capability]
    return max(near, key=lambda row: row.capability or (0, 0), default=None)


def best_type(row: Row) -> str:
    """The type to train in: bf16 where it has units, else fp16, else fp32."""
    return next((kind for kind in ("bf16", "fp16") if row.cells[kind].legal == "yes"), "fp32")


def serves(row: Row, kernel: str, compute: str) -> bool:
    """Whether an attention kernel takes a type that is legal here; on a card flash and cuDNN take halves only."""
    halves_only = row.capability is not None and kernel in ("flash", "cudnn")
    return row.cells[kernel].legal == "yes" and row.cells[compute].legal != "no" and not (halves_only and compute == "fp32")


def kernel_for(row: Row, compute: str) -> str:
    """The attention kernel that PyTorch takes for a type."""
    return next((kernel for kernel in TAKEN if serves(row, kernel, compute)), "math")


def choices(config: Config | None, capability: tuple[int, int] | None) -> Iterator[Finding]:
    """What is chosen on a capability (None: a CPU), and why: by the config, or without one what to type."""
    row = row_for(capability)
    if row is None:
        assert capability is not None
        name = f"{capability[0]}.{capability[1]}"
        yield warn("choice", f"compute capability {name} is not in the table of what is legal", f"add a row {name} to doctor/legal.py")
        return
    on, best = row.name if capability is None else f"capability {row.name}", best_type(row)
    compute = config.precision.compute.value if config and config.precision.compute is not Compute.auto else best
    yield _choice("precision", compute, row, on, f"precision={best}")
    kernel = kernel_for(row, compute)
    merged = "; shared beginnings by the same kernel, merged (not yet run on a card)" if kernel != "math" and capability else ""
    yield ok("choice", f"attention {kernel} for {compute} on {on}: {row.cells[kernel].why}{merged}")
    bases = [base.value for base in (Base.nf4, Base.int8)]
    if config is None:
        legal = [base for base in bases if row.cells[base].legal == "yes"]
        others = [f"{base} is not ({row.cells[base].why})" for base in bases if base not in legal]
        yield ok("choice", "; ".join([f"base as_is; {' and '.join(legal) or 'nothing else'} would be legal on {on}", *others]))
    elif multiplies_int8(config) and row.cells["int8"].legal == "yes":
        yield ok("choice", f"base int8 on {on}, dynamic: int8 matmuls forward and backward, activations quantised token by token")
    elif config.method.base is Base.as_is:
        yield ok("choice", f"base as_is: frozen weights stay in {compute}")
    else:
        yield _choice("base", config.method.base.value, row, on, "method.base=as_is")
    cell = row.cells["compile"]
    fused = ""
    if config and capability:  # which family the model is of, is not known here
        why = without_liger(config, capability)
        fused = f"; rotary embedding, in full training norms and SwiGLU, {f'by PyTorch ({why})' if why else 'by Liger, but for GLM'}"
    yield ok("choice", f"compile off: this program does not compile its models ({cell.legal} on {on}: {cell.why}){fused}")


def _choice(what: str, feature: str, row: Row, on: str, otherwise: str) -> Finding:
    cell = row.cells[feature]
    fact = f"{what} {feature} on {on}: {cell.why}"
    if cell.legal == "yes":
        return ok("choice", fact)
    return warn("choice", fact, otherwise) if cell.legal == "slow" else fail("choice", fact, otherwise)


def explain(config: Config, machine: Machine) -> list[str]:
    """What was chosen and why, in lines for the start of a run."""
    on_cpu, card = target(config, machine)
    if not on_cpu and card is None:
        return [f"choice   {machine.device_names[0]} has no row in the card table: nothing is known of its units"]
    facts = [line.fact for line in choices(config, None if on_cpu or card is None else card.capability)]
    if on_cpu and config.precision.multiplied == "fp32" and has_amx():
        facts.insert(1, "matmul highest: this CPU has AMX, by which precision.matmul=high may multiply faster, off by 5e-6 and not 3e-7")
    return [f"choice   {fact}" for fact in facts]


def matrix_table() -> str:
    """The whole table as Markdown, as printed in docs/doctor.md: a grid, then each reason once."""
    head = ["capability", "hardware.card", *FEATURES, "tried on"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in ROWS:
        cells = [row.cells[feature].legal for feature in FEATURES]
        lines.append("| " + " | ".join([row.name, row.cards or "cpu", *cells, row.run_on]) + " |")
    lines.append("")
    for feature, meaning in FEATURES.items():
        reasons: dict[tuple[Legal, str], list[str]] = {}
        for row in ROWS:
            cell = row.cells[feature]
            reasons.setdefault((cell.legal, cell.why), []).append(row.name)
        said = "; ".join(f"{', '.join(names)}: {legal}, {why}" for (legal, why), names in reasons.items())
        lines.append(f"- **{feature}** ({meaning}). {said}.")
    return "\n".join(lines)
