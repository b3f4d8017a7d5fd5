"""What is trained beside a frozen base: LoRA and its kin, a learned prefix or prompt; and at which rate."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from tunesmith.config import Base, Config, MethodKind, Refusal
from tunesmith.model import glm
from tunesmith.plan.optimizers import EIGHT_BIT
from tunesmith.plan.shapes import ENDS, glm_targets, multiplies_int8

PEFT_NAME = "default"
"""PEFT's name of the one adapter that a model has here."""


def without_bitsandbytes(config: Config) -> None:
    """Let bitsandbytes not be installed for this process, unless it stores the base or makes the optimizer.

    PEFT imports it wherever it is, and torch's compiler with it: 1.5 s (docs/log.md). For a process that loads one model.
    """
    in_base = config.method.base is not Base.as_is and not multiplies_int8(config)
    if not in_base and config.optim.name not in EIGHT_BIT:
        sys.modules.setdefault("bitsandbytes", cast(Any, None))


def with_adapters(model: Any, config: Config) -> Any:
    """The model inside PEFT's, everything but what the method trains frozen; raises Refusal where names do not fit the model."""
    from peft import PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    method = config.method
    task, virtual = TaskType.CAUSAL_LM, method.virtual_tokens
    if method.kind is MethodKind.lora:
        settings = _lora(model, config)
    elif method.kind is MethodKind.prefix:
        settings = PrefixTuningConfig(task_type=task, num_virtual_tokens=virtual)
    else:
        settings = PromptTuningConfig(task_type=task, num_virtual_tokens=virtual, prompt_tuning_init=PromptTuningInit.RANDOM)
    try:
        with known_warnings():
            return get_peft_model(model, settings)
    except ValueError as error:
        linear = ", ".join(sorted(_linear_names(model) | {"lm_head"}))
        raise Refusal(f"method.targets={method.targets}: {str(error).splitlines()[0]} — this model has {linear}") from None


def _lora(model: Any, config: Config) -> Any:
    from peft import LoraConfig, TaskType

    method = config.method
    targets = glm_targets(method.targets) if model.config.model_type == glm.NATIVE else list(method.targets)
    if targets == ["all-linear"]:
        targets = sorted(_linear_names(model))  # PEFT takes layers_to_transform beside names only
    layers = model.config.num_hidden_layers
    last = layers - 1 if method.last_layer < 0 else method.last_layer
    if not method.first_layer <= last < layers:
        raise Refusal(
            f"method.first_layer={method.first_layer}, method.last_layer={method.last_layer}: this model has layers 0 to {layers - 1} "
            "— type method.first_layer=0 method.last_layer=-1"
        )
    if unknown := sorted(set(method.modules_to_save) - set(ENDS)):
        raise Refusal(f"method.modules_to_save={','.join(unknown)}: not trained beside adapters — type some of {', '.join(ENDS)}")
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=method.r,
        lora_alpha=cast(int, method.alpha),
        lora_dropout=method.dropout,
        target_modules=targets,
        layers_to_transform=list(range(method.first_layer, last + 1)) if last - method.first_layer + 1 < layers else None,
        use_rslora=method.rslora,
        use_dora=method.dora,
        modules_to_save=list(method.modules_to_save) or None,
        # Where head and embedding are one tensor they stay one, which is trained and saved.
        ensure_weight_tying=bool(method.modules_to_save and model.config.tie_word_embeddings),
    )


def _linear_names(model: Any) -> set[str]:
    """Last names of the linear layers, the output head left out."""
    head = model.get_output_embeddings()
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


@contextmanager
def known_warnings() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for an attribute by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def inner_model(model: Any) -> Any:
    """transformers' model, inside PEFT's or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> Any:
    """The decoder layers, lowest first."""
    return inner_model(model).base_model.layers


def recompute_layers(model: Any, config: Config) -> None:
    """Let one of every engine.checkpoint_every layers, from the lowest trained one on, be recomputed in backward.

    Below it nothing is kept either way, and nothing wants a gradient.
    """
    base, method = inner_model(model), config.method
    with known_warnings():
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Non-reentrant checkpoints need no gradient at the embedding; PEFT and transformers hook one in all the same, and
    # backward would go on below the lowest adapter.
    embedding = base.get_input_embeddings()
    embedding._forward_hooks.clear()
    lowest = 0 if trains_inputs(model) or method.kind is not MethodKind.lora else method.first_layer
    for number, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = number >= lowest and (number - lowest) % config.engine.checkpoint_every == 0


def trains_inputs(model: Any) -> bool:
    """Whether the embedding is trained."""
    return any(weight.requires_grad for weight in inner_model(model).get_input_embeddings().parameters())


def learned_prompt(model: Any) -> torch.Tensor | None:
    """The embeddings of a prompt's virtual tokens, [virtual tokens, hidden]; None where the method is another."""
    return _learned(model) if _kind(model) == "PROMPT_TUNING" else None


def learned_prefix(model: Any) -> list[torch.Tensor] | None:
    """Keys and values of a prefix in each layer, [2, virtual tokens, kv heads, head_dim]; None where the method is another."""
    if _kind(model) != "PREFIX_TUNING":
        return None
    settings, flat = model.peft_config[PEFT_NAME], _learned(model)
    heads = settings.num_attention_heads
    # PEFT's order: layer, key or value, head.
    return list(flat.view(len(flat), settings.num_layers, 2, heads, -1).permute(1, 2, 0, 3, 4).unbind(0))


def is_prompt_learning(model: Any) -> bool:
    """Whether what is trained are virtual tokens, and not weights inside the model."""
    return _kind(model) in ("PROMPT_TUNING", "PREFIX_TUNING")


def _kind(model: Any) -> str:
    return model.peft_config[PEFT_NAME].peft_type.value if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else ""


def _learned(model: Any) -> torch.Tensor:
    encoder = model.prompt_encoder[PEFT_NAME]
    numbers = model.prompt_tokens[PEFT_NAME].to(encoder.embedding.weight.device)
    return cast(torch.Tensor, encoder(numbers))


def save_model(model: Any, folder: Any, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write adapters in PEFT layout, or a full model in Hugging Face layout, into a folder; state: its trained weights, whole."""
    if state is not None:  # of weights under several names, a module lists the first only
        first: dict[int, str] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight.requires_grad:
                state = {**state, name: state[first.setdefault(id(weight), name)]}
    if state is not None and is_prompt_learning(model):
        # PEFT would read the module itself, of which a rank may hold a part only.
        weight = state[f"prompt_encoder.{PEFT_NAME}.embedding.weight"]
        model.get_prompt_embedding_to_save = lambda adapter_name: weight
        try:
            model.save_pretrained(folder)
        finally:
            del model.get_prompt_embedding_to_save
    else:
        model.save_pretrained(folder, state_dict=state)


def new_tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What generate(**settings) answers to prompts padded on the left, int64 [prompts, new tokens]."""
    prompt = learned_prompt(model)
    if prompt is None:
        return cast(torch.Tensor, model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :])
    # PEFT's own way counts padding as positions, which are then further from the virtual tokens than in training.
    base = inner_model(model)
    embedded = base.get_input_embeddings()(ids)
    rows = prompt.to(embedded.dtype).expand(len(ids), -1, -1)
    seen = torch.cat([mask.new_ones(rows.shape[:2]), mask], dim=1)
    return cast(torch.Tensor, base.generate(inputs_embeds=torch.cat([rows, embedded], dim=1), attention_mask=seen, **settings))


def act_from(model: Any, invocation: Sequence[int]) -> None:
    """Write into PEFT's settings, which are saved with the adapters, that they act from these tokens on.

    PEFT's own layers were made without it: they act on all that they are given, which begins there.
    """
    model.peft_config[PEFT_NAME].alora_invocation_tokens = list(invocation)


def parameter_groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The trainable weights for an optimizer, each group with `params`, `weight_decay` and `lr_factor`, which the schedule's rate
    is multiplied by: method.b_lr_ratio for LoRA's B (LoRA+, arXiv 2402.12354), else 1. Vectors get no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            decay = config.optim.weight_decay if weight.ndim >= 2 else 0.0
            factor = config.method.b_lr_ratio if ".lora_B." in name else 1.0
            groups.setdefault((factor, decay), []).append(weight)
    return [{"params": weights, "weight_decay": decay, "lr_factor": factor} for (factor, decay), weights in groups.items()]
