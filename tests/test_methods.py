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
from tunesmith.config import Base, Batching, Config, MethodKind, Refusal
from tunesmith.data.layout import Example, MicroBatch, Segment, lay_out
from tunesmith.hardware import this_machine
from tunesmith.model import TargetLoss, build_model, for_generation, keep_nf4_in_training, new_tokens, read_adapter, save_model
from tunesmith.model.adapters import parameter_groups
from tunesmith.model.attention import behind
from tunesmith.model.noise import conversation_lengths, with_noise
from tunesmith.plan import problems, shape_of
from tunesmith.plan.shapes import KNOWN

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

VIRTUAL = 5
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": MethodKind.full},
    "lora": {"r": 4},
    "rslora": {"r": 4, "rslora": True},
    "dora": {"r": 4, "dora": True},
    "upper layers": {"r": 4, "first_layer": 1},
    "lower layers": {"r": 4, "last_layer": 0},
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


def test_adapters_above_a_layer_leave_the_rest_of_backward_out(tiny_model: Path) -> None:
    """No adapter below, and what enters the lowest trained layer wants no gradient, whether layers are recomputed or not."""
    for checkpointing in (False, True):
        module = made(tiny_model, METHODS["upper layers"], checkpointing)
        layers = module.model.get_base_model().model.layers
        assert not trained(layers[0])
        assert len(trained(layers[1])) == 14
        assert [layer.gradient_checkpointing for layer in layers] == [False, checkpointing]
        wanted: list[bool] = []
        layers[1].register_forward_pre_hook(lambda _, inputs, wanted=wanted: wanted.append(inputs[0].requires_grad))
        module(lay_out(examples(3), Batching.ragged)).backward()
        assert wanted == [False]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_layer_is_recomputed(every: int, tmp_path: Path) -> None:
    """The same gradients to the bit, dropout included: a recomputation draws what the first pass drew."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    found = []
    for checkpointing in (False, True):
        module = made(tmp_path, {"r": 4, "dropout": 0.2, "first_layer": 1}, checkpointing, every)
        stir(module)
        torch.manual_seed(3)
        module(lay_out(examples(4), Batching.ragged)).backward()
        found.append([weight.grad for weight in trained(module).values()])
    flags = [layer.gradient_checkpointing for layer in module.model.get_base_model().model.layers]
    assert flags == [number >= 1 and (number - 1) % every == 0 for number in range(5)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


QUANTISED = [(method, Base.nf4, 0.01) for method in ("lora", "dora", "prefix", "prompt")]
QUANTISED += [(method, Base.int8, 1e-5) for method in ("lora", "prefix", "prompt")]  # a plan refuses DoRA there


@pytest.mark.parametrize(("method", "base", "tolerance"), QUANTISED, ids=[f"{method}-{base.value}" for method, base, _ in QUANTISED])
def test_gradients_through_a_quantised_base(method: str, base: Base, tolerance: float, tiny_model: Path) -> None:
    """Those through the same base dequantised to fp32, before and after an evaluation pass and an answer.

    bitsandbytes repacks NF4 weights on a CPU in eval mode; its INT8 layers compute with the dequantised weight on a CPU, while on
    a card activations are rounded too.
    """
    from peft.utils.integrations import dequantize_module_weight

    module, plain = made(tiny_model, METHODS[method] | {"base": base}), made(tiny_model, METHODS[method])
    stir(module)
    batch = lay_out(sharing_examples(), Batching.ragged)
    with torch.no_grad():
        module(batch)  # INT8 layers find their scales at the first forward
    quantised = dict(module.named_parameters())
    for name, target in plain.named_parameters():
        layer = module.get_submodule(name.rpartition(".")[0])
        is_quantised = type(quantised[name]).__name__ in ("Params4bit", "Int8Params")
        source = dequantize_module_weight(layer) if is_quantised else quantised[name]
        target.data = source.detach().float().reshape(target.shape).clone()
    if base is Base.int8:  # what PEFT does to a layer on a CPU to look at it
        module = reloaded_int8(module, tiny_model, METHODS[method])

    def gradients(of: TargetLoss) -> list[torch.Tensor]:
        of.zero_grad()
        of(batch).backward()
        return [weight.grad.detach().clone() for weight in trained(of).values() if weight.grad is not None]

    wanted = gradients(plain)
    for moment in ("before", "after"):
        for mine, other in zip(gradients(module), wanted, strict=True):
            assert float((mine - other).norm() / other.norm()) < tolerance, f"{moment} an evaluation pass"
        module.eval()
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            module(batch)
        with torch.no_grad(), for_generation(module.model) as model:
            new_tokens(model, ids, torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
        module.train()


def reloaded_int8(module: TargetLoss, folder: Path, method: dict[str, Any]) -> TargetLoss:
    fresh = made(folder, method | {"base": Base.int8})
    fresh.load_state_dict(trained(module), strict=False)
    return fresh


def test_rates_are_by_group(tiny_model: Path) -> None:
    """LoRA+: B apart; decay for matrices only; every trained weight in one group."""
    config = config_for(tiny_model, r=4, dora=True, b_lr_ratio=16.0, modules_to_save=["embed_tokens"])
    config.optim.weight_decay = 0.1
    module = build_model(config, tiny_model, CPU)
    names = {id(weight): name for name, weight in trained(module).items()}
    groups = parameter_groups(module, config)
    found = {(group["lr_factor"], group["weight_decay"]): [names[id(weight)] for weight in group["params"]] for group in groups}
    assert set(found) == {(1.0, 0.1), (16.0, 0.1), (1.0, 0.0)}
    assert all(".lora_B." in name for name in found[16.0, 0.1]) and len(found[16.0, 0.1]) == 14
    assert all("magnitude" in name for name in found[1.0, 0.0]) and len(found[1.0, 0.0]) == 14
    assert sum(map(len, found.values())) == len(names) == 14 * 3 + 1


def test_noise_by_the_length_of_each_conversation() -> None:
    """Each token's bound is that of its conversation, padding left out, of the longest where several share it."""
    conversations = sharing_examples()
    shared = lay_out(conversations, Batching.ragged)
    lengths = conversation_lengths(shared)
    for segment in shared.segments:
        said = [token for start, stop in (*segment.context, (segment.start, segment.stop)) for token in shared.ids[start:stop].tolist()]
        wanted = max(example.computed for example in conversations if example.ids[: example.computed].tolist()[: len(said)] == said)
        assert set(lengths[segment.start : segment.stop].tolist()) == {wanted}
    for batching in (Batching.padded, Batching.length_grouped):  # a row each
        rows = conversation_lengths(lay_out(conversations, batching)).view(len(conversations), -1)
        assert rows.min(1).values.tolist() == rows.max(1).values.tolist() == [example.computed for example in conversations]
    packed = lay_out(conversations, Batching.packed)
    found = conversation_lengths(packed)
    for segment in packed.segments:
        is_filler = not any(segment.start <= int(place) < segment.stop for place in packed.predicting)
        assert set(found[segment.start : segment.stop].tolist()) == {1 if is_filler else segment.length}


def test_noise_only_in_training_and_resumable(tiny_model: Path) -> None:
    from tunesmith.checkpoint import random_state, restore_random_state

    config = config_for(tiny_model, r=4)
    quiet = build_model(config, tiny_model, CPU)
    config.optim.neftune_alpha = 5.0
    noisy = build_model(config, tiny_model, CPU)
    batch = lay_out(sharing_examples(), Batching.ragged)
    state = random_state()
    first, second = noisy(batch).item(), noisy(batch).item()
    restore_random_state(state)
    assert (noisy(batch).item(), noisy(batch).item()) == (first, second)
    assert len({first, second, quiet(batch).item()}) == 3
    noisy.eval(), quiet.eval()
    assert noisy(batch).item() == quiet(batch).item()

    embedded = torch.zeros(len(batch.ids), 64)
    noise = with_noise(embedded, batch, 5.0)
    bound = 5.0 / (conversation_lengths(batch) * 64).sqrt()
    assert bool((noise.abs() <= bound[:, None]).all())
    assert float((noise / bound[:, None]).std()) == pytest.approx(3**-0.5, rel=0.02)  # of uniform(-1, 1)


def test_head_and_embedding_of_their_own(tmp_path: Path) -> None:
    """Where they are two tensors either can be trained alone; PEFT elsewhere reads it."""
    family("llama", tmp_path / "model")
    module = made(tmp_path / "model", {"r": 4, "modules_to_save": ["lm_head"]})
    assert [name for name in trained(module) if "lora" not in name] == ["model.base_model.model.lm_head.modules_to_save.default.weight"]
    before = module.model.get_input_embeddings().weight.clone()
    optimizer = torch.optim.SGD(trained(module).values(), lr=0.1)
    batch = lay_out(examples(4), Batching.ragged)
    module(batch).backward()
    optimizer.step()
    assert torch.equal(module.model.get_input_embeddings().weight, before)
    save_model(module.model, tmp_path / "result", {name.removeprefix("model."): weight.detach() for name, weight in trained(module).items()})
    loaded = read_adapter(tmp_path / "result", tmp_path / "model")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), for_generation(module.model) as ours:
        assert torch.allclose(ours(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=1e-5)


def test_a_prompt_is_a_beginning_of_all() -> None:
    moved = behind(3, [Segment(0, 4), Segment(4, 6, ((0, 4),))])
    assert moved == (Segment(0, 3), Segment(3, 7, ((0, 3),)), Segment(7, 9, ((0, 3), (3, 7))))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"kind": MethodKind.full, "dora": True}, "method.dora=true: method.kind=full has no adapters — type method.dora=false, or method=lora"),
        ({"kind": MethodKind.prompt, "first_layer": 3}, "method.first_layer=3: method.kind=prompt has no adapters"),
        ({"kind": MethodKind.prefix, "modules_to_save": ["lm_head"]}, "method.modules_to_save=lm_head: method.kind=prefix has no adapters"),
        ({"dora": True, "base": Base.int8}, "method.dora=true: PEFT loses an int8 layer's scales"),
        ({"last_layer": 30}, "method.last_layer=30: smollm2-135m has layers 0 to 29, and method.first_layer=0 is the lowest with an adapter — type method.last_layer=-1"),
        ({"first_layer": 3, "last_layer": 2}, "method.last_layer=2: smollm2-135m has layers 0 to 29, and method.first_layer=3 is the lowest with an adapter — type method.last_layer=-1"),
        ({"first_layer": 30}, "method.first_layer=30: smollm2-135m has layers 0 to 29, and none would get an adapter — type method.first_layer=15"),
        ({"modules_to_save": ["norm"]}, "method.modules_to_save=norm: not trained beside adapters — type some of embed_tokens, lm_head"),
        ({"kind": MethodKind.prompt, "virtual_tokens": 0}, "method.virtual_tokens=0: must be at least 1"),
        ({"b_lr_ratio": 0.0}, "method.b_lr_ratio=0.0: must be above 0"),
        ({"kind": MethodKind.prefix, "virtual_tokens": 7000}, "8192 positions, 7000 of them for virtual tokens — type data.max_tokens=1192"),
    ],
)  # fmt: skip
def test_what_the_plan_refuses(method: dict[str, Any], says: str) -> None:
    config = config_for(Path("smollm2-135m"), **method)
    found = problems(config, this_machine(), 1, KNOWN["smollm2-135m"], steps=100)
    assert [line for line in found if says in line], found


def test_refused_where_the_files_are_read(tiny_model: Path) -> None:
    with pytest.raises(Refusal, match=r"first_layer=2, method.last_layer=-1: this model has layers 0 to 1"):
        made(tiny_model, {"first_layer": 2})
    with pytest.raises(Refusal, match=r"modules_to_save=norm.*embed_tokens, lm_head"):
        made(tiny_model, {"modules_to_save": ["norm"]})


def test_dora_on_split_weights_and_idle_checkpointing_are_refused() -> None:
    config = config_for(Path("smollm2-135m"), dora=True)
    config.engine.zero, config.engine.checkpoint_every = 3, 2
    found = "\n".join(problems(config, this_machine(), 1, KNOWN["smollm2-135m"], steps=100))
    assert "method.dora=true: measures whole weights" in found
    assert "engine.checkpoint_every=2: nothing is recomputed — type engine.checkpointing=true" in found
