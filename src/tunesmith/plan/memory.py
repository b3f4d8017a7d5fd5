"""What one rank keeps in memory during training, part by part, from arithmetic alone.

A first model: states and saved activations are exact for the way this program trains (tests hold the activations
against what autograd saves); the context and allocator rounding are declared figures, not yet measured on cards.
"""

from __future__ import annotations

from tunesmith.config import Base, Compute, Config, EngineKind, MethodKind
from tunesmith.plan.optimizers import state_bytes
from tunesmith.plan.shapes import ModelShape

GIB = 2**30
BYTES = {Compute.fp32: 4, Compute.fp16: 2, Compute.bf16: 2}
TARGET_SHARE = 0.5
"""Assumed share of target tokens where nobody counted them: answers are about half of a chat."""
BUCKET = 50_000_000
"""Elements in a DeepSpeed bucket: 100 MB of halves, 3 ms over PCIe 4; its default, 5e8, would take a GB a buffer."""
CUDA_CONTEXT_GIB = 0.6
"""CUDA context and kernels (0.3 to 0.5), cuBLAS workspace (0.03) and allocator rounding; declared, not measured."""
PROCESS_GIB = 0.5
"""Resident Python, torch, transformers and DeepSpeed on a CPU: 0.4 measured, and the oneDNN scratch."""

# NF4 (arXiv 2305.14314): 4 bits, an 8-bit scale per 64 weights and a 32-bit scale of scales per 256 of those:
# 0.5 + 1/64 + 4/(64 x 256) bytes, i.e. 4.127 bits. LLM.int8 (arXiv 2208.07339): 1 byte, and 4 bytes per output row.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def memory_gib(
    shape: ModelShape, config: Config, world_size: int, tokens: int, *, targets: int | None = None, cpu: bool = False
) -> dict[str, float]:
    """GiB of each part on one rank at its peak, with micro-batches of `tokens` tokens, `targets` of them with a loss.

    targets None: TARGET_SHARE of the tokens. Raises ValueError when method.targets does not fit the model.
    """
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

    largest = max(inputs * outputs for _, inputs, outputs in shape.linears)
    buffers = (
        0.0 if config.method.base is Base.as_is else largest * compute
    )  # a weight is dequantised whole for its matmul
    if config.method.dora:  # the rows of W + scale B A are measured, with B A multiplied out: three of W's size, one after the other
        buffers += 3 * largest * compute
    if zero:
        buffers += min(trained, BUCKET) * trained_bytes * (1 if cpu else 2)  # one fills while the other travels
    elif config.engine.fsdp:  # the layer at work and the next one, and embedding and head all the time
        buffers += (2 * shape.weights_per_layer + shape.embedding_weights) * compute
    elif world_size > 1:
        buffers += trained * trained_bytes  # DDP's buckets hold a copy of all gradients
    if zero == 3:
        buffers += 2 * shape.weights_per_layer * compute  # the layer at work and the next one, gathered
    if full and not deepspeed and not config.engine.fsdp and compute == 2:
        buffers += shape.layers * shape.matmul_weights_per_layer * 2  # autocast keeps its half copies for the forward

    counted = round(tokens * TARGET_SHARE) if targets is None else targets
    if config.method.kind is MethodKind.prompt:
        tokens += config.method.virtual_tokens
    parts = {
        "weights": weights / split[2],
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": tokens * _activation_bytes(shape, config),
        # Per logit in backward: log-probabilities, their gradient, and that of the logits, 4 bytes each. Not chunked.
        "logits": counted * (shape.vocab * 12 + shape.hidden * compute),
        "buffers": buffers,
    }
    context = PROCESS_GIB if cpu else CUDA_CONTEXT_GIB
    return {name: size / GIB for name, size in parts.items()} | {"context": context}


def _base_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes of the frozen base; only the decoder's linear layers are quantised."""
    compute = BYTES[config.precision.compute]
    linear = shape.layers * shape.matmul_weights_per_layer
    rest = shape.total_weights - linear
    if config.method.base is Base.as_is:
        return (linear + rest) * compute
    # Preparing a quantised model turns embeddings, head and norms into fp32; DeepSpeed's half modes turn them back.
    rest_bytes = compute if config.engine.kind is EngineKind.deepspeed else 4
    if config.method.base is Base.nf4:
        return linear * NF4_BYTES + rest * rest_bytes
    rows = shape.layers * sum(outputs for _, _, outputs in shape.linears)
    return linear + 4 * rows + rest * rest_bytes


def _activation_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes a token of the micro-batch costs until backward has passed."""
    compute = BYTES[config.precision.compute]
    layer = layer_activation_bytes(shape, config)
    # The last norm; in full training it saves its scaled input too. (LoRA has nothing to save at layer 0's first norm
    # as the embedding is frozen, so the norms are as many as 2 a layer.)
    norm = 4 * shape.hidden + 4 + compute * shape.hidden if config.method.kind is MethodKind.full else 0
    in_flight = (
        3 * shape.intermediate * compute
    )  # gradients of the MLP's three inner tensors, in the layer being passed
    method = config.method
    ends = method.kind is MethodKind.prompt or "embed_tokens" in shape.trained_ends(method)
    kept = shape.layers - (method.first_layer if method.kind is MethodKind.lora and not ends else 0)  # below, nothing
    if config.engine.checkpointing:  # the inputs of those that are recomputed, the inside of one of them, and the others whole
        again = -(-kept // config.engine.checkpoint_every)
        return again * shape.hidden * compute + (kept - again + 1) * layer + norm + in_flight
    return kept * layer + norm + in_flight


def layer_activation_bytes(shape: ModelShape, config: Config) -> int:
    """Bytes a token that autograd saves in one decoder layer, with SDPA (no score matrix) and plain PyTorch elsewhere.

    c is the compute type's size, h hidden, q and kv the widths of all query and of all key heads, f the MLP's width.
    """
    method, c = config.method, BYTES[config.precision.compute]
    full = method.kind is MethodKind.full
    lora = method.kind is MethodKind.lora
    adapted = shape.linears if full else shape.adapted(method.targets) if lora else ()
    h, q, kv, f = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate

    # Each norm: its input as fp32, 1/rms, and the scaled value where the norm's weight is trained.
    saved = 2 * (4 * h + 4 + full * c * h)
    if shape.qk_norm:
        saved += (4 + full * c) * (q + kv) + 4 * (shape.heads + shape.kv_heads)
    # Attention: rotated queries and keys, values, output, and the softmax's logarithm (fp32, a number a head).
    saved += c * (2 * q + 2 * kv) + 4 * shape.heads
    # SwiGLU: gate, silu(gate), up.
    saved += 3 * c * f if shape.gated else 2 * c * f
    # What a trained linear layer or adapter reads: once for all that read the same (the attention's output is counted
    # above, but GLM's projection reads a copy, as it puts its half-rotated heads together heads first), and a copy for each
    # where dropout makes one, with a 1-byte mask, or autocast (accelerate in halves, FSDP2 aside) does.
    autocast = config.engine.kind is EngineKind.accelerate and not config.engine.fsdp and c == 2
    copies = (bool(method.dropout) and not full) or autocast
    for number, block in enumerate(shape.blocks):
        widths = [linear[1] for linear in block if linear in adapted]
        saved += c * sum(widths) if copies else c * max(widths, default=0) * (number != 1 or shape.fused)
    if lora:
        saved += c * method.r * len(adapted)  # Ax, which B reads
        saved += sum(inputs for _, inputs, _ in adapted) if method.dropout else 0
        saved += 2 * c * sum(outputs for _, _, outputs in adapted) * method.dora  # Wx and BAx, which the trained length is told by
    return saved
