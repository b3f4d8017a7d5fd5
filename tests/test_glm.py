"""ChatGLM's own checkpoint layout: held against a forward written here from the architecture's description, and back to the bit.

No published file is here. A tiny checkpoint with the published names, keys and order of rows stands for it.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.conftest import environment, launch, tiny_conversations
from tests.test_model import CPU, config_for, examples, plain_loss
from tunesmith.config import Base, Batching, Method, MethodKind, Model, Refusal
from tunesmith.data.glm_tokenizer import GlmTokenizer
from tunesmith.data.layout import lay_out
from tunesmith.model import build_model, load_tokenizer, read_adapter, save_model
from tunesmith.model import glm as room
from tunesmith.model.glm import native_config, native_names, to_native, to_original, weight_files
from tunesmith.model.source import model_folder, original_folder
from tunesmith.plan.flops import step_flops
from tunesmith.plan.shapes import KNOWN, shape_of
from tunesmith.run import RunFolder
from tunesmith.world import World

# peft 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "ffn_hidden_size": 80, "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 48,
    "kv_channels": 16, "layernorm_epsilon": 1e-05, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 6, "num_layers": 3, "original_rope": True, "padded_vocab_size": 512, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 256, "use_cache": True, "torch_dtype": "float16", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GLM4: dict[str, Any] = {"layernorm_epsilon": 1.5625e-07, "rope_ratio": 500, "num_layers": 2, "torch_dtype": "bfloat16"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def sentencepiece() -> bytes:
    made = io.BytesIO()
    texts = [turn["content"] for one in tiny_conversations(64) for turn in one["conversations"] if "content" in turn]  # type: ignore[attr-defined]
    SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "track\n```python\ntool_call(area='kitchen')\n```", "HassTurnOn", "HassTurnOff", '{"ok": true}'] * 5),
        model_writer=made, model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture
def publish(tmp_path: Path, sentencepiece: bytes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a checkpoint as it is published: two shards with their index, remote code, tokenizer; the cache is a folder of its own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))

    def write(name: str = "chatglm3-tiny", suffix: str = ".safetensors", seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {**CONFIG, **changes}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        weights = list(published_weights(config, seed).items())
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        shards = {f"{stem}-0000{n}-of-00002{suffix}": dict(part) for n, part in ((1, weights[:9]), (2, weights[9:]))}
        for file, part in shards.items():
            if suffix == ".bin":
                torch.save(part, folder / file)
            else:
                save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": {key: file for file, part in shards.items() for key in part}}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
        (folder / "tokenizer.model").write_bytes(sentencepiece)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer", "auto_map": {}}')
        (folder / "tokenization_chatglm.py").write_text('raise SystemExit("remote code was run")  # "<|user|>"\n')
        (folder / "modeling_chatglm.py").write_text('raise SystemExit("remote code was run")\n')
        return folder

    return write


def published_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights under the published names, each of the size and in the place that the description gives it."""
    draw, dtype = torch.Generator().manual_seed(seed), DTYPES[config["torch_dtype"]]
    h, f, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    head, heads, groups = config["kv_channels"], config["num_attention_heads"], config["multi_query_group_num"]
    fused = heads * head + 2 * groups * head
    sizes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, h)}
    for layer in range(config["num_layers"]):
        inside = f"transformer.encoder.layers.{layer}."
        sizes |= {
            f"{inside}input_layernorm.weight": (h,), f"{inside}self_attention.query_key_value.weight": (fused, h),
            f"{inside}self_attention.query_key_value.bias": (fused,), f"{inside}self_attention.dense.weight": (h, heads * head),
            f"{inside}post_attention_layernorm.weight": (h,), f"{inside}mlp.dense_h_to_4h.weight": (2 * f, h),
            f"{inside}mlp.dense_4h_to_h.weight": (h, f),
        }  # fmt: skip
    sizes |= {"transformer.encoder.final_layernorm.weight": (h,), "transformer.output_layer.weight": (vocab, h)}
    weights = {name: (0.2 * torch.randn(size, generator=draw) + name.endswith("norm.weight")).to(dtype) for name, size in sizes.items()}
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2))
    return {"transformer.rotary_pos_emb.inv_freq": inv_freq.to(dtype), **weights}


@dataclass(frozen=True)
class Rules:
    """What a port of the architecture can get wrong."""

    interleaved: bool = True
    first_half: bool = True
    gate_first: bool = True
    neighbours_share: bool = True


def described_logits(
    weights: dict[str, torch.Tensor], config: dict[str, Any], ids: list[int], rules: Rules = Rules(), prefix: torch.Tensor | None = None
) -> torch.Tensor:
    """[tokens, vocab] logits, fp32, by nothing but the description: a loop over layers, heads and pairs.

    prefix: the prefix encoder's weights, [learned tokens, layers x 2 x groups x head]: keys that are not rotated, and values.
    """
    w = {name: weight.float() for name, weight in weights.items()}
    head, heads, groups = config["kv_channels"], config["num_attention_heads"], config["multi_query_group_num"]
    n, rotated = len(ids), head // 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt() * w[f"{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [n, head]
        x, start = x.clone(), 0 if rules.first_half else rotated
        for pair in range(rotated // 2):
            angle = torch.arange(n) * (10000.0 * config.get("rope_ratio", 1)) ** (-2 * pair / rotated)
            a, b = (2 * pair, 2 * pair + 1) if rules.interleaved else (pair, pair + rotated // 2)
            one, two = x[:, start + a].clone(), x[:, start + b].clone()
            x[:, start + a] = one * angle.cos() - two * angle.sin()
            x[:, start + b] = two * angle.cos() + one * angle.sin()
        return x

    x = w["transformer.embedding.word_embeddings.weight"][ids]
    hidden_future = torch.ones(n, n).triu(1).bool()
    for layer in range(config["num_layers"]):
        inside = f"transformer.encoder.layers.{layer}"
        fused = norm(x, f"{inside}.input_layernorm") @ w[f"{inside}.self_attention.query_key_value.weight"].T
        fused = fused + w[f"{inside}.self_attention.query_key_value.bias"]
        columns = list(fused.split(head, dim=1))  # all query heads, then the groups' keys, then their values
        queries, keys, values = columns[:heads], columns[heads : heads + groups], columns[heads + groups :]
        outputs = []
        for number, query in enumerate(queries):
            group = number // (heads // groups) if rules.neighbours_share else number % groups
            key, value, hidden = rotate(keys[group]), values[group], hidden_future
            if prefix is not None:
                learned = prefix.view(len(prefix), config["num_layers"], 2, groups, head)[:, layer, :, group]
                key, value = torch.cat([learned[:, 0], key]), torch.cat([learned[:, 1], value])
                hidden = torch.cat([torch.zeros(n, len(prefix)).bool(), hidden], 1)
            scores = rotate(query) @ key.T / head**0.5
            outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)
        x = x + torch.cat(outputs, 1) @ w[f"{inside}.self_attention.dense.weight"].T
        both = norm(x, f"{inside}.post_attention_layernorm") @ w[f"{inside}.mlp.dense_h_to_4h.weight"].T
        gate, up = both.chunk(2, 1) if rules.gate_first else both.chunk(2, 1)[::-1]
        x = x + (gate * gate.sigmoid() * up) @ w[f"{inside}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ w["transformer.output_layer.weight"].T


def read_original(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: weight
        for path in weight_files(folder)
        for name, weight in (load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)).items()
    }


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


IDS = torch.randint(0, 512, (150,), generator=torch.Generator().manual_seed(9)).tolist()


# --- the same function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"multi_query_group_num": 3}, {"rope_ratio": 50}, {"add_qkv_bias": True, **GLM4}, {"kv_channels": 32}],
    ids=["chatglm3-6b", "3 groups", "chatglm3-6b-32k", "glm-4-9b", "wide heads"],
)
def test_logits_are_those_of_the_description(publish: Callable[..., Path], changes: dict[str, Any], suffix: str) -> None:
    """Also that each of the description's facts matters here, so that none could be wrong unseen."""
    folder = publish(suffix=suffix, **changes)
    native = model_folder(Model(path=str(folder)))
    assert native != folder
    ours = logits_of(AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32), IDS)
    weights, config = read_original(folder), {**CONFIG, **changes}
    wanted = described_logits(weights, config, IDS)
    scale = wanted.std()
    assert (ours - wanted).abs().max() < 2e-4 * scale
    for rule in ("interleaved", "first_half", "gate_first", "neighbours_share"):
        wrong = described_logits(weights, config, IDS, replace(Rules(), **{rule: False}))
        assert (wrong - wanted).abs().max() > 0.1 * scale, f"{rule} makes no difference"
    other = described_logits(weights, {**config, "rope_ratio": 3 * config.get("rope_ratio", 1)}, IDS)
    assert (other - wanted).abs().max() > 0.1 * scale, "rope_ratio makes no difference"


def test_the_published_sizes_are_the_planned_ones() -> None:
    """The published config as far as it gives sizes: to the weight what transformers would build, and what a plan reckons with."""
    published = {
        "chatglm3-6b": {"num_layers": 28, "padded_vocab_size": 65024, "seq_length": 8192},
        "chatglm2-6b": {"num_layers": 28, "padded_vocab_size": 65024, "seq_length": 32768},
        "glm-4-9b": {**GLM4, "num_layers": 40, "padded_vocab_size": 151552, "seq_length": 131072},
    }
    wide = {"hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32}
    for name, sizes in published.items():
        total = sum(weight.numel() for weight in _on_paper({**CONFIG, **wide, **sizes}).values())
        assert KNOWN[name].total_weights == total - 32, "all but the rotary buffer"


def _on_paper(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint without their numbers."""
    small = published_weights({**config, "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "padded_vocab_size": 8}, 0)
    h, f, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    fused = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * config["kv_channels"]
    sizes = {
        "word_embeddings": (vocab, h), "output_layer": (vocab, h), "query_key_value": (fused, h), "dense_h_to_4h": (2 * f, h),
        "dense_4h_to_h": (h, f), "dense": (h, config["num_attention_heads"] * config["kv_channels"]),
    }  # fmt: skip
    made = {}
    for name in small:
        layer, kind = name.split(".")[-2:]
        size = {"bias": (fused,), "inv_freq": (32,)}.get(kind) or sizes.get(layer, (h,))
        for number in range(config["num_layers"] if ".layers." in name else 1):
            made[name.replace(".layers.0.", f".layers.{number}.")] = torch.empty(size, device="meta")
    return made


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_the_same_bits(publish: Callable[..., Path], suffix: str, dtype: str, tmp_path: Path) -> None:
    folder = publish(suffix=suffix, torch_dtype=dtype)
    native = model_folder(Model(path=str(folder)))
    to_original(native, native, folder, tmp_path / "back")
    before, after = ({path.name: path for path in place.iterdir()} for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys(), "every file, and no other"
    for name in before:
        if not name.endswith(suffix):
            assert before[name].read_bytes() == after[name].read_bytes(), name
    old, new = read_original(folder), read_original(tmp_path / "back")
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype == DTYPES[dtype]
        assert torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8)), name
    for path in weight_files(folder):
        assert _shard(path).keys() == _shard(tmp_path / "back" / path.name).keys(), "a weight moved to another shard"


def _shard(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return found


def test_the_native_folder_has_the_same_rows_and_names(publish: Callable[..., Path]) -> None:
    folder = publish()
    native = model_folder(Model(path=str(folder)))
    old = read_original(folder)
    new = {name: weight for path in weight_files(native) for name, weight in _shard(path).items()}
    for name, weight in old.items():
        names = native_names(name)
        assert names is not None
        if names:
            assert torch.equal(torch.cat([new.pop(part) for part in names]), weight), name
    assert not new
    assert native_names("transformer.encoder.layers.12.self_attention.query_key_value.bias") == [
        f"model.layers.12.self_attn.{part}_proj.bias" for part in "qkv"
    ]
    saved = json.loads((native / "config.json").read_text())
    assert (saved["model_type"], saved["rms_norm_eps"], saved["dtype"], saved["eos_token_id"]) == ("glm", 1e-5, "float16", 2)
    assert (saved["rope_parameters"]["rope_theta"], saved["rope_parameters"]["partial_rotary_factor"]) == (10000.0, 0.5)
    assert saved["pad_token_id"] is None, "row 0 of the embedding would never be trained"


def test_a_folder_is_converted_once_and_anew_when_it_changes(publish: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish()
    model = Model(path=str(folder))
    first = model_folder(model)
    assert "converting chatglm3-tiny" in capsys.readouterr().err
    assert model_folder(model) == first
    assert capsys.readouterr().err == ""
    assert original_folder(model) == folder
    assert model_folder(Model(path=str(first))) == first, "what is converted is not converted again"
    save_file(_shard(folder / "model-00001-of-00002.safetensors"), folder / "model-00001-of-00002.safetensors", {"format": "pt", "n": "2"})
    assert model_folder(model) != first


def test_both_folders_have_the_tokenizer(publish: Callable[..., Path], sentencepiece: bytes) -> None:
    folder = publish()
    for place in (folder, model_folder(Model(path=str(folder)))):
        tokenizer = load_tokenizer(place)
        assert isinstance(tokenizer, GlmTokenizer)
        assert (tokenizer.proto, tokenizer.roles) == (sentencepiece, True)
    (folder / "tokenization_chatglm.py").write_text("# no roles: ChatGLM2\n")
    assert load_tokenizer(model_folder(Model(path=str(folder)))).roles is False  # type: ignore[attr-defined]


# --- trained -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", list(Batching))
def test_ragged_equals_each_conversation_alone(publish: Callable[..., Path], batching: Batching) -> None:
    """Loss and every gradient, row 0 of the embedding included."""
    native = model_folder(Model(path=str(publish(torch_dtype="float32"))))
    ours = build_model(config_for(native, kind=MethodKind.full), native, CPU)
    plain = AutoModelForCausalLM.from_pretrained(native, attn_implementation="eager", dtype=torch.float32)
    conversations = examples(7, vocabulary=16)
    assert any((example.ids[:-1] == 0).any() for example in conversations)
    ours_loss, plain_total = ours(lay_out(conversations, batching)), plain_loss(plain, conversations)
    assert ours_loss.item() == pytest.approx(plain_total.item(), rel=1e-5)
    ours_loss.backward()
    plain_total.backward()
    for (name, mine), (_, other) in zip(ours.model.named_parameters(), plain.named_parameters(), strict=True):
        scale = float(other.grad.abs().max())
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * scale), name
    assert ours.model.get_input_embeddings().weight.grad[0].abs().max() > 0


LORAS = {
    "all-linear": ["all-linear"],
    "ChatGLM's default": ["query_key_value"],
    "all, by ChatGLM's names": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "transformers' names": ["q_proj", "gate_up_proj"],
}


@pytest.mark.parametrize("base", list(Base))
@pytest.mark.parametrize("targets", LORAS.values(), ids=LORAS)
def test_every_method_trains(publish: Callable[..., Path], base: Base, targets: list[str]) -> None:
    folder = publish()
    native = model_folder(Model(path=str(folder)))
    module = build_model(config_for(native, base=base, targets=targets, r=4), native, CPU)
    shape = shape_of(str(folder))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == shape.adapter_weights(4, targets)
    adapted = {name.split(".")[-4] for name, p in module.named_parameters() if p.requires_grad}
    assert adapted == {name for name, _, _ in shape.adapted(targets)}
    loss = module(lay_out(examples(4), Batching.ragged))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)


def test_layers_that_do_not_exist_are_named(publish: Callable[..., Path]) -> None:
    native = model_folder(Model(path=str(publish())))
    with pytest.raises(ValueError, match=r"method\.targets=up_proj: .* type some of q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj"):
        shape_of(str(native)).adapted(["query_key_value", "up_proj"])
    with pytest.raises(Refusal, match=r"method\.targets=.*gate_up_proj"):
        build_model(config_for(native, targets=["up_proj"]), native, CPU)


def test_both_layouts_have_the_shape_of_the_model(publish: Callable[..., Path]) -> None:
    folder = publish(multi_query_group_num=3)
    native = model_folder(Model(path=str(folder)))
    shape = shape_of(str(folder), "tiny")
    assert shape == shape_of(str(native), "tiny")
    model = AutoModelForCausalLM.from_pretrained(native)
    assert shape.total_weights == sum(weight.numel() for weight in model.parameters())
    assert shape.total_weights + 4 == sum(weight.numel() for weight in read_original(folder).values()), "the rotary buffer is 4"
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.layers * shape.matmul_weights_per_layer == sum(module.weight.numel() for module in linear)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", [Method(kind=MethodKind.full), *(Method(r=4, targets=each) for each in LORAS.values())], ids=["full", *LORAS])
def test_flops_are_counted_to_the_last(publish: Callable[..., Path], method: Method, checkpointing: bool) -> None:
    rows, length, targets = 3, 24, 17
    folder = publish(torch_dtype="float32")
    native = model_folder(Model(path=str(folder)))
    config = config_for(native, kind=method.kind, r=method.r, targets=method.targets)
    config.engine.checkpointing = checkpointing
    module = build_model(config, native, CPU)
    base = module.model.get_base_model() if method.kind is MethodKind.lora else module.model
    base.set_attn_implementation("eager")
    ids = torch.arange(rows * length).view(rows, length)
    with FlopCounterMode(display=False) as counter:
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = base.lm_head(hidden.reshape(-1, hidden.shape[-1])[:targets])
        F.cross_entropy(logits, ids.reshape(-1)[:targets], reduction="sum").backward()  # type: ignore[no-untyped-call]
    planned = step_flops(shape_of(str(folder)), method, [length] * rows, targets, checkpointing=checkpointing, attention="dense")
    assert planned.executed == counter.get_total_flops()


# --- written back --------------------------------------------------------------------------------------------------


def trained(native: Path, steps: int = 2, **method: Any) -> Any:
    module = build_model(config_for(native, **method), native, CPU)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(steps):
        module(lay_out(examples(4), Batching.ragged)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.model


MERGED: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "trained head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("method", MERGED.values(), ids=MERGED)
def test_an_adapter_is_merged_into_the_original_layout(publish: Callable[..., Path], tmp_path: Path, method: dict[str, Any]) -> None:
    """What ChatGLM's own code computes from the folder is what PEFT's merge computes."""
    folder = publish(torch_dtype="float32")
    native = model_folder(Model(path=str(folder)))
    model = trained(native, r=4, alpha=8.0, targets=["query_key_value", "dense_4h_to_h"], **method)
    save_model(model, tmp_path / "adapter")
    to_original(tmp_path / "adapter", native, folder, tmp_path / "merged")
    merged = model.merge_and_unload().eval()
    merged.set_attn_implementation("eager")
    wanted = logits_of(merged, IDS)
    back = described_logits(read_original(tmp_path / "merged"), CONFIG, IDS)
    before = described_logits(read_original(folder), CONFIG, IDS)
    assert (back - wanted).abs().max() < 2e-4 * wanted.std() < (before - wanted).abs().max()
    again = model_folder(Model(path=str(tmp_path / "merged")))
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(again), IDS), wanted, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"rope_ratio": 50}], ids=["chatglm3-6b", "chatglm3-6b-32k"])
def test_a_prefix_is_written_as_p_tuning_v2_leaves_it(publish: Callable[..., Path], changes: dict[str, Any], tmp_path: Path) -> None:
    """ChatGLM's own prefix encoder, whose text begins at position 0, computes what PEFT does, whose text begins behind the prefix."""
    folder = publish(torch_dtype="float32", **changes)
    native, config = model_folder(Model(path=str(folder))), {**CONFIG, **changes}
    model = trained(native, kind=MethodKind.prefix, virtual_tokens=7)
    save_model(model, tmp_path / "adapter")
    to_original(tmp_path / "adapter", native, folder, tmp_path / "encoder")
    (name, prefix), *more = torch.load(tmp_path / "encoder" / "pytorch_model.bin", weights_only=True).items()
    assert (name, more) == ("transformer.prefix_encoder.embedding.weight", [])
    told = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert told == {**json.loads((folder / "config.json").read_text()), "pre_seq_len": 7, "prefix_projection": False}
    assert prefix.shape == (told["pre_seq_len"], told["num_layers"] * told["kv_channels"] * told["multi_query_group_num"] * 2)
    wanted = logits_of(read_adapter(tmp_path / "adapter", native), IDS)
    weights = read_original(folder)
    found, without = (described_logits(weights, config, IDS, prefix=learned) for learned in (prefix, None))
    assert (found - wanted).abs().max() < 2e-4 * wanted.std() < 0.01 * (without - wanted).abs().max()
    plain = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert (described_logits(weights, config, IDS, prefix=plain) - wanted).abs().max() > 0.01 * wanted.std(), "keys must be turned back"
    with pytest.raises(Refusal, match="exists already"):
        to_original(tmp_path / "adapter", native, folder, tmp_path / "encoder")
    deeper = publish("deeper", num_layers=4)
    with pytest.raises(Refusal, match=r"192 numbers a token are not those of .*deeper — it was trained on another model"):
        to_original(tmp_path / "adapter", native, deeper, tmp_path / "out")


def test_a_full_model_is_written_back_in_the_published_dtype(publish: Callable[..., Path], tmp_path: Path) -> None:
    folder = publish()
    native = model_folder(Model(path=str(folder)))
    model = trained(native, kind=MethodKind.full)
    save_model(model, tmp_path / "full")  # fp32
    to_original(tmp_path / "full", native, folder, tmp_path / "back")
    old, new = read_original(folder), read_original(tmp_path / "back")
    full = dict(model.named_parameters())
    for name, weight in new.items():
        assert weight.dtype == torch.float16
        parts = native_names(name)
        assert torch.equal(weight, torch.cat([full[part].detach() for part in parts]).half() if parts else old[name]), name
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "back" / "modeling_chatglm.py").is_file()


def test_what_cannot_be_written_back(publish: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, wider, deeper = publish(), publish("wider", ffn_hidden_size=96), publish("deeper", num_layers=4)
    native = model_folder(Model(path=str(folder)))
    with pytest.raises(Refusal, match=r"dense_4h_to_h\.weight is \[48, 80\], and \[48, 96\] in .*wider — it was trained on another model"):
        to_original(native, native, wider, tmp_path / "out")
    for one, other in ((native, deeper), (model_folder(Model(path=str(deeper))), folder)):
        with pytest.raises(Refusal, match=r"layers\.3\..* is not in both it and .* — it was trained on another model"):
            to_original(one, one, other, tmp_path / "out")
    assert not list(tmp_path.glob("*out*")), "something was left"
    with pytest.raises(Refusal, match="exists already"):
        to_original(native, native, folder, folder)
    save_model(trained(native, steps=0, r=2), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "rank_pattern": {"q_proj": 1}}))
    with pytest.raises(Refusal, match="rank_pattern cannot be merged into these weights"):
        to_original(tmp_path / "adapter", native, folder, tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 0))
    with pytest.raises(Refusal, match=r"0\.0 GiB free, the weights take"):
        to_original(native, native, folder, tmp_path / "out")


# --- refused -------------------------------------------------------------------------------------------------------


def lfs_pointer(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = _shard(folder / "model-00002-of-00002.safetensors")
        change(weights)
        save_file(weights, folder / "model-00002-of-00002.safetensors")

    return write


LAST = "transformer.encoder.final_layernorm.weight"
WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], Any], str]] = {
    "a shard is missing": ({}, lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors of 2 shards missing"),
    "Git LFS's pointer": ({}, lfs_pointer, "cannot be read as weights .* not Git LFS's pointer"),
    "a weight is missing": ({}, rewritten(lambda w: w.pop(LAST)), r"no weights for model\.norm\.weight \(1 missing\)"),
    "a weight of another size": ({}, rewritten(lambda w: w.update({LAST: torch.ones(47)})), r"final_layernorm\.weight is \[47\], not as config\.json"),
    "a weight too many": ({}, rewritten(lambda w: w.update({"transformer.vision.x": torch.ones(1)})), "holds transformer.vision.x, which no ChatGLM2"),
    "a layer too many": ({"num_layers": 2}, lambda f: None, "holds transformer.encoder.layers.1"),
    "quantised": ({"quantization_bit": 4}, lambda f: None, "quantization_bit is 4 in its config.json, and 0 in what can be loaded"),
    "one key head a query head": ({"multi_query_attention": False}, lambda f: None, "multi_query_attention is False"),
    "the first ChatGLM-6B": ({}, lambda f: (f / "config.json").write_text('{"model_type": "chatglm"}'), "has no 'padded_vocab_size'.* the first ChatGLM-6B"),
    "ChatGLM2-6B-32K": ({"rope_ratio": 50}, lambda f: (f / "tokenization_chatglm.py").write_text(""), "ChatGLM2's rope_ratio divides positions"),
    "GLM-4's tokenizer": ({"padded_vocab_size": 151552, "hidden_size": 2, "kv_channels": 4}, lambda f: None, "GLM-4's tokenizer.model is no SentencePiece"),
    "no tokenizer": ({}, lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "damage", "says"), WRONG.values(), ids=WRONG)
def test_what_is_not_the_published_model_is_refused(
    publish: Callable[..., Path], changes: dict[str, Any], damage: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    folder = publish(**changes)
    if changes == {"num_layers": 2}:
        (folder / "config.json").write_text(json.dumps({**CONFIG, "num_layers": 1}))
    damage(folder)
    with pytest.raises(Refusal, match=says) as refused:
        model_folder(Model(path=str(folder)))
    assert str(folder) in str(refused.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()] in ([], [tmp_path / "cache" / "models"]), "something was left"


def test_a_disk_without_room_is_refused_with_numbers(publish: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(padded_vocab_size=60_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 1000))
    with pytest.raises(Refusal, match=r"which takes 0\.\d GiB, and 0\.0 are free there — export TUNESMITH_CACHE="):
        model_folder(Model(path=str(folder)))


def test_glm4_reads_the_tokenizer_of_its_twin(publish: Callable[..., Path], tiny_model: Path) -> None:
    folder = publish(padded_vocab_size=room.GLM4_ROWS, hidden_size=4, kv_channels=4, **{key: GLM4[key] for key in ("rope_ratio", "layernorm_epsilon")})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model / name, folder / name)
    native = model_folder(Model(path=str(folder)))
    assert load_tokenizer(native).get_vocab() == load_tokenizer(tiny_model).get_vocab()
    assert native_config(folder).rope_parameters["rope_theta"] == 5e6


# --- the whole way -------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize(
    ("ranks", "method"), [(1, ["method.targets=[query_key_value]", "method.b_lr_ratio=4"]), (2, ["method=full", "engine.zero=3"])], ids=["LoRA+", "full, ZeRO 3"]
)
def test_train_evaluate_chat_and_write_back(
    publish: Callable[..., Path], overrides: list[str], ranks: int, method: list[str], tmp_path: Path
) -> None:
    """train.py on the published layout, its code not run; then an answer, and the original layout with what was learned in it."""
    folder = publish(torch_dtype="float32", seq_length=2048)
    words = [word for word in overrides if not word.startswith(("model.path", "train.steps", "optim.warmup"))]
    cache = {"TUNESMITH_CACHE": str(tmp_path / "cache")}
    words += [f"model.path={folder}", "train.steps=2", "optim.warmup_steps=0", *method]
    done = launch("python" if ranks == 1 else "torchrun", words, ranks, extra=cache)
    assert done.code == 0, done.output
    assert done.output.count("converting chatglm3-tiny") == 1, "one rank converts, the others wait"
    assert len(done.losses) == 2
    command = [sys.executable, "-m", "tunesmith.cli", "chat", str(done.run), "--once", "turn on the light", "--max-new-tokens", "4"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment(cache), cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    native = model_folder(Model(path=str(folder)))
    result = RunFolder(done.run, World()).result
    command = [sys.executable, "-m", "tunesmith.cli", "export", str(done.run), str(tmp_path / "back"), "--original"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment(cache), cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    wanted = logits_of(read_adapter(result, native), IDS)
    back, before = (described_logits(read_original(place), CONFIG, IDS) for place in (tmp_path / "back", folder))
    assert (back - wanted).abs().max() < 2e-4 * wanted.std() < (before - wanted).abs().max()


def test_an_empty_folder_converts_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no weights"):
        weight_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Refusal, match="no weights"):
        to_native(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
