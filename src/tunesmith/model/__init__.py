"""Load, quantise, adapt, freeze; and the forward that skips what changes no weight.

transformers, peft and bitsandbytes are named in this room only (the tokenizer's loading included).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tunesmith.config import Base, Compute, Config, EngineKind, Int8, MethodKind, Refusal
from tunesmith.data.glm_tokenizer import GlmTokenizer
from tunesmith.model import adapters, attention, glm, halves
from tunesmith.model.adapters import (
    act_from,
    decoder_layers,
    inner_model,
    is_prompt_learning,
    known_warnings,
    new_tokens,
    recompute_layers,
    save_model,
    with_adapters,
    without_bitsandbytes,
)
from tunesmith.model.beginning import Beginning, continue_all, read_beginning
from tunesmith.model.frozen import FrozenStates
from tunesmith.model.fused import fuse
from tunesmith.model.int8 import quantise_layers
from tunesmith.model.linear import join_adapters, keep_tiles
from tunesmith.model.loss import Targets, measure_at_head
from tunesmith.model.noise import with_noise
from tunesmith.model.optimizers import make_optimizer, page_again
from tunesmith.model.source import check_source, free_gib, model_folder

if TYPE_CHECKING:
    from tunesmith.data.batches import MicroBatch
    from tunesmith.data.templates import Tokenizer

__all__ = [
    "DTYPES", "Beginning", "FrozenStates", "TargetLoss", "act_from", "build_model", "check_source", "continue_all", "decoder_layers",
    "for_generation", "free_gib", "is_prompt_learning", "keep_tiles", "load_tokenizer", "make_optimizer", "model_folder", "new_tokens",
    "page_again", "read_adapter", "read_beginning", "save_model", "stream", "without_bitsandbytes",
]  # fmt: skip

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an absent optional package on every import
DTYPES = {Compute.fp32: torch.float32, Compute.fp16: torch.float16, Compute.bf16: torch.bfloat16}


class TargetLoss(nn.Module):
    """The sum of the cross-entropies of a micro-batch's target tokens; logits exist at those positions only, and of few at a time.

    Labels are smoothed and embeddings get noise in training mode only.
    """

    whole_logits = False
    """All logits are made together, by a head that gives them: for who listens to it."""
    beginning: Beginning | None = None
    """What every conversation goes on from, and no micro-batch holds (method.alora)."""
    frozen: FrozenStates | None = None
    """What the layers below the lowest trained one have given, with method.cache_frozen."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, neftune_alpha: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Sum over target tokens, fp32 scalar; 0 with a gradient path for a stand-in of weight 0."""
        device = next(self.model.parameters()).device
        targets = Targets(batch, self.label_smoothing if self.training else 0.0)  # held-out losses stay comparable
        with nullcontext() if self.whole_logits else targets.asked(), self.frozen.serving(batch) if self.frozen else nullcontext():
            loss = targets.loss(self._logits(batch, device))
        return loss if batch.weight else loss * 0.0

    def _logits(self, batch: MicroBatch, device: torch.device) -> torch.Tensor:
        """Logits at the positions that predict targets, [positions, vocabulary]; what their head answers where it is asked."""
        model, ids = self.model, batch.ids.to(device)
        inputs: dict[str, Any] = {"input_ids": ids[None]}
        positions, predicting, segments = batch.positions, batch.predicting, batch.segments
        prompt = adapters.learned_prompt(model)
        prefix = adapters.learned_prefix(model) if self.beginning is None else self.beginning.keys
        noisy = self.training and self.neftune_alpha > 0
        if prompt is not None or noisy:
            embedded = inner_model(model).get_input_embeddings()(ids)
            if noisy:
                embedded = with_noise(embedded, batch, self.neftune_alpha)
            if prompt is not None:  # a beginning that all conversations share
                virtual = len(prompt)
                embedded = torch.cat([prompt.to(embedded.dtype), embedded])
                segments, predicting = attention.behind(virtual, segments), predicting + virtual
                positions = torch.cat([torch.arange(virtual), positions + virtual])
            inputs = {"inputs_embeds": embedded[None]}
        if prefix is not None:  # as PEFT has it, the first token comes behind learned keys
            positions = positions + prefix[0].shape[1]
            inputs["prefix"] = prefix
        if prompt is not None or prefix is not None:
            model = inner_model(model)  # PEFT's own way is for padded rows
        logits: torch.Tensor = model(
            **inputs,
            position_ids=positions[None].to(device),
            logits_to_keep=predicting.to(device),
            ragged=attention.Layout(segments, device),
            use_cache=False,
        ).logits
        return logits[0]

    def take_states(self, states: FrozenStates) -> None:
        """Let what is frozen below the lowest trained layer be computed once for each beginning of the training data."""
        states.attach(self.model)
        self.frozen = states

    def train(self, mode: bool = True) -> TargetLoss:
        """Training or evaluation mode, for every layer but NF4 ones."""
        super().train(mode)
        keep_nf4_in_training(self)
        return self


def keep_nf4_in_training(module: nn.Module) -> None:
    """Undo eval mode on NF4 layers, where it means nothing but trouble.

    On a CPU with AVX-512 bitsandbytes 0.50 repacks such a layer's weight at the first forward in eval mode, and the next
    backward through it is silently wrong: the gradient is off by 96 %.
    """
    for layer in module.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.training = True


def keep_no_int8_inputs(model: nn.Module) -> None:
    """Let bitsandbytes' int8 layers forget their input when it has been multiplied.

    bitsandbytes 0.50 hangs it at the node of the graph, where no checkpoint sees it and backward does not release it: all layers' inputs
    live as long as the loss does. Only the gradient of a weight would read it, and these are frozen.
    """

    def forget(layer: nn.Module, _: object, y: torch.Tensor) -> None:
        node: Any = y.grad_fn
        if node is None or cast("nn.Parameter", layer.weight).requires_grad:
            return
        if hasattr(node, "tensors"):  # on a card
            node.tensors = (*node.tensors[:-1], None)
        elif not getattr(node, "is_empty", False):  # else backward makes zeros of its shape
            node.A = None

    for layer in model.modules():
        if type(layer).__name__ == "Linear8bitLt":
            layer.register_forward_hook(forget)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; raises Refusal if there is none."""
    from transformers import AutoTokenizer

    if glm.has_sentencepiece(folder):
        return GlmTokenizer.from_pretrained(folder)
    try:
        return cast("Tokenizer", AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(f"model.path={folder}: no tokenizer can be read there — {str(error).splitlines()[0]}") from None


def build_model(config: Config, folder: Path, device: torch.device) -> TargetLoss:
    """The model of a run: weights loaded and quantised, adapters added, everything else frozen, trainable weights in fp32.

    Raises Refusal where the files or the method's targets do not fit the model.
    """
    torch.manual_seed(config.train.seed)  # adapter initialisation, equal on every rank
    model = _load(folder, config, device)
    fuse(model, config, device)
    dynamic = config.method.base is Base.int8 and config.precision.int8 is Int8.dynamic
    if dynamic:
        quantise_layers(model, device)
    elif config.method.base is not Base.as_is:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_no_int8_inputs(model)
    if config.method.kind is not MethodKind.full:
        model = with_adapters(model, config)
        join_adapters(model)
    measure_at_head(model)
    for parameter in model.parameters():
        # fp16 gradients of fp16 weights cannot be unscaled, and small updates vanish in half precision.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.engine.checkpointing:
        recompute_layers(model, config)
    if config.precision.fp32_layers:
        halves.keep_in_fp32(model, config.precision.fp32_layers, device)
    # DeepSpeed turns all weights into halves and FSDP2 gathers them so: what is trained beside adapters is of the others' type there.
    all_halves = config.engine.kind is EngineKind.deepspeed or config.engine.fsdp
    is_mixed = config.precision.fp32_layers or (config.method.modules_to_save and not all_halves)
    if is_mixed and config.precision.compute is not Compute.fp32:
        halves.generate_in(model, DTYPES[config.precision.compute], device)
    model.train()
    if (dynamic or config.method.base is Base.as_is) and config.engine.kind is not EngineKind.deepspeed and not config.engine.fsdp:
        # DeepSpeed does so itself, after it has turned fp32 into halves: a 6B model fits a 24 GB card only then. FSDP does so layer by
        # layer and keeps a piece of each: the whole need not fit.
        model.to(device)
    return TargetLoss(model, config.optim.label_smoothing, config.optim.neftune_alpha)


def _load(folder: Path, config: Config, device: torch.device, implementation: str = attention.NAME) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = DTYPES[config.precision.compute]
    quantisation: dict[str, Any] = {}
    if config.method.base is Base.nf4:
        quantisation["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    elif config.method.base is Base.int8 and config.precision.int8 is Int8.bnb:
        quantisation["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if quantisation:
        quantisation["device_map"] = {"": str(device)}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation, **quantisation)
    except (OSError, ValueError, ImportError) as error:
        raise Refusal(f"model.path={folder}: cannot be loaded — {str(error).splitlines()[0]}") from error
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"]
    longest = config.data.max_tokens
    if window and "sliding_attention" in kinds and longest > window:
        # Within the window sliding attention is causal attention; beyond it, ours would see too much.
        raise Refusal(f"data.max_tokens={longest}: this model attends to the last {window} tokens only — data.max_tokens={window}")
    return model


@contextmanager
def for_generation(model: Any) -> Iterator[Any]:
    """The model with a KV cache and padded attention, in eval mode; its training state comes back afterwards."""
    base = inner_model(model)
    was_training = model.training
    model.eval()
    keep_nf4_in_training(model)
    base.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        base.set_attn_implementation(attention.NAME)
        model.train(was_training)


def read_adapter(folder: Path, base_folder: Path) -> Any:
    """A base model with the adapter (or the full model) that a run left, ready to answer, in fp32 on the CPU or fp16 on a card."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_adapter = (folder / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base_folder if is_adapter else folder, dtype=dtype)
    if is_adapter:
        with known_warnings():
            model = PeftModel.from_pretrained(model, folder)
    return model.to(device).eval()


def stream(model: Any, prompt: list[int], tokenizer: Any, stop_ids: tuple[int, ...], max_new_tokens: int) -> str:
    """Answer a prompt greedily, printing each word as it comes; the answer without its stop token is returned too."""
    from transformers import TextStreamer

    ids = torch.tensor([prompt], device=model.device)
    out = new_tokens(
        model,
        ids,
        torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    said: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return said.strip()


def perplexity(mean_loss: float) -> float:
    """exp of the mean loss in nats per target token; infinite where that overflows."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
