"""A run's result as a model of its own: adapters merged into the base, in transformers' layout or in ChatGLM's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tunesmith.config import Model, Refusal
from tunesmith.model import glm
from tunesmith.model.adapters import known_warnings
from tunesmith.model.source import free_gib, model_folder, new_folder, original_folder


def export(result: Path, model: Model, out: Path, original: bool) -> None:
    """Write the folder `out`, whole or not at all, in the base's dtype; merging is computed in fp32 (W + scale B A).

    result: an adapter in PEFT's layout, or a full model; original: in the layout that ChatGLM was published in.
    Raises Refusal where it cannot be merged, `out` exists, or the disk has no room.
    """
    base = model_folder(model)
    if original:
        published = original_folder(model)
        if glm.model_type(published) != glm.ORIGINAL:
            raise Refusal(f"--original: {model.path} is in transformers' own layout already — leave --original out")
        glm.to_original(result, base, published, out)
        return
    is_adapter = (result / "adapter_config.json").is_file()
    settings = json.loads((result / "adapter_config.json").read_text("utf-8")) if is_adapter else {}
    if settings.get("alora_invocation_tokens"):
        raise Refusal(f"{result}: acts from the user's turn on (method.alora), which no weight can — load it by PEFT beside {base}")
    if is_adapter and (kind := settings.get("peft_type")) != "LORA":
        raise Refusal(f"{result}: {kind} adds virtual tokens, which no weight can hold — load it by PEFT beside {base}")
    need = glm.gib(glm.weight_files(base))
    if need > (free := free_gib(out.parent)):
        raise Refusal(f"{out}: {free:.1f} GiB free, the weights take {need:.1f} — name a folder on another disk")
    with new_folder(out) as made:
        _merge(result, base, made) if is_adapter else shutil.copytree(result, made, dirs_exist_ok=True)
        for path in base.iterdir():
            is_weights = path.suffix in (".safetensors", ".bin", ".py") or ".index." in path.name
            if path.is_file() and not is_weights and not (made / path.name).exists():  # tokenizer, chat template
                shutil.copyfile(path, made / path.name)


def _merge(adapter: Path, base: Path, made: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with known_warnings():
        merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    merged.to(dtype).save_pretrained(made)
