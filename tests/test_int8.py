"""Frozen layers that are multiplied in int8 (precision.int8=dynamic), against the same arithmetic in plain PyTorch and against fp32."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.test_linear import results
from tests.test_methods import stir, trained
from tests.test_model import CPU, config_for, examples
from tunesmith import compiled, matmul
from tunesmith.config import Base, Batching, Compute, Config, EngineKind, Int8, MethodKind, Refusal
from tunesmith.data.layout import lay_out
from tunesmith.hardware import this_machine
from tunesmith.matmul import Term
from tunesmith.model import TargetLoss, build_model, for_generation, int8, native, new_tokens
from tunesmith.model.int8 import Int8Linear, block_of, quantise_layers, rotated
from tunesmith.model.linear import can_be_joined, join_adapters
from tunesmith.plan.checks import problems
from tunesmith.plan.shapes import KNOWN

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SIZES = [(192, 80), (48, 40), (24, 7), (5, 3)]
"""(inputs, outputs): rotated in blocks of 64, 16, 4 and 1."""


def by_blocks(x: torch.Tensor) -> torch.Tensor:
    """x times the Hadamard matrix of block rows beside an identity, written out whole."""
    columns = x.shape[1]
    block = next(size for size in (64, 16, 4, 1) if columns % size == 0)
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return x @ torch.kron(torch.eye(columns // block), torch.tensor(signs) / block**0.5)


def by_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127 in floats, and what they were divided by, [rows, 1]."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale.clamp_min(1e-30)).round(), scale


def reference(x: torch.Tensor, of_y: torch.Tensor, layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x's gradient: the formulas of model/int8.py in floats, the products in double so that sums of integers are exact."""
    weight, scales = by_rows(by_blocks(by_blocks(layer.weight.detach().t()).t()))
    quantised, rows = by_rows(by_blocks(x.detach()))
    y = by_blocks((quantised.double() @ weight.t().double()).float() * rows * scales.t())
    quantised, rows = by_rows(by_blocks(of_y) * scales.t())
    of_x = by_blocks((quantised.double() @ weight.double()).float() * rows)
    return (y if layer.bias is None else y + layer.bias.detach()), of_x


def made(layer: nn.Linear) -> Int8Linear:
    return Int8Linear(copy.deepcopy(layer), CPU)


@pytest.mark.parametrize("by_library", [True, False], ids=["C++", "PyTorch"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_values_and_gradients_are_those_of_the_formulas(inputs: int, outputs: int, by_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_library:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no C++ compiler here: the passes are PyTorch's then, which the other half of this test has")
        assert native.library() is not None
    else:
        monkeypatch.setattr(native, "library", lambda: None)
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=outputs != 80)
    layer = made(plain)
    x, of_y = torch.randn(2, 19, inputs, requires_grad=True), torch.randn(2, 19, outputs)
    x.data[0, 3] = 0  # a row without a largest number
    x.data[..., 0] *= 50  # and an outlier
    y = layer(x)
    y.backward(of_y)
    assert x.grad is not None
    wanted, of_x = reference(x.flatten(0, 1), of_y.flatten(0, 1), plain)
    # A value within a rounding error of a half may go to either side: a step of one number in a thousand.
    for mine, other in ((y, wanted), (x.grad, of_x)):
        off = (mine.detach().flatten(0, 1) - other).abs() > 1e-5 * other.abs().max()
        assert float(off.any(1).float().mean()) <= 0.03, "rows that differ"
    assert torch.allclose(layer(x[:, :1]), y[:, :1], rtol=1e-6, atol=1e-6), "a token alone is computed as among others"


def test_an_outlier_costs_little() -> None:
    """With one input in a hundred fifty times as large, products are near fp32's; not rotated, they would be four times as far."""
    torch.manual_seed(0)
    plain = nn.Linear(576, 192, bias=False)
    x, of_y = torch.randn(300, 576), torch.randn(300, 192)
    x[:, ::100] *= 50
    # So that a product is as much of the others as of the outliers.
    plain.weight.data[:, ::100] *= 0.02
    layer, exact = made(plain), plain(x)
    x.requires_grad_()
    y = layer(x)
    y.backward(of_y)
    assert x.grad is not None
    y, exact = y.detach(), exact.detach()
    error = float((y - exact).norm() / exact.norm())
    of_x = of_y @ plain.weight.detach()
    assert error < 0.06
    assert float((x.grad - of_x).norm() / of_x.norm()) < 0.02
    weight, scales = by_rows(plain.weight.detach())
    quantised, rows = by_rows(x.detach())
    blunt = (quantised @ weight.t()) * rows * scales.t()
    assert float((blunt - exact).norm() / exact.norm()) > 4 * error


@pytest.mark.parametrize("columns", [576, 1536, 80, 20, 7])
def test_a_rotation_keeps_lengths_and_is_its_own_inverse(columns: int) -> None:
    x = torch.randn(5, columns)
    assert columns % block_of(columns) == 0
    assert torch.allclose(rotated(x), by_blocks(x), atol=1e-5)
    assert torch.allclose(rotated(rotated(x)), x, atol=1e-5)
    assert torch.allclose(rotated(x).norm(dim=1), x.norm(dim=1))


def test_what_is_not_a_number_comes_out() -> None:
    layer, x = made(nn.Linear(64, 64)), torch.randn(20, 64)
    x[3, 5], x[7, 1] = float("nan"), float("inf")
    finite = layer(x).isfinite().all(1)
    assert not finite[3] and not finite[7] and finite.sum() == 18


def test_layers_end_to_end_are_moved_once_and_give_what_each_gives_alone() -> None:
    torch.manual_seed(0)
    alone = [made(nn.Linear(48, outputs, bias=False)) for outputs in (64, 16, 20)]
    together = copy.deepcopy(alone)
    weight, scales = int8.end_to_end(together)
    assert weight.shape == (100, 48) and scales.shape == (100,)
    assert int8.end_to_end(together)[0].data_ptr() == weight.data_ptr() == together[0].weight.data_ptr(), "the second time nothing moves"
    x, of_y = torch.randn(9, 48), [torch.randn(9, layer.out_features) for layer in alone]
    for y, layer in zip(int8.multiply(x, weight, scales, [None] * 3, [64, 16, 20]), alone, strict=True):
        assert torch.equal(y, layer(x))
    found = int8.multiply_back(of_y, weight, scales)
    wanted = sum(int8.multiply_back([of], layer.weight, layer.scales) for of, layer in zip(of_y, alone, strict=True))
    assert isinstance(wanted, torch.Tensor)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02, "one scale for a row of all"
    for layer in together:  # as a move to another device would
        layer.weight.data = layer.weight.data.clone()
    assert torch.equal(int8.end_to_end(together)[0], weight)


def test_strangers_side_by_side_are_not_taken_for_one() -> None:
    """A card's allocator can put two tensors next to each other."""
    memory = bytearray(64)
    one, other = (torch.frombuffer(memory, dtype=torch.int8, count=32, offset=offset) for offset in (0, 32))
    assert one.data_ptr() + one.nbytes == other.data_ptr()
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() and not int8._adjoin(one, other)


def adapted() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40))
    model[0] = Int8Linear(model[0], CPU)
    layer: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return layer


def test_base_and_adapter_are_one_operator() -> None:
    """Its values and gradients are those of the base beside PEFT's adapter; recomputed, to the bit; adapters are computed in floats."""
    plain, joined = adapted(), adapted()
    join_adapters(joined)
    x = torch.randn(3, 11, 48)
    assert type(joined(x.clone().requires_grad_()).grad_fn).__name__ == "_JoinedBackward"
    frozen = {name: weight.clone() for name, weight in joined.named_parameters()}
    (wanted, wanted_gradients), (got, gradients) = (results(layer, x) for layer in (plain, joined))
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) == 3
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-5, atol=1e-5), name
    assert all(torch.equal(weight, frozen[name]) for name, weight in joined.named_parameters())
    joined.zero_grad()
    x.requires_grad_()
    y = checkpoint(joined, x, use_reentrant=False)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert torch.equal(y, got) and x.grad is not None and torch.equal(x.grad, gradients["x"])


@pytest.mark.skipif(not matmul.has_tiles(), reason="no AMX here")
@pytest.mark.parametrize("tokens", [1, 15, 16, 37, 352])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, (576, 192, 192)), (1536, (576,)), (64, (64, 128)), (640, (1216,))])
def test_by_tiles_products_are_the_same(inputs: int, outputs: tuple[int, ...], tokens: int) -> None:
    """With bias and without, several layers together, and what adapters add; the integers' sums are exact either way."""
    torch.manual_seed(0)
    layers = [made(nn.Linear(inputs, width, bias=number % 2 == 0)) for number, width in enumerate(outputs)]
    weight, scales = int8.end_to_end(layers)
    tiles, threads = matmul.in_tiles([layer.weight.data for layer in layers]), torch.get_num_threads()
    x, inner = torch.randn(tokens, inputs), torch.randn(tokens, 8 * len(outputs))
    biases = [layer.bias for layer in layers]
    added = [Term(inner[:, 8 * i : 8 * i + 8], torch.randn(width, 8).t(), 0.5) for i, width in enumerate(outputs)]
    of_y, of_inner = [torch.randn(tokens, width) for width in outputs], Term(inner, torch.randn(8 * len(outputs), inputs))
    wanted = [*int8.multiply(x, weight, scales, biases, outputs, added), int8.multiply_back(of_y, weight, scales, of_inner)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = [*int8.multiply(x, weight, scales, biases, outputs, added, tiles), int8.multiply_back(of_y, weight, scales, of_inner, tiles)]
            for one, other in zip(found, wanted, strict=True):
                assert float((one - other).abs().max() / other.abs().max()) < 1e-6
    finally:
        torch.set_num_threads(threads)


def test_scales_outlive_halves() -> None:
    layer = made(nn.Linear(48, 40))
    before = layer.scales.clone(), layer.weight.clone()
    layer.half()
    for weight in layer.parameters():  # as DeepSpeed does
        if weight.is_floating_point():
            weight.data = weight.data.half()
    assert layer.scales.dtype is torch.float32 and layer.bias.dtype is torch.float16
    assert torch.equal(layer.scales, before[0]) and torch.equal(layer.weight, before[1])


def built(folder: Path, dynamic: bool = True, **method: Any) -> TargetLoss:
    config = config_for(folder, **({"r": 4} | method | ({"base": Base.int8} if dynamic else {})))
    config.precision.int8 = Int8.dynamic if dynamic else Int8.bnb
    return build_model(config, folder, CPU)


@pytest.mark.parametrize(
    "method", [{}, {"dropout": 0.1}, {"targets": ["q_proj", "down_proj"]}, {"kind": MethodKind.prefix}, {"kind": MethodKind.prompt}]
)
def test_a_model_is_near_its_fp32_self(method: dict[str, Any], tiny_model: Path) -> None:
    """Losses and gradients, before and after an answer token by token; embedding and head are as they were."""
    batch, found = lay_out(examples(6), Batching.ragged), []
    for dynamic in (False, True):
        module = built(tiny_model, dynamic, **method)
        if "kind" not in method:
            stir(module)
        layers = [part for part in module.modules() if isinstance(part, Int8Linear)]
        assert len(layers) == (14 if dynamic else 0)
        if method == {}:
            assert all(can_be_joined(part) for part in module.modules() if hasattr(part, "lora_A"))
        for moment in range(2):
            torch.manual_seed(1)
            module.zero_grad()
            loss = module(batch)
            loss.backward()
            gradient = torch.cat([weight.grad.flatten() for weight in trained(module).values() if weight.grad is not None])
            found.append((float(loss.detach()), gradient.clone()))
            ids = torch.arange(3, 20)[None]
            with torch.no_grad(), for_generation(module.model) as model:
                said = new_tokens(model, ids, torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert said.shape == (1, 3), moment
    (exact, wanted), _, (loss, gradient), (again, same) = found
    assert abs(loss / exact - 1) < 0.003
    assert float((gradient - wanted).norm() / wanted.norm()) < 0.05
    assert again == loss and torch.equal(gradient, same)


def test_layers_of_a_model_are_let_go_one_by_one(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    old = [layer for layer in model.modules() if type(layer) is nn.Linear]
    quantise_layers(model, CPU)
    assert model.get_output_embeddings() in old and sum(layer.weight.numel() == 0 for layer in old) == len(old) - 1


def test_without_a_compiler_it_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    for compiler, why in (
        ("/no/such/compiler", "/no/such/compiler makes no library of native.cpp"),
        ("false", "false makes no library"),
        ("", "no C++ compiler"),
    ):
        monkeypatch.setenv("CXX", compiler)
        if not compiler:
            monkeypatch.delenv("CXX")
            monkeypatch.setenv("PATH", "")
        compiled.library.cache_clear()
        native.library.cache_clear()
        made(nn.Linear(16, 16))(torch.randn(3, 16))
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and why in said, said
    compiled.library.cache_clear()
    native.library.cache_clear()


def lora(**settings: Any) -> Config:
    config = config_for(Path("smollm2-135m"), base=Base.int8)
    config.precision.int8 = Int8.dynamic
    for path, value in settings.items():
        section, _, name = path.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method__base": Base.as_is}, "precision.int8=dynamic: method.base=as_is has nothing in int8 — type precision.int8=bnb, or method=lora_int8"),
        ({"method__kind": MethodKind.full}, "method.base=int8: a quantised base stays frozen"),
        ({"method__dora": True}, "precision.int8=dynamic has none — type method.base=nf4, or method.dora=false"),
        ({"engine__kind": EngineKind.deepspeed, "engine__zero": 3}, "engine.zero=3: splits weights into flat pieces, which tears a int8 base"),
        ({"hardware__card": "v100"}, "precision.int8=dynamic: the v100 has no int8 units (compute capability 7.0, they come with 7.5) — type precision.int8=bnb"),
        ({"engine__fsdp": True}, "engine.fsdp=true: cuts weights into pieces, which tears a int8 base"),
    ],
)  # fmt: skip
def test_what_the_plan_refuses(settings: dict[str, Any], says: str) -> None:
    found = problems(lora(**settings), this_machine(), 1, KNOWN["smollm2-135m"], steps=100)
    assert [line for line in found if says in line], found


def test_layers_in_fp32_are_legal_beside_it() -> None:
    config = lora(precision__compute=Compute.bf16, precision__fp32_layers=["layers.1"], engine__kind=EngineKind.accelerate)
    assert not [line for line in problems(config, this_machine(), 1, KNOWN["smollm2-135m"], steps=100) if "fp32_layers" in line]


def test_a_card_takes_multiples_of_8(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 30)
    monkeypatch.setattr(int8, "Int8Linear", lambda layer, device: layer)  # no card is here
    with pytest.raises(Refusal, match=r"precision.int8=dynamic: up_proj is 30 x 64, .* multiples of 8 — type precision.int8=bnb"):
        quantise_layers(model, torch.device("cuda"))


@pytest.mark.filterwarnings("ignore")  # inductor imports what torch itself calls deprecated
def test_without_a_compiler_the_passes_are_pytorchs_own_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a card the passes around the matmul are torch.compile's; Triton or a C compiler may be missing there."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    int8._compiled.cache_clear()
    torch._dynamo.reset()
    x = torch.randn(5, 64)
    try:
        for _ in range(2):
            found = int8._compiled(int8.quantised_by_torch)(x, None)
    finally:
        int8._compiled.cache_clear()
        torch._dynamo.reset()
    for one, wanted in zip(found, int8.quantised_by_torch(x, None), strict=True):
        assert torch.equal(one, wanted)
    (record,) = (one for one in caplog.records if one.name == int8.__name__)
    assert "quantised_by_torch is not compiled here" in record.getMessage()
