"""Every method against plain PEFT: losses, gradients, what changes, what is saved; and what the plan refuses of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.test_model import CPU, config_for, examples, sharing_examples
from tunesmith.config import Base, Batching, Config, MethodKind
from tunesmith.data.layout import Example, MicroBatch, Segment, lay_out
from tunesmith.model import TargetLoss, build_model, for_generation, keep_nf4_in_training, new_tokens, read_adapter, save_model
from tunesmith.plan import shape_of

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

VIRTUAL = 5
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": MethodKind.full},
    "lora": {"r": 4},
    "rslora": {"r": 4, "rslora": True},
    "dora": {"r": 4, "dora": True},
    "upper layers": {"r": 4, "first_layer": 1},
    "head and embedding": {"r": 4, "modules_to_save": ["embed_tokens"]},
    "nf4": {"r": 4, "base": Base.nf4},
    "int8": {"r": 4, "base": Base.int8},
    "dora on nf4": {"r": 4, "base": Base.nf4, "dora": True},
    "prefix": {"kind": MethodKind.prefix, "virtual_tokens": VIRTUAL},
    "prefix on nf4": {"kind": MethodKind.prefix, "virtual_tokens": VIRTUAL, "base": Base.nf4},
    "prompt": {"kind": MethodKind.prompt, "virtual_tokens": VIRTUAL},
    "prompt on nf4": {"kind": MethodKind.prompt, "virtual_tokens": VIRTUAL, "base": Base.nf4},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
VIRTUALS = {name: METHODS[name] for name in ("prefix", "prompt")}


def made(tiny_model: Path, method: dict[str, Any], checkpointing: bool = False, every: int = 1) -> TargetLoss:
    config = config_for(tiny_model, **method)
    config.engine.checkpointing, config.engine.checkpoint_every = checkpointing, every
    return build_model(config, tiny_model, CPU)


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def stir(module: torch.nn.Module) -> None:
    """Adapters that change something: B starts as zeros."""
    torch.manual_seed(7)
    for name, weight in trained(module).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        if "magnitude" in name:
            weight.data *= 1 + 0.1 * torch.rand_like(weight)


def by_peft(model: Any, conversations: list[Example], padded: bool = False) -> torch.Tensor:
    """Sum of losses by PEFT's own forward, each conversation alone or all in rows padded on the right."""
    total = torch.zeros(())
    parts = [conversations] if padded else [[example] for example in conversations]
    for part in parts:
        longest = max(len(example.ids) for example in part)
        ids, mask, targets = (torch.zeros(len(part), longest, dtype=torch.long) for _ in range(3))
        for row, example in enumerate(part):
            ids[row, : len(example.ids)] = torch.from_numpy(example.ids)
            mask[row, : len(example.ids)] = 1
            targets[row, : len(example.ids)] = torch.from_numpy(example.targets)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -longest:]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total = total + losses @ targets[:, 1:].flatten().float()
    return total


def family(name: str, folder: Path) -> None:
    """A small random model: grouped keys in all; a head_dim of its own and norms of queries (qwen3), partial rotation (glm)."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
        "glm": lambda: GlmForCausalLM(GlmConfig(**sizes, head_dim=8)),
    }
    models[name]().save_pretrained(folder)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm"])
@pytest.mark.parametrize("kind", [MethodKind.prefix, MethodKind.prompt])
def test_virtual_tokens_equal_pefts_own_forward(kind: MethodKind, name: str, checkpointing: bool, tmp_path: Path) -> None:
    """Conversations that begin alike, computed once, against PEFT with each of them alone, and with padded rows: loss and gradient."""
    family(name, tmp_path / "model")
    module = made(tmp_path / "model", {"kind": kind, "virtual_tokens": VIRTUAL}, checkpointing)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    settings = PrefixTuningConfig if kind is MethodKind.prefix else PromptTuningConfig
    plain = get_peft_model(base, settings(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    plain.load_state_dict({name.removeprefix("model."): weight for name, weight in trained(module).items()}, strict=False)
    conversations = sharing_examples()
    batch = lay_out(conversations, Batching.ragged)
    assert max(segment.context_length for segment in batch.segments) >= 59
    loss = module(batch)
    loss.backward()
    ((_, mine),) = trained(module).items()
    for padded in (False, True):
        plain.zero_grad()
        wanted = by_peft(plain, conversations, padded)
        wanted.backward()
        ((_, other),) = trained(plain).items()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert float((mine.grad - other.grad).norm() / other.grad.norm()) < 1e-5


@pytest.mark.parametrize("method", VIRTUALS.values(), ids=VIRTUALS)
def test_generation_sees_the_virtual_tokens(method: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Greedy answers to prompts of different lengths, padded on the left, against one token at a time by the training forward."""
    module = made(tiny_model, method)
    prompts = [list(range(20, 31)), list(range(50, 54)), [7]]
    longest, count = 11, 6
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    save_model(module.model, tmp_path / "adapter")
    loaded = read_adapter(tmp_path / "adapter", tiny_model)
    arguments: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), for_generation(module.model) as model:
        answers = new_tokens(model, ids, mask, **arguments).tolist()
    with torch.no_grad():
        assert new_tokens(loaded, ids, mask, **arguments).tolist() == answers
        module.eval()
        for prompt, answer in zip(prompts, answers, strict=True):
            text = list(prompt)
            for _ in range(count):
                text.append(int(logits_of(module, text)[-1].argmax()))
            assert text[len(prompt) :] == answer


def logits_of(module: TargetLoss, ids: list[int]) -> torch.Tensor:
    """Logits at every token of a text by the training forward."""
    text = torch.tensor(ids)
    every = torch.arange(len(ids))
    batch = MicroBatch(text, every, (Segment(0, len(ids)),), every, None, text, torch.ones(len(ids)), len(ids))
    return module._logits(batch, CPU)


@every_method
def test_a_method_trains_what_it_says_and_reloads(method: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """The rest stays to the bit, the count is the plan's, the loss falls, and what is saved gives equal logits elsewhere."""
    module = made(tiny_model, method)
    weights = trained(module)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    config = config_for(tiny_model, **method)
    assert sum(weight.numel() for weight in weights.values()) == shape_of(str(tiny_model)).trained_weights(config.method)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    batch = lay_out(examples(6), Batching.ragged)
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-2 if method.get("kind") in (MethodKind.prefix, MethodKind.prompt) else 1e-2)
    losses = []
    for _ in range(8):
        loss = module(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.997 * losses[0]  # random words to a random model: there is little that virtual tokens can do
    changed = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(weights)

    state = {name.removeprefix("model."): weight.detach().clone() for name, weight in weights.items()}
    save_model(module.model, tmp_path / "result", state)
    loaded = read_adapter(tmp_path / "result", tiny_model)
    if method.get("base", Base.as_is) is not Base.as_is:  # elsewhere the base need not be quantised: the same base is wanted here
        loaded = PeftModel.from_pretrained(fresh_base(config, tiny_model), tmp_path / "result").eval()
        keep_nf4_in_training(loaded)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), for_generation(module.model) as ours:
        wanted, found = ours(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert float((wanted - found).norm() / wanted.norm()) < 1e-5


def fresh_base(config: Config, folder: Path) -> Any:
    from peft import prepare_model_for_kbit_training

    from tunesmith.model import _load

    return prepare_model_for_kbit_training(_load(folder, config, CPU, "sdpa"), use_gradient_checkpointing=False)
