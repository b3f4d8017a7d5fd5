"""A base layer and its adapter as one operator, against PEFT's four; and PEFT's own wherever the two would not be the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_model import CPU, config_for, examples
from tunesmith import matmul
from tunesmith.config import Base, Batching
from tunesmith.data.layout import lay_out
from tunesmith.model import build_model
from tunesmith.model.linear import Together, can_be_joined, join_adapters, keep_tiles

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

INPUTS, OUTPUTS, R = 24, 40, 4


def layer_of(bias: bool = True, **settings: Any) -> Any:
    """PEFT's layer around a linear one, its adapter not 0."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias)), LoraConfig(r=R, target_modules=["0"], **settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model.base_model.model[0]


def results(layer: Any, x: torch.Tensor, wants_x: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a layer gives for x, and the gradients of a loss that weighs each output otherwise."""
    layer.zero_grad()
    x = x.detach().requires_grad_(wants_x)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in layer.named_parameters() if weight.grad is not None}
    return y.detach(), {**gradients, **({"x": x.grad} if x.grad is not None else {})}


def is_joined(layer: Any, x: torch.Tensor) -> bool:
    return type(layer(x).grad_fn).__name__ == "_JoinedBackward"


def both(layer: Any) -> tuple[Any, Any]:
    """PEFT's layer, and the same one joined."""
    other = copy.deepcopy(layer)
    join_adapters(other)
    return layer, other


@pytest.mark.parametrize("wants_x", [True, False], ids=["middle", "lowest"])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"use_rslora": True, "lora_alpha": 3}], ids=["bias", "no bias", "rslora"])
@pytest.mark.parametrize("rows", [(7,), (1, 33), (2, 3, 5)])
def test_values_and_gradients_are_pefts(rows: tuple[int, ...], settings: dict[str, Any], wants_x: bool) -> None:
    plain, joined = both(layer_of(**settings))
    x = torch.randn(*rows, INPUTS)
    assert is_joined(joined, x)
    (wanted, wanted_gradients), (got, gradients) = (results(layer, x, wants_x) for layer in (plain, joined))
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) == 2 + wants_x, "the base has none"
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-5, atol=1e-5), name
    with torch.no_grad():
        assert torch.allclose(joined(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=["wide input", "narrow input"])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_under_autocast_types_are_pefts(compute: torch.dtype, x_type: torch.dtype) -> None:
    """The base in halves and the adapter in fp32, as Accelerate computes them: both are near what fp32 gives, at the same distance."""
    exact = layer_of()
    plain, joined = both(copy.deepcopy(exact))
    for layer in (plain, joined):
        layer.base_layer.to(compute)
    x = torch.randn(50, INPUTS).to(x_type)
    truth, true_gradients = results(exact, x.float())
    with torch.autocast("cpu", dtype=compute):
        assert is_joined(joined, x) or x_type is not compute  # a cast stands between them
        (wanted, wanted_gradients), (got, gradients) = (results(layer, x) for layer in (plain, joined))
    assert got.dtype is wanted.dtype is compute
    assert torch.dist(got.float(), truth) < 1.1 * torch.dist(wanted.float(), truth)
    for name, gradient in gradients.items():
        assert gradient.dtype is wanted_gradients[name].dtype, name
        assert torch.dist(gradient.float(), true_gradients[name]) < 0.02 * true_gradients[name].norm(), name


def two_adapters(layer: Any) -> None:
    layer.update_layer("second", R, lora_alpha=8, config=LoraConfig(r=R))
    nn.init.normal_(layer.lora_B["second"].weight)
    layer.set_adapter(["default", "second"])


def listened_to(layer: Any) -> None:
    layer.base_layer.register_forward_pre_hook(lambda part, inputs: (inputs[0] * 2,))


def replaced(layer: Any) -> None:
    layer.base_layer.forward = lambda x: x.new_ones(*x.shape[:-1], OUTPUTS)


def trained_base(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_(True)


def halved_base(layer: Any) -> None:
    layer.base_layer.to(torch.bfloat16)


OTHERWISE: dict[str, tuple[dict[str, Any], Callable[[Any], Any], torch.dtype]] = {
    "DoRA": ({"use_dora": True}, lambda layer: None, torch.float32),
    "dropout": ({"lora_dropout": 0.5}, lambda layer: None, torch.float32),
    "adapter's bias": ({"lora_bias": True}, lambda layer: None, torch.float32),
    "merged": ({}, lambda layer: layer.merge(), torch.float32),
    "disabled": ({}, lambda layer: layer.enable_adapters(False), torch.float32),
    "two adapters": ({}, two_adapters, torch.float32),
    "a hook inside": ({}, listened_to, torch.float32),
    "a forward replaced inside": ({}, replaced, torch.float32),
    "a trained base": ({}, trained_base, torch.float32),
    "types that differ": ({}, halved_base, torch.bfloat16),
}


@pytest.mark.parametrize(("settings", "change", "type_of_x"), OTHERWISE.values(), ids=OTHERWISE)
def test_whatever_else_a_layer_does_is_done_by_peft(settings: dict[str, Any], change: Callable[[Any], Any], type_of_x: torch.dtype) -> None:
    layer = layer_of(**settings)
    change(layer)
    plain, joined = both(layer)
    x = torch.randn(9, INPUTS).to(type_of_x)
    assert not is_joined(joined, x.clone().requires_grad_())
    found = []
    for each in (plain, joined):
        torch.manual_seed(1)
        found.append(results(each, x))
    assert torch.equal(found[0][0], found[1][0]), "to the last bit"
    assert (
        all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items()) and found[0][1].keys() == found[1][1].keys()
    )


def test_dropout_is_nothing_in_evaluation() -> None:
    layer = layer_of(lora_dropout=0.5)
    assert not can_be_joined(layer)
    assert can_be_joined(layer.eval())


def test_what_is_kept_is_the_input_and_r_numbers_a_row() -> None:
    _, joined = both(layer_of())
    kept: list[torch.Tensor] = []
    x = torch.randn(11, INPUTS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        joined(x)
    weights = {weight.data_ptr() for weight in joined.parameters()}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in weights] == [(11, R), (11, INPUTS)]


def test_a_recomputation_ends_before_the_product() -> None:
    """The layer's own product is not needed for its gradients: computed again are r numbers a row, and nothing else."""
    _, joined = both(layer_of())
    x = torch.randn(11, INPUTS, requires_grad=True)
    wanted = results(joined, x)
    joined.zero_grad()
    y = checkpoint(joined, x, use_reentrant=False)
    with FlopCounterMode(display=False) as counter:
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert torch.equal(y, wanted[0])
    for name, weight in joined.named_parameters():
        assert weight.grad is None or torch.equal(weight.grad, wanted[1][name]), name
    backward = 2 * 11 * (INPUTS * OUTPUTS + R * (2 * OUTPUTS + 2 * INPUTS))
    assert counter.get_total_flops() == backward + 2 * 11 * R * INPUTS


@pytest.mark.parametrize("base", [Base.as_is, Base.nf4, Base.int8])
def test_a_run_joins_what_is_not_quantised(base: Base, tiny_model: Path) -> None:
    """Losses and gradients of a whole model, names of its weights, and what is quantised as PEFT and bitsandbytes have it."""
    module = build_model(config_for(tiny_model, r=4, base=base), tiny_model, CPU)
    layers = [part for part in module.modules() if hasattr(part, "lora_A")]
    assert {can_be_joined(layer) for layer in layers} == {base is Base.as_is}
    torch.manual_seed(3)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    batch = lay_out(examples(6), Batching.ragged)
    names, found = list(module.state_dict()), []
    for _ in range(2):
        module.zero_grad()
        loss = module(batch)
        loss.backward()
        found.append((loss.detach(), {name: w.grad.clone() for name, w in module.named_parameters() if w.grad is not None}))
        for layer in layers:
            vars(layer).pop("forward", None)  # PEFT's own comes back
    assert names == list(module.state_dict())
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for name, gradient in found[0][1].items():
        wanted = found[1][1][name]
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), name


def kept_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of a loss that weighs them."""
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "up_proj"]], ids=["all", "q and v", "nothing in common"])
def test_layers_that_read_the_same_are_one_operator(targets: Any) -> None:
    """As many operators as inputs, with PEFT's values and gradients; nobody keeps an input for a layer that has answered."""
    plain, joined = blocks_of("Qwen2", targets)
    ids = torch.randint(0, 60, (1, 9))
    apart: set[Any] = set()

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        apart.add(output.grad_fn)

    hooks = [part.register_forward_hook(count) for part in joined.modules() if hasattr(part, "lora_A")]
    (wanted, wanted_gradients), (got, gradients) = kept_of(plain, ids), kept_of(joined, ids)
    for hook in hooks:
        hook.remove()
    operators = {node for node in apart if type(node).__name__ == "_JoinedBackward"}
    assert len(operators) == 2 * {"all-linear": 4}.get(str(targets), 1 if "v_proj" in targets else 2)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-5 * float(wanted_gradients[name].abs().max())), name
    groups = {
        id(cell.cell_contents): cell.cell_contents
        for part in joined.modules() if hasattr(part, "lora_A")
        for cell in part.forward.__func__.__closure__ or () if isinstance(cell.cell_contents, Together)
    }  # fmt: skip
    assert len(groups) == 2 * {"all-linear": 2}.get(str(targets), 1 if "v_proj" in targets else 0)
    assert all(group._x is None and not group._ready for group in groups.values())


def test_a_layer_asked_out_of_turn_answers_for_its_own_input() -> None:
    _, joined = blocks_of("Llama")
    attention = joined.base_model.model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 5, 32).unbind(0)
    key = attention.k_proj(x)
    attention.q_proj(other)
    assert torch.allclose(attention.k_proj(x), key) and not torch.allclose(attention.k_proj(other), key)
    attention.q_proj(x)
    attention.v_proj.enable_adapters(False)
    assert torch.allclose(attention.k_proj(other), attention.k_proj(other.clone())), "one that cannot be joined any more parts them"
    assert torch.equal(attention.v_proj(x), attention.v_proj.base_layer(x))


def blocks_of(kind: str, targets: Any = "all-linear", **settings: Any) -> tuple[Any, Any]:
    """A small model of a family with adapters that are not 0, and the same one joined; fp32."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=60,
        pad_token_id=0,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model = get_peft_model(model, LoraConfig(r=R, target_modules=targets))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
        elif "norm" in name:
            nn.init.uniform_(weight, 0.5, 2.0)
    return both(model)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Glm"])
def test_norms_and_gates_are_transformers(kind: str) -> None:
    """Same bits forward, the same gradients, and neither a norm's nor a gate's result is kept."""
    plain, joined = blocks_of(kind)
    ids = torch.randint(0, 60, (2, 9))

    def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[str]]:
        kept: set[str] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(str(tuple(t.shape))) or t, lambda t: t):  # type: ignore[func-returns-value]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return logits.detach(), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}, kept

    (wanted, wanted_gradients, _), (got, gradients, kept) = run(plain), run(joined)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-5 * float(wanted_gradients[name].abs().max())), name
    assert kept
    named = {type(part).__name__: part for part in joined.modules()}
    assert all("forward" in vars(part) for name, part in named.items() if name.endswith(("RMSNorm", "MLP")))


def test_a_layer_keeps_what_cannot_be_had_again() -> None:
    """Of a layer's tokens: both norms' inputs, queries, keys, values, attention's output, gate and up; a third less than transformers'."""
    plain, joined = blocks_of("Llama")

    def kept(model: Any) -> int:
        found: dict[int, int] = {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
                alive.append(storage)
            return tensor

        alive: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model.model.model.layers[0](
                torch.randn(1, 11, 32, requires_grad=True), position_embeddings=(torch.ones(1, 11, 8), torch.zeros(1, 11, 8))
            )
        return sum(found.values()) // (4 * 11)

    hidden, queries, keys, mlp, adapters = 32, 32, 16, 48, 7 * R
    roots, sums, rotary = 2, 4, 2 * 8
    assert kept(joined) <= 2 * hidden + 2 * queries + 2 * keys + 2 * mlp + adapters + roots + sums + rotary
    assert kept(plain) >= kept(joined) + 2 * hidden + 2 * mlp


def test_a_norm_that_is_trained_stays_transformers() -> None:
    plain, joined = blocks_of("Llama")
    ids = torch.randint(0, 60, (1, 7))
    for model in (plain, joined):
        model.base_model.model.model.norm.weight.requires_grad_(True)
        model(input_ids=ids).logits.pow(2).sum().backward()
    wanted, got = (model.base_model.model.model.norm.weight.grad for model in (plain, joined))
    assert torch.allclose(got, wanted, rtol=1e-4)
    assert wanted.abs().sum() > 0


def test_at_high_precision_a_models_loss_and_gradients_are_pefts_to_1e_5() -> None:
    halves = matmul.library(" by bf16 halves")
    if not halves.is_here():
        pytest.skip("no AMX here")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192, intermediate_size=320, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, vocab_size=600
    )  # fmt: skip
    plain = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    for name, weight in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    joined = copy.deepcopy(plain)
    join_adapters(joined)
    ids = torch.randint(600, (2, 150))

    def gradients(model: Any) -> tuple[float, torch.Tensor]:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    (wanted_loss, wanted) = gradients(plain)
    matmul.take(halves)
    try:
        loss, found = gradients(joined)
        joined.zero_grad()
        keep_tiles(joined)
        in_tiles = gradients(joined)
    finally:
        matmul.give_back()
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert not torch.equal(found, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    kept = [name for name, module in joined.named_modules() if hasattr(module, "tiles")]
    assert len(kept) == 6 * 5 + 1, "of five linear layers and the head; keys and values have 64 outputs, too few for tiles"
    assert in_tiles[0] == loss and torch.equal(in_tiles[1], found), "the same bits from weights in tiles"


@pytest.mark.parametrize("change", ["merged", "trained"])
def test_a_weight_that_changes_is_never_read_from_tiles(change: str) -> None:
    """A merged adapter is in the weight and not in its tiles; a weight that is trained has none."""
    halves = matmul.library(" by bf16 halves")
    if not halves.is_here():
        pytest.skip("no AMX here")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=192, intermediate_size=320, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=200)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    join_adapters(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
        if change == "trained" and "base_layer" in name:
            weight.requires_grad_()
    ids = torch.randint(200, (1, 120))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        matmul.take(halves)
        try:
            keep_tiles(model)
            if change == "merged":
                model.merge_adapter()
            else:
                assert not any(hasattr(layer.base_layer, "tiles") for layer in model.modules() if type(layer) is Linear)
            found = model(input_ids=ids).logits
        finally:
            matmul.give_back()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-5
