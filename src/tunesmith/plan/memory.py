"""What one rank keeps in memory during training, part by part, at the moment when it is most.

States (weights, gradients, optimizer) are arithmetic; activations, logits and gradients on their way are replayed operator by operator
(replay.py), which a CPU's allocator confirms to a percent. What a card adds is declared below, each with what it rests on.
"""

from __future__ import annotations

from tunesmith import matmul
from tunesmith.config import Base, Compute, Config, EngineKind, MethodKind
from tunesmith.hardware import CARDS
from tunesmith.plan.optimizers import state_bytes
from tunesmith.plan.replay import Setting, replayed
from tunesmith.plan.shapes import HEAD_DIMS, ModelShape, gathers_by_hooks, joins_adapters, multiplies_int8, without_liger

GIB = 2**30
BYTES = {Compute.fp32: 4, Compute.fp16: 2, Compute.bf16: 2}
TARGET_SHARE = 0.5
"""Assumed share of target tokens where nobody counted them: answers are about half of a chat."""
BUCKET = 50_000_000
"""Elements in a DeepSpeed bucket: 100 MB of halves, 3 ms over PCIe 4; its default, 5e8, would take a GB a buffer."""
GATHERED = 1_000_000_000
"""Weights that ZeRO 3 leaves gathered between their uses, at most (DeepSpeed's default of stage3_max_live_parameters)."""
CONTEXT_GIB = 0.45
"""CUDA context and kernels on a card before the first tensor: 0.3 to 0.6 by architecture and driver; declared, not measured here."""
WORKSPACE_GIB = 0.03
"""cuBLAS workspaces, 8 MiB a handle and stream and 32 MiB on Hopper (PyTorch's CUDABlas.cpp), for two streams."""
FRAGMENTS = 0.04
"""Share of activations, logits and buffers, those of communication too, that the caching allocator loses: it rounds to 512 bytes, 2 MiB
and 20 MiB blocks, and blocks of one size do not serve another. Declared, not measured here."""
NCCL_GIB = 0.25
"""Channels' buffers of a communicator of several ranks: 4 MiB x 2 x its channels, up to 32; declared, not measured here."""
PROCESS_GIB = 0.5
"""Resident Python, torch, transformers and DeepSpeed on a CPU: 0.4 measured, and the oneDNN scratch."""
# NF4 (arXiv 2305.14314): 4 bits, an 8-bit scale per 64 weights and a 32-bit scale of scales per 256 of those:
# 0.5 + 1/64 + 4/(64 x 256) bytes, i.e. 4.127 bits. int8 (arXiv 2208.07339): 1 byte, and 4 bytes per output row.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def memory_gib(
    shape: ModelShape,
    config: Config,
    world_size: int,
    tokens: int,
    *,
    targets: int | None = None,
    cpu: bool = False,
    accumulated: bool = True,
) -> dict[str, float]:
    """GiB of each part on one rank at its peak, with micro-batches of `tokens` tokens, `targets` of them with a loss.

    targets None: TARGET_SHARE of the tokens. accumulated: a step has several micro-batches, so that gradients exist before a
    backward. Raises ValueError when method.targets does not fit the model.
    """
    deepspeed = config.engine.kind is EngineKind.deepspeed
    states = held_bytes(shape, config, world_size)
    grown = accumulated or deepspeed
    counted = round(tokens * TARGET_SHARE) if targets is None else targets
    parts = dict(replayed(shape, setting_of(shape, config, cpu=cpu, accumulates=grown), tokens, counted).at_peak)
    busy = sum(parts.values())
    sent = _gathered(shape, config, world_size, cpu, busy) if config.engine.fsdp else _buckets(shape, config, world_size, cpu)
    # These do not change while a micro-batch is computed, so the moment of the peak is the same with them.
    parts["weights"] += states["weights"]
    parts["gradients"] += states["gradients"] if grown else 0.0
    parts["optimizer"] += states["optimizer"]
    parts["buckets"] = sent
    if cpu:
        parts["context"] = PROCESS_GIB * GIB
    else:
        parts["context"] = (CONTEXT_GIB + WORKSPACE_GIB) * GIB
        parts["buckets"] += NCCL_GIB * GIB if world_size > 1 else 0
        parts["holes"] = FRAGMENTS * (parts["activations"] + parts["logits"] + parts["buffers"] + sent)
    return {name: size / GIB for name, size in parts.items()}


def held_bytes(shape: ModelShape, config: Config, world_size: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on one rank between two steps' backwards."""
    full, compute = config.method.kind is MethodKind.full, BYTES[config.precision.compute]
    deepspeed = config.engine.kind is EngineKind.deepspeed
    zero = config.engine.zero if deepspeed else 0
    trained = shape.trained_weights(config.method)
    # Trained weights are loaded in fp32; DeepSpeed's fp16 and bf16 modes turn them into 2 bytes beside an fp32 master.
    trained_bytes = compute if deepspeed else 4
    stage = 3 if config.engine.fsdp else zero
    split = [world_size if stage >= least else 1 for least in (1, 2, 3)]  # optimizer, gradients, weights

    weights = trained * trained_bytes + (0 if full else _base_bytes(shape, config))
    gradients = trained * trained_bytes / split[1]
    master = 4 if deepspeed and (compute == 2 or zero) else 0  # ZeRO clones even weights that are fp32 already
    optimizer = (trained * master + state_bytes(shape, config)) / split[0]
    # ZeRO updates from an fp32 copy of this rank's gradients (its own estimator counts 20 bytes a weight on one GPU).
    gradients += trained * 4 / split[0] if zero and compute == 2 else 0
    if config.engine.offload and zero >= 2:
        gradients, optimizer = trained * trained_bytes / split[1] if zero == 2 else 0, 0
    return {"weights": weights / split[2], "gradients": gradients, "optimizer": optimizer}


def tiles_gib(shape: ModelShape, config: Config, halves: bool) -> float:
    """GiB of frozen weights that a CPU with AMX keeps in the order of its tiles too, for forward and for backward (model/linear.py).

    halves: whether those are what multiplies fp32 matrices at precision.matmul=high.
    """
    method, in_int8, high = config.method, multiplies_int8(config), halves and config.precision.multiplied == "tf32"
    in_pieces = config.engine.fsdp or gathers_by_hooks(config.engine)
    if config.precision.compute is not Compute.fp32 or config.precision.fp32_layers or in_pieces:
        return 0.0
    size = 0
    if (in_int8 or high) and joins_adapters(method, in_int8=in_int8):
        numbers = 1 if in_int8 else 4
        sides = [(outputs, inputs) for _, inputs, outputs in shape.adapted(method.targets)]
        fitting = [one for one in sides if (one[0] % 64 == one[1] % 64 == 0 if in_int8 else min(one) >= matmul.NARROW)]
        size = len(shape.adapted_layers(method)) * sum(matmul.tiles_bytes(*one, numbers) for one in fitting)
    if high and "lm_head" not in shape.trained_ends(method) and min(shape.vocab, shape.hidden) >= matmul.NARROW:
        size += matmul.tiles_bytes(shape.vocab, shape.hidden, 4)
    return 2 * size / GIB


def _buckets(shape: ModelShape, config: Config, world_size: int, cpu: bool) -> float:
    """Bytes of what is held for communication all along."""
    compute, deepspeed = BYTES[config.precision.compute], config.engine.kind is EngineKind.deepspeed
    zero = config.engine.zero if deepspeed else 0
    trained = shape.trained_weights(config.method)
    trained_bytes = compute if deepspeed else 4
    buffers = 0.0
    if zero:
        buffers += min(trained, BUCKET) * trained_bytes * (1 if cpu else 2)  # one fills while the other travels
    elif world_size > 1:
        buffers += trained * trained_bytes  # DDP's buckets hold a copy of all gradients
    if zero == 3 and world_size > 1:
        buffers += min(shape.total_weights, GATHERED) * compute
    return buffers


def _gathered(shape: ModelShape, config: Config, world_size: int, cpu: bool, busy: float) -> float:
    """Bytes of what FSDP2 has beside its pieces, where a micro-batch's own blocks are `busy` bytes at their peak.

    Whole are the layer at work and the next one, and embedding and head from a forward to the end of its backward. Two moments have
    little else, and are the peak where `busy` is less: the first gathering, from which embedding and head are cut, and the last
    reduction, of their gradients as one tensor in fp32, which gloo copies on a CPU (as read in PyTorch 2.13's source).
    """
    compute, method, copies = BYTES[config.precision.compute], config.method, 2 if cpu else 1
    trained, ends = shape.trained_weights(method), len(shape.trained_ends(method))
    of_ends = shape.vocab * shape.hidden * (min(ends, 1) if shape.tied else ends)
    learned = trained if method.kind in (MethodKind.prefix, MethodKind.prompt) else 0
    adapters = (trained - of_ends) // len(shape.adapted_layers(method)) if method.kind is MethodKind.lora else 0
    root, layer = (shape.embedding_weights + learned) * compute, (shape.weights_per_layer + adapters) * compute
    whole = root + 2 * layer
    last = (of_ends + learned) * (compute + 4 * copies + 4 / world_size) - whole
    first = root * (1.0 if compute == 4 else 1 + 1 / world_size)  # in halves a rank's piece is cast before it goes
    return whole + max(0.0, first - busy, last - busy)


def setting_of(shape: ModelShape, config: Config, *, cpu: bool = False, accumulates: bool = True) -> Setting:
    """How config computes a step on a CPU or on its card, for the replay."""
    method, compute = config.method, BYTES[config.precision.compute]
    full, lora = method.kind is MethodKind.full, method.kind is MethodKind.lora
    # DeepSpeed's half modes turn everything into halves, and so does FSDP2 for each use; Accelerate casts what each matmul reads.
    deepspeed = config.engine.kind is EngineKind.deepspeed or config.engine.fsdp
    in_int8 = multiplies_int8(config)
    in_fp32 = not deepspeed and (full or (method.base is not Base.as_is and not in_int8))
    card = CARDS.get(config.hardware.card)
    # model/kernels.py: who takes grouped keys as they are, and who can attend to shared keys without a mask.
    merges = cpu or shape.head_dim % 8 == 0
    flash = cpu or (merges and compute == 2 and shape.head_dim <= 192 and (card is None or card.capability[0] >= 8))
    return Setting(
        compute=compute,
        stored=4 if in_fp32 else compute,
        linear=4 if in_fp32 and full else compute,
        ends=compute if deepspeed else 4,
        adapter=compute if deepspeed else 4,
        full=full,
        trained_ends=frozenset(shape.trained_ends(method)),
        autocast=not deepspeed and compute == 2,
        quantised="" if method.base is Base.as_is else "dynamic" if in_int8 else method.base.value,
        rank=method.r,
        adapted=frozenset(shape.adapted(method.targets)) if lora else frozenset(),
        first_layer=method.first_layer if lora else 0,
        last_layer=shape.adapted_layers(method)[-1],
        dora=method.dora and lora,
        joined=joins_adapters(method, gathers_by_hooks(config.engine), in_int8),
        native=cpu,
        again=not full,
        whole_logits=config.precision.compute is Compute.fp16 and "lm_head" in shape.trained_ends(method),
        prefix=method.virtual_tokens if method.kind is MethodKind.prefix else 0,
        prompt=method.virtual_tokens if method.kind is MethodKind.prompt else 0,
        dropout=method.dropout > 0 and lora,
        mask=4 if cpu else 1,
        copies=cpu,
        recomputed=config.engine.checkpoint_every if config.engine.checkpointing else 0,
        # A card that is not known beforehand is counted as one without: what is too much does no harm.
        liger=not cpu and card is not None and not without_liger(config, card.capability, not shape.fused),
        repeats_keys=not flash,
        masked=0 if merges else config.data.max_tokens,
        at_once=cpu and compute == 4 and shape.head_dim in HEAD_DIMS,
        accumulates=accumulates,
    )


def state_number_bytes(shape: ModelShape, config: Config) -> int:
    """Bytes of a number of what goes from one decoder layer to the next: the embedding's type, which all sums there keep."""
    return setting_of(shape, config).stored


def _base_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes of the frozen base; only the decoder's linear layers are quantised."""
    compute = BYTES[config.precision.compute]
    linear = shape.layers * shape.matmul_weights_per_layer
    rest = shape.total_weights - linear
    if config.method.base is Base.as_is:
        return (linear + rest) * compute
    # Preparing a bitsandbytes model turns embeddings, head and norms into fp32; DeepSpeed's half modes turn them back.
    rest_bytes = compute if config.engine.kind is EngineKind.deepspeed or multiplies_int8(config) else 4
    if config.method.base is Base.nf4:
        return linear * NF4_BYTES + rest * rest_bytes
    rows = shape.layers * sum(outputs for _, _, outputs in shape.linears)
    return linear + 4 * rows + rest * rest_bytes
