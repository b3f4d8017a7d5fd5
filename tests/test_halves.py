"""fp16's range: the layer that leaves it is named, and can be kept in fp32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_model import config_for, examples
from tunesmith.compose import compose
from tunesmith.config import Base, Batching, Compute, Config, Int8, Refusal
from tunesmith.data.layout import lay_out
from tunesmith.hardware import Machine
from tunesmith.model import TargetLoss, build_model, for_generation
from tunesmith.model.halves import LARGEST, ROWS, Probe, Range, advice, probe
from tunesmith.plan import PlanError, make_plan

CPU = torch.device("cpu")
T4 = Machine(kind="cuda", device_names=["Tesla T4"], memory_gib=[15.0], cores=8, ram_gib=64.0)


def grown(folder: Path, part: str, factor: float) -> Path:
    """A small Llama with one weight of layer 1 made larger."""
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(shape)
    weight = dict(model.named_parameters())[f"model.layers.1.{part}.weight"]
    weight.data *= factor / float(weight.data.abs().max())
    model.save_pretrained(folder)
    return folder


def built(folder: Path, compute: Compute = Compute.fp16, layers: tuple[str, ...] = ()) -> tuple[Config, TargetLoss]:
    config = config_for(folder, r=4)
    config.precision.compute, config.precision.fp32_layers = compute, list(layers)
    return config, build_model(config, folder, CPU)


def probed(module: TargetLoss) -> Probe:
    with torch.autocast("cpu", dtype=torch.float16):
        return probe(module, lay_out(examples(3), Batching.ragged))


def looked_at(module: TargetLoss) -> Range:
    return probed(module).widest


def test_inside_the_range_nothing_changes(tmp_path: Path) -> None:
    _, module = built(grown(tmp_path, "mlp.down_proj", 1.0))
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    found = looked_at(module)
    assert not found.overflows and 0 < found.largest < LARGEST
    for name, weight in module.named_parameters():
        assert weight.dtype is before[name].dtype and torch.equal(weight, before[name])
    assert module.training and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.up_proj"])
def test_the_layer_that_overflows_is_named_with_its_size(part: str, tmp_path: Path) -> None:
    """The same layer in fp32 says how far beyond it is."""
    folder = grown(tmp_path, part, 6e4)
    config, module = built(folder)
    found = looked_at(module)
    assert found.overflows and found.name.endswith(f"layers.1.{part}.base_layer") and not found.is_input
    _, wide = built(folder, Compute.fp32)
    seen: list[float] = []
    layer = next(layer for name, layer in wide.named_modules() if name.endswith(f"layers.1.{part}.base_layer"))
    layer.register_forward_hook(lambda layer, inputs, output: seen.append(float(output.detach().abs().max())))
    wide(lay_out(examples(3), Batching.ragged))
    assert found.largest == pytest.approx(seen[0], rel=0.01) and seen[0] > LARGEST
    assert f"gives {found.largest:,.0f}" in advice(found, config) and "precision.fp32_layers=[layers.1], which" in advice(found, config)


def test_a_layer_whose_numbers_vanish_in_fp16_is_furthest_from_fp32(tmp_path: Path) -> None:
    """2^-24 is fp16's smallest number: of 1e-6, some 17 of them, it has 4 bits left."""
    _, module = built(grown(tmp_path, "self_attn.v_proj", 1.0))
    usual = probed(module).roughest
    assert 0 < usual.error < 2e-3, "11 bits"
    _, module = built(grown(tmp_path, "self_attn.v_proj", 1e-6))
    rough = probed(module).roughest
    assert rough.name.endswith("layers.1.self_attn.o_proj.base_layer"), "what it reads is such numbers, and it makes smaller ones of them"
    assert rough.error > 5 * usual.error


@pytest.mark.parametrize(("base", "dynamic"), [(Base.nf4, False), (Base.int8, True), (Base.int8, False)])
def test_quantised_layers_are_looked_at_in_both_types(base: Base, dynamic: bool, tmp_path: Path) -> None:
    """bitsandbytes multiplies int8 in halves alone: of those the range alone is known."""
    config = config_for(grown(tmp_path, "mlp.up_proj", 1.0), base=base, r=4)
    config.precision.compute, config.precision.int8 = Compute.fp16, Int8.dynamic if dynamic else Int8.bnb
    found = probed(build_model(config, tmp_path, CPU))
    assert not found.widest.overflows and 0 < found.roughest.error < 0.05


def test_a_product_before_a_layer_is_told_from_the_layer(tmp_path: Path) -> None:
    """Neither gate nor up overflows, but what one does to the other."""
    folder = grown(tmp_path, "mlp.up_proj", 2e3)
    model = LlamaForCausalLM.from_pretrained(folder)
    gate = model.model.layers[1].mlp.gate_proj.weight
    gate.data *= 2e3 / float(gate.data.abs().max())
    model.save_pretrained(folder)
    config, module = built(folder)
    found = looked_at(module)
    assert found.is_input and found.largest == math.inf and "layers.1.mlp.down_proj" in found.name
    assert "what " in advice(found, config) and "precision.fp32_layers=[layers.1], which" in advice(found, config)


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.up_proj"])
def test_kept_in_fp32_it_trains_as_all_of_it_in_fp32(part: str, tmp_path: Path) -> None:
    folder = grown(tmp_path, part, 6e4)
    (_, whole), (_, mixed), (_, half) = built(folder, Compute.fp32), built(folder, layers=("layers.1",)), built(folder)
    assert not looked_at(mixed).overflows
    batch = lay_out(examples(5), Batching.ragged)
    losses = []
    for module in (whole, mixed):
        with torch.autocast("cpu", dtype=torch.float16, enabled=module is mixed):
            loss = module(batch)
        (loss * 2.0**10).backward()  # else what is small vanishes in fp16
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        assert not math.isfinite(float(half(batch)))
    gradients = [{name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None} for module in (whole, mixed)]
    assert gradients[0].keys() == gradients[1].keys()
    wanted, found = (torch.cat([weight.flatten() for weight in some.values()]) for some in gradients)
    assert torch.isfinite(found).all() and (found - wanted).norm() < 0.02 * wanted.norm()
    with for_generation(mixed.model) as model:
        assert model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = grown(tmp_path, "mlp.up_proj", 1.0)
    with pytest.raises(Refusal, match=r"precision.fp32_layers=layers.7: this model has no such layer — layers.0 to layers.2"):
        built(folder, layers=("layers.7",))


@pytest.mark.parametrize("words", [["engine=deepspeed"], ["engine=accelerate"], ["engine=deepspeed", "method=lora_int8"]], ids=" ".join)
def test_what_is_advised_is_not_refused(words: list[str]) -> None:
    typed = ["+exp=lora_t4", "precision=fp16", *words]
    line = advice(Range("model.layers.1.mlp.down_proj", 1e5), compose(typed))
    advised = line.partition("type ")[2].partition(", which")[0].split()
    make_plan(compose([*typed, *advised]), T4, 1)


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["precision=fp32", "engine=accelerate"], "precision.fp32_layers=[]"),
        (["precision=fp16", "engine=deepspeed"], "engine=accelerate"),
        (["precision=fp16", "engine=accelerate", "method.base=int8"], "precision.int8=dynamic, or method.base=nf4"),
    ],
)
def test_where_it_cannot_be_honoured_the_plan_says_so(words: list[str], instead: str) -> None:
    config = compose(["+exp=lora_t4", "precision.fp32_layers=[layers.1]", *words])
    assert config.method.base in (Base.as_is, Base.int8)
    with pytest.raises(PlanError) as refused:
        make_plan(config, T4, 1)
    assert any(line.startswith("precision.fp32_layers=[layers.1]: ") and line.endswith(f"type {instead}") for line in refused.value.problems)


@pytest.mark.parametrize("base", [Base.nf4, Base.as_is])
def test_the_last_layer_is_looked_at_beside_a_quantised_base_too(base: Base, tmp_path: Path) -> None:
    """bitsandbytes answers in the type that it is asked in, fp32 where PEFT has made the norms so, and multiplies in fp16 inside."""
    torch.manual_seed(0)
    grown(tmp_path, "mlp.up_proj", 1.0)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data *= 6e4 / float(weight.data.abs().max())
    model.save_pretrained(tmp_path)
    config = config_for(tmp_path, base=base, r=4)
    config.precision.compute = Compute.fp16
    found = looked_at(build_model(config, tmp_path, CPU))
    assert found.overflows and "layers.2.mlp" in found.name
    assert "precision.fp32_layers=[layers.2], which" in advice(found, config)


def test_a_weight_that_is_no_number_in_fp16_is_named(tmp_path: Path) -> None:
    _, module = built(grown(tmp_path, "mlp.up_proj", 7e4))
    found = looked_at(module)
    assert found.overflows and found.largest == math.inf and found.name.endswith("layers.1.mlp.up_proj.base_layer")


def test_no_more_logits_are_made_at_once_than_in_training(tmp_path: Path) -> None:
    """A long conversation and a large vocabulary: the probe must not run out of memory where training does not."""
    _, module = built(grown(tmp_path, "mlp.down_proj", 1.0))
    batch = lay_out(examples(40), Batching.ragged)
    assert len(batch.predicting) > ROWS
    rows: list[int] = []
    module.model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: rows.append(len(output.flatten(0, -2))))
    with torch.autocast("cpu", dtype=torch.float16):
        probe(module, batch)
    assert rows == [ROWS]
