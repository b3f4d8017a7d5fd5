"""ChatGLM's own checkpoint layout, to transformers' native GLM and back, without running the code that comes with it.

ChatGLM2, ChatGLM3 and GLM-4 as published and transformers' GlmForCausalLM are one function: RMSNorm before attention and MLP,
rotary embedding of the first half of each head in interleaved pairs, few key/value groups, biases at queries, keys and values,
SwiGLU, an output head of its own. Only names differ, and queries, keys and values are one matrix in the original. In halves
transformers rounds once more inside RMSNorm, before the norm's weight instead of after it.

Tensors are mapped from disk and written a shard at a time: that is all the memory a conversion takes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunesmith.config import Refusal
from tunesmith.data.glm_tokenizer import GlmTokenizer
from tunesmith.model.source import free_gib, new_folder
from tunesmith.plan.shapes import GLM_LAYERS

if TYPE_CHECKING:  # only who converts a model waits for these
    from transformers import GlmConfig

ORIGINAL, NATIVE = "chatglm", "glm"
"""The model_type of the two layouts."""
INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
"""What says which shard holds a weight, by the shards' suffix; the first that is here is read."""
GLM4_ROWS = 151552
"""Rows of GLM-4's embedding, by which it is told."""

_OUTSIDE = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
_INSIDE = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(?:(self_attention|mlp)\.)?(\w+)\.(weight|bias)")
_BLOCKS = {"self_attention": "self_attn.", "mlp": "mlp.", None: ""}
_COMPUTED = "transformer.rotary_pos_emb.inv_freq"  # follows from the config

# What the original's code can be told beside sizes, as it is in every published ChatGLM2, ChatGLM3 and GLM-4.
_ALWAYS = {
    "multi_query_attention": True, "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "hidden_dropout": 0.0,
    "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False, "tie_word_embeddings": False,
    "quantization_bit": 0, "pre_seq_len": None,
}  # fmt: skip


def model_type(folder: Path) -> str:
    """The family that a folder's config.json names; empty if it names none."""
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def has_sentencepiece(folder: Path) -> bool:
    """Whether a folder's tokenizer is ChatGLM's, which transformers has no class for."""
    return model_type(folder) in (ORIGINAL, NATIVE) and not (folder / "tokenizer.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """The shards of a model folder in order, safetensors before .bin; raises Refusal where one is missing."""
    for suffix, index in INDEX.items():
        here = sorted(folder.glob(f"{index.partition('.')[0]}*{suffix}"))
        if not here:
            continue
        if not (folder / index).is_file():
            return here
        named = sorted({folder / name for name in json.loads((folder / index).read_text("utf-8"))["weight_map"].values()})
        if missing := [path.name for path in named if not path.is_file()]:
            raise Refusal(f"model.path={folder}: {', '.join(missing)} of {len(named)} shards missing — download what is left")
        return named
    raise Refusal(f"model.path={folder}: the folder has no weights (*.safetensors or *.bin)")


def native_names(name: str) -> list[str] | None:
    """What a tensor of the original is in GlmForCausalLM, its rows in order; [] where it is computed, None where it is nothing."""
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return [f"{_OUTSIDE[module]}.{kind}"]
    if not (found := _INSIDE.fullmatch(name)):
        return [] if name == _COMPUTED else None
    number, block, layer, _ = found.groups()
    return [f"model.layers.{number}.{_BLOCKS[block]}{native}.{kind}" for native in (GLM_LAYERS.get(layer, ()) if block else (layer,))]


def native_config(folder: Path) -> GlmConfig:
    """The config of GlmForCausalLM for a folder in the original layout; raises Refusal where the two are not one function."""
    from transformers import GlmConfig

    given = json.loads((folder / "config.json").read_text("utf-8"))
    for key, value in _ALWAYS.items():
        if given.get(key, value) != value:
            raise Refusal(f"model.path={folder}: {key} is {given[key]} in its config.json, and {value} in what can be loaded")
    try:
        return GlmConfig(
            architectures=["GlmForCausalLM"],
            vocab_size=given["padded_vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["ffn_hidden_size"],
            num_hidden_layers=given["num_layers"],
            num_attention_heads=given["num_attention_heads"],
            num_key_value_heads=given["multi_query_group_num"],
            head_dim=given["kv_channels"],
            attention_bias=given["add_qkv_bias"],
            attention_dropout=given.get("attention_dropout", 0.0),
            rms_norm_eps=given["layernorm_epsilon"],
            max_position_embeddings=given["seq_length"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0 * given.get("rope_ratio", 1),
                "partial_rotary_factor": 0.5,
            },
            dtype=given.get("torch_dtype", "float16"),
            eos_token_id=given.get("eos_token_id") or 2,
            pad_token_id=None,  # the original's embedding has no row that is never trained
        )
    except KeyError as error:
        raise Refusal(
            f"model.path={folder}: config.json has no {error}, as every ChatGLM2, ChatGLM3 and GLM-4 has — "
            "the first ChatGLM-6B is another architecture: model.path=THUDM/chatglm3-6b"
        ) from None


def to_native(folder: Path, out: Path) -> None:
    """Write a folder in the original layout as one that transformers, PEFT and bitsandbytes load by themselves: same bits and dtypes."""
    from transformers import GlmForCausalLM

    config = native_config(folder)
    tokenizer = _tokenizer(folder, config)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GlmForCausalLM(config).named_parameters()}
    shards = weight_files(folder)
    out.mkdir(parents=True)
    where: dict[str, str] = {}
    total = 0
    for number, path in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _renamed(_open(path), shapes)
        _save(tensors, out / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if missing := sorted(shapes.keys() - where.keys()):
        raise Refusal(f"model.path={folder}: no weights for {missing[0]} ({len(missing)} missing) — download the model anew")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(out)
    if tokenizer:
        tokenizer.save_pretrained(out)
    else:
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "chat_template.jinja"):
            if path.is_file():
                shutil.copyfile(path, out / path.name)


def to_original(result: Path, base: Path, original: Path, out: Path) -> None:
    """Write what training left in the layout of `original`: its files, names, shards and dtypes, so that its own code loads it.

    result: a full model in transformers' layout, or an adapter (PEFT's layout) for `base`: LoRA, with DoRA and modules_to_save, which is
    merged in fp32, or a prefix, of which `out` gets what ChatGLM's P-Tuning v2 writes (`_write_prefix`).
    """
    settings = result / "adapter_config.json"
    if settings.is_file() and json.loads(settings.read_text("utf-8")).get("peft_type") == "PREFIX_TUNING":
        _write_prefix(result, original, out)
        return
    adapter = _adapter(result) if settings.is_file() else {}
    shards = [_open(path) for path in weight_files(original)]
    parts = {name: shard for path in weight_files(base if adapter else result) for shard in [_open(path)] for name in shard.names}
    wanted = {part for shard in shards for name in shard.names for part in native_names(name) or ()}
    if odd := sorted((wanted ^ parts.keys()) | (adapter.keys() - parts.keys())):
        raise Refusal(f"{result}: {odd[0]} is not in both it and {original} — it was trained on another model")
    if (need := gib(shard.path for shard in shards)) > (free := free_gib(out.parent)):
        raise Refusal(f"{out}: {free:.1f} GiB free, the weights take {need:.1f} — name a folder on another disk")

    def trained(name: str) -> torch.Tensor:
        weight = parts[name].get(name)
        return adapter[name](weight.float()) if name in adapter else weight

    def filled(name: str, old: torch.Tensor) -> torch.Tensor:
        found = [trained(part) for part in native_names(name) or ()] or [old]
        new = (found[0] if len(found) == 1 else torch.cat(found)).to(old.dtype)  # what need not change is not copied
        if new.shape != old.shape:
            raise Refusal(f"{result}: {name} is {list(new.shape)}, and {list(old.shape)} in {original} — it was trained on another model")
        return new

    with new_folder(out) as made:
        other_weights = {index for suffix, index in INDEX.items() if suffix != shards[0].path.suffix}
        for path in original.iterdir():
            if path.is_file() and path.suffix not in INDEX and path.name not in other_weights:
                shutil.copyfile(path, made / path.name)
        for shard in shards:
            _save({name: filled(name, shard.get(name)) for name in shard.names}, made / shard.path.name)


def gib(files: Iterable[Path]) -> float:
    """Size of files together, in GiB."""
    return sum(path.stat().st_size for path in files) / 2**30


@dataclass(frozen=True)
class _Shard:
    path: Path
    names: list[str]
    get: Callable[[str], torch.Tensor]


def _open(path: Path) -> _Shard:
    """A shard whose tensors are mapped from disk, not read."""
    try:
        if path.suffix == ".bin":
            weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return _Shard(path, list(weights), weights.__getitem__)
        file = safe_open(path, framework="pt")
        return _Shard(path, list(file.keys()), file.get_tensor)  # type: ignore[no-untyped-call]  # safetensors'
    except Exception as error:  # whatever a reader raises on a damaged file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{path}: cannot be read as weights ({first}) — download the file itself, whole, not Git LFS's pointer") from None


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


def _renamed(shard: _Shard, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """A shard's tensors under the names of GlmForCausalLM, cut where they are several there."""
    renamed: dict[str, torch.Tensor] = {}
    for name in shard.names:
        names = native_names(name)
        if names is None or not set(names) <= shapes.keys():
            raise Refusal(f"{shard.path}: holds {name}, which no ChatGLM2, ChatGLM3 or GLM-4 of its config.json has")
        if not names:
            continue
        tensor, rows = shard.get(name), [shapes[part][0] for part in names]
        if tensor.shape != (sum(rows), *shapes[names[0]][1:]):
            raise Refusal(f"{shard.path}: {name} is {list(tensor.shape)}, not as config.json has it")
        renamed |= zip(names, torch.split(tensor, rows), strict=True)
    return renamed


def _tokenizer(folder: Path, config: GlmConfig) -> GlmTokenizer | None:
    """The tokenizer to convert; None where transformers reads the folder's own."""
    if (folder / "tokenizer.json").is_file():
        return None
    if config.vocab_size == GLM4_ROWS:
        raise Refusal(
            f"model.path={folder}: GLM-4's tokenizer.model is no SentencePiece model — take its twin in transformers' layout, "
            "model.path=THUDM/glm-4-9b-chat-hf, or copy that one's tokenizer.json and tokenizer_config.json there"
        )
    tokenizer = GlmTokenizer.from_pretrained(folder)
    if config.rope_parameters["rope_theta"] != 10000.0 and not tokenizer.roles:
        # Read as ChatGLM3-6B-32K has it, ChatGLM2-6B-32K's rope_ratio would give another model without a word.
        raise Refusal(
            f"model.path={folder}: ChatGLM2's rope_ratio divides positions, which is not mapped — model.path=THUDM/chatglm3-6b-32k"
        )
    return tokenizer


Change = Callable[[torch.Tensor], torch.Tensor]
"""From a weight to what an adapter makes of it, both fp32."""


def _adapter(folder: Path) -> dict[str, Change]:
    """What a LoRA adapter makes of each weight that it adapts or replaces: W + scale B A, with DoRA each row as long as its magnitude says
    (arXiv 2402.09353), or a weight of its own."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    weights = {name.removeprefix("base_model.model."): weight for name, weight in load_file(folder / "adapter_model.safetensors").items()}
    odd = [key for key in ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens") if config.get(key)]
    if config.get("peft_type") != "LORA" or odd:
        named = ", ".join(odd) or config.get("peft_type")
        raise Refusal(f"{folder}: {named} cannot be merged into these weights — load it by PEFT beside the model in transformers' layout")

    def change(layer: str) -> Change:
        a, b = weights[f"{layer}.lora_A.weight"].float(), weights[f"{layer}.lora_B.weight"].float()
        scale = config["lora_alpha"] / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        magnitude = weights.get(f"{layer}.lora_magnitude_vector")

        def changed(weight: torch.Tensor) -> torch.Tensor:
            merged: torch.Tensor = weight + (b @ a) * scale
            return merged if magnitude is None else merged * (magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]

        return changed

    def replace(own: torch.Tensor) -> Change:
        return lambda _: own.float()

    layers = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    replaced = {name: replace(own) for name, own in weights.items() if ".lora_" not in name}
    return replaced | {f"{layer}.weight": change(layer) for layer in layers}


def _write_prefix(adapter: Path, original: Path, out: Path) -> None:
    """A prefix as ChatGLM's own P-Tuning v2 leaves it: its prefix encoder's weights, and a config.json with their number, `pre_seq_len`.

    Both keep [tokens, layers x key and value x groups x head] numbers. But PEFT's text begins behind the learned keys, at their number n,
    and ChatGLM's at 0; neither rotates those keys. With R_p the rotation at position p, (R_(n+p) q) . k = (R_p q) . (R_-n k): turned back
    by n, the keys are the same function there.
    """
    config = native_config(original)
    learned = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"].float()
    head, groups = config.head_dim, config.num_key_value_heads
    if learned.shape[1] != config.num_hidden_layers * 2 * groups * head:
        raise Refusal(f"{adapter}: {learned.shape[1]} numbers a token are not those of {original} — it was trained on another model")
    keys = learned.view(len(learned), config.num_hidden_layers, 2, groups, head)[:, :, 0]
    rotated = head // 2
    angle = -len(learned) * config.rope_parameters["rope_theta"] ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    cos, sin = angle.cos().float(), angle.sin().float()
    one, two = keys[..., 0:rotated:2].clone(), keys[..., 1:rotated:2].clone()
    keys[..., 0:rotated:2], keys[..., 1:rotated:2] = one * cos - two * sin, two * cos + one * sin
    given = json.loads((original / "config.json").read_text("utf-8"))
    with new_folder(out) as made:
        torch.save({"transformer.prefix_encoder.embedding.weight": learned}, made / "pytorch_model.bin")
        told = {**given, "pre_seq_len": len(learned), "prefix_projection": False}
        (made / "config.json").write_text(json.dumps(told, indent=2, ensure_ascii=False), "utf-8")
