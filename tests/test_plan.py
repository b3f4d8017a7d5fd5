"""The plan: shapes against transformers, memory against autograd and DeepSpeed, arithmetic by property."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tunesmith.config import AUTO, Base, Batching, Compute, Config, EngineKind, Int8, Matmul, MethodKind, OptimizerKind, Refusal, changed
from tunesmith.doctor.legal import best_type, row_for
from tunesmith.hardware import CARDS, Machine
from tunesmith.plan import (
    Counts,
    PlanError,
    beside,
    describe,
    engine_choices,
    make_plan,
    memory_gib,
    problems,
    run_id,
    shape_of,
    step_flops,
    trained_weights,
)
from tunesmith.plan.memory import FRAGMENTS, GIB, held_bytes, setting_of
from tunesmith.plan.replay import replayed
from tunesmith.plan.shapes import KNOWN, ModelShape
from tunesmith.plan.table import fits, plan_text, planned_machine

HERE = Machine(cores=2, ram_gib=23.5, cpu_name="some CPU")
T4 = Machine("cuda", ("Tesla T4",), (14.56,), 8, 51.0, "some CPU")
A10S = Machine("cuda", ("NVIDIA A10",) * 4, (22.0,) * 4, 32, 128.0, "some CPU")
FULL, LORA = MethodKind.full, MethodKind.lora
QWEN = KNOWN["qwen2.5-1.5b"]


def config_of(**values: Any) -> Config:
    """A config that runs on any CPU, with some keys changed: section__key=value."""
    config = Config(name="test")
    config.model.path, config.model.known_as, config.data.train = "somewhere", "smollm2-135m", "train.json"
    config.data.max_tokens = 512
    for path, value in values.items():
        section, _, key = path.partition("__")
        if key:
            assert hasattr(getattr(config, section), key)
            setattr(getattr(config, section), key, value)
        else:
            setattr(config, section, value)
    return config


# --- shapes --------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248, "tinyllama-1.1b": 1_100_048_384, "mistral-7b-v0.3": 7_248_023_552,
    "chatglm2-6b": 6_243_584_000, "chatglm3-6b": 6_243_584_000, "glm-4-9b": 9_399_951_360,
}  # fmt: skip


def transformers_config(shape: ModelShape) -> PretrainedConfig:
    sizes = dict(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=shape.max_positions,
    )  # fmt: skip
    if shape.fused:
        return GlmConfig(**sizes, head_dim=shape.head_dim, attention_bias=shape.qkv_bias, pad_token_id=0)
    if shape.qk_norm:
        return Qwen3Config(**sizes, head_dim=shape.head_dim)
    if shape.qkv_bias:
        return Qwen2Config(**sizes)
    return (MistralConfig if "mistral" in shape.name else LlamaConfig)(**sizes, head_dim=shape.head_dim)


@pytest.mark.parametrize("name", KNOWN)
def test_weights_are_counted_exactly(name: str) -> None:
    shape = KNOWN[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(shape))
    assert shape.total_weights == sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.layers * shape.matmul_weights_per_layer == sum(module.weight.numel() for module in linear)
    assert shape.embedding_weights == (1 if shape.tied else 2) * model.get_input_embeddings().weight.numel()


def test_adapter_weights() -> None:
    assert KNOWN["smollm2-135m"].adapter_weights(16, ["all-linear"]) == 4_884_480  # as PEFT prints for this model
    chatglm = KNOWN["chatglm3-6b"]
    # Three layers in transformers; as one, with one A for all, the guide's adapter has 28 * 8 * (4096 + 4608) = 1,949,696.
    assert chatglm.adapter_weights(8, ["query_key_value"]) == 28 * 8 * (8192 + 2 * 4352) == 3_784_704
    assert [name for name, _, _ in chatglm.linears] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert chatglm.linears[4][2] == 2 * 13696
    with pytest.raises(
        ValueError, match=r"method.targets=up_proj: not in chatglm3-6b — type some of q_proj, k_proj, "
    ):
        chatglm.adapter_weights(8, ["up_proj", "dense"])


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "qwen2.5-7b", "qwen3-8b", "llama-3.2-1b", "mistral-7b-v0.3", "tinyllama-1.1b"]
)
def test_a_folder_says_its_own_shape(tmp_path: Path, name: str) -> None:
    transformers_config(KNOWN[name]).save_pretrained(tmp_path)
    assert shape_of(str(tmp_path), name) == KNOWN[name]
    assert shape_of(str(tmp_path)).name == tmp_path.name


def test_a_folder_of_chatglm(tmp_path: Path) -> None:
    given = dict(
        model_type="chatglm", num_layers=28, hidden_size=4096, num_attention_heads=32, kv_channels=128,
        multi_query_attention=True, multi_query_group_num=2, ffn_hidden_size=13696, padded_vocab_size=65024,
        seq_length=8192, add_qkv_bias=True, add_bias_linear=False, tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert shape_of(str(tmp_path), "chatglm3-6b") == KNOWN["chatglm3-6b"]


@pytest.mark.parametrize(
    ("path", "known_as", "row"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "", "qwen2.5-1.5b"),
        ("meta-llama/Llama-3.1-8B-Instruct/", "", "llama-3.1-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "", "mistral-7b-v0.3"),
        ("THUDM/chatglm3-6b", "", "chatglm3-6b"),
        ("pypi:wheel==1/model.gguf", "smollm2-135m", "smollm2-135m"),
    ],
)
def test_a_name_says_the_shape(path: str, known_as: str, row: str) -> None:
    assert shape_of(path, known_as) is KNOWN[row]


def test_unknown_shapes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model.path=some/thing: .* type model.known_as=ROW, one of smollm2-135m, .*glm-4-9b"
    ):
        shape_of("some/thing")
    with pytest.raises(ValueError, match=r"model.known_as=gpt-2: "):
        shape_of("Qwen/Qwen3-8B", "gpt-2")
    file = tmp_path / "config.json"
    for text, words in [
        ('{"model_type": "mamba"}', "'mamba' is not counted"),
        ('{"model_type": "llama", "mlp_bias": true}', "with mlp_bias"),
        ('{"model_type": "llama"}', "has no 'num_attention_heads'"),
        ("{torn", "shapes are known of llama"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=words) as refusal:
            shape_of(str(tmp_path))
        assert str(refusal.value).startswith(f"model.path={tmp_path}: ")


# --- memory --------------------------------------------------------------------------------------------------------

def gib_of(
    shape: ModelShape = QWEN, world_size: int = 1, tokens: int = 2048, cpu: bool = False, **values: Any
) -> dict[str, float]:
    return memory_gib(shape, config_of(**values), world_size, tokens, cpu=cpu)


@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_states_are_what_deepspeed_estimates(world_size: int) -> None:
    """Its rule for ZeRO 2 in half precision: 2 bytes a weight, and 18 split over the ranks."""
    parts = gib_of(world_size=world_size, method__kind=FULL, precision__compute=Compute.fp16)
    states = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    assert states * GIB == pytest.approx(QWEN.total_weights * (2 + 18 / world_size))


def test_states_without_deepspeed_are_16_bytes_a_weight() -> None:
    config = config_of(method__kind=FULL, engine__kind=EngineKind.accelerate)
    assert sum(held_bytes(QWEN, config, 1).values()) == QWEN.total_weights * 16
    # At the peak the head's gradient is on its way beside what has been accumulated.
    parts = memory_gib(QWEN, config, 1, 2048)
    assert sum(parts[name] for name in ("weights", "gradients", "optimizer")) * GIB == QWEN.total_weights * 16 + QWEN.embedding_weights * 4


def test_zero_is_told_where_it_only_costs() -> None:
    """Adapters on several ranks; not on one rank, not for all weights, not by engines that split nothing."""

    def noted(world_size: int, **values: Any) -> list[str]:
        plan = make_plan(config_of(**values), HERE, world_size)
        return [note for note in plan.notes if note.startswith("engine.zero=")]

    (note,) = noted(2)
    assert note.startswith("engine.zero=2 saves 0.") and note.endswith("type engine=accelerate")
    assert len(noted(2, engine__zero=1)) == 1
    assert not noted(1) and not noted(2, engine__zero=0) and not noted(2, method__kind=MethodKind.full)
    assert not noted(2, engine__kind=EngineKind.accelerate)


def test_zero_splits_one_thing_more_at_each_stage() -> None:
    parts = [
        gib_of(world_size=4, method__kind=FULL, precision__compute=Compute.bf16, engine__zero=zero) for zero in range(4)
    ]
    for stage, name in [(1, "optimizer"), (3, "weights")]:
        assert parts[stage][name] * 4 == pytest.approx(parts[stage - 1][name])
    assert parts[2]["gradients"] < parts[1]["gradients"]
    assert sum(parts[3].values()) < sum(parts[2].values()) < sum(parts[1].values()) < sum(parts[0].values())


def test_offload_takes_the_optimizer_off_the_card() -> None:
    on, off = (
        gib_of(world_size=2, method__kind=FULL, precision__compute=Compute.fp16, engine__offload=offload)
        for offload in (True, False)
    )
    assert on["optimizer"] == 0 < off["optimizer"]
    assert on["gradients"] < off["gradients"]
    assert on["weights"] == off["weights"]


def test_bases_take_their_bits() -> None:
    linear, rest = QWEN.layers * QWEN.matmul_weights_per_layer, QWEN.embedding_weights + 87_552 + 57_344
    assert linear + rest == QWEN.total_weights  # norms and biases
    adapters = QWEN.adapter_weights(16, ["all-linear"]) * 2
    size = {
        base: gib_of(method__base=base, precision__compute=Compute.fp16)["weights"] * GIB - adapters for base in Base
    }
    assert size[Base.as_is] == pytest.approx(QWEN.total_weights * 2)
    assert size[Base.nf4] == pytest.approx(linear * 4.127 / 8 + rest * 2, rel=1e-4)
    assert size[Base.int8] == pytest.approx(linear + rest * 2, rel=0.01)


def test_checkpointing_and_shorter_batches_save_activations() -> None:
    plain, again = gib_of(), gib_of(engine__checkpointing=True)
    assert again["activations"] < plain["activations"] / 5
    assert all(again[name] == plain[name] for name in ("weights", "gradients", "optimizer"))
    # Most is alive in the last layer's backward, or with few tokens at the loss.
    assert plain["activations"] * 2 == pytest.approx(gib_of(tokens=4096)["activations"])
    assert gib_of(tokens=1024)["logits"] == pytest.approx(256 * 151_936 * 4 / GIB), "a piece of them at a time"


def test_a_published_peak_is_met() -> None:
    """PEFT's public comparison has Llama-3.2-3B, bf16, LoRA r=32 on q and v, at 20.8 GB with 4 x 768 tokens.

    Its loss makes logits at every position, all together, its adapters and gates keep all that they read, and its peak comes from the
    longest batch.
    """
    config = config_of(
        method__r=32, method__targets=["q_proj", "v_proj"], precision__compute=Compute.bf16,
        engine__kind=EngineKind.accelerate,
    )  # fmt: skip
    shape, tokens = KNOWN["llama-3.2-3b"], 4 * 768
    ours = memory_gib(shape, config, 1, tokens, targets=tokens)
    plain = replace(setting_of(shape, config), joined=False, again=False)
    settings = setting_of(shape, config), plain, replace(plain, whole_logits=True)
    frugal, kept, whole = (sum(size for _, size in replayed(shape, setting, tokens, tokens).at_peak) for setting in settings)
    assert sum(ours.values()) * GIB / 1e9 + (1 + FRAGMENTS) * (whole - frugal) / 1e9 == pytest.approx(20.8, rel=0.1)
    assert whole - kept > 4e9, "what it takes to have them together"


# --- batch arithmetic ----------------------------------------------------------------------------------------------

machines = st.sampled_from([(HERE, "cpu", Compute.fp32), (A10S, "a10", Compute.bf16)])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 40), machines, st.sampled_from([32, 512, 2048]))
def test_a_step_is_covered(
    share: int, world_size: int, micro: int, machine: tuple[Machine, str, Compute], tokens: int
) -> None:
    here, card, compute = machine
    per_step = share * world_size
    config = config_of(
        train__conversations_per_step=per_step, train__micro_batch=min(micro, share) or AUTO, hardware__card=card,
        precision__compute=compute, model__known_as="qwen2.5-0.5b" if card == "a10" else "smollm2-135m",
    )  # fmt: skip
    plan = make_plan(config, here, world_size, Counts(longest_tokens=32 if micro else tokens))  # a given one must fit
    places = plan.micro_batch * plan.accumulation * world_size
    assert per_step <= places < per_step + plan.accumulation * world_size, "less than one empty place a micro-batch"
    assert 1 <= plan.micro_batch <= share
    # What the data room reckons for itself, from the micro-batch alone.
    assert plan.accumulation == math.ceil(per_step / (plan.micro_batch * world_size))
    if micro:
        assert plan.micro_batch <= min(micro, share)
    else:
        assert plan.micro_batch == 1 or plan.memory_gib <= 0.92 * plan.memory_limit_gib
        assert card != "cpu" or plan.micro_batch <= max(1, 1024 // tokens)
    assert plan.deepspeed["train_micro_batch_size_per_gpu"] == plan.micro_batch
    assert plan.deepspeed["gradient_accumulation_steps"] == plan.accumulation


def test_the_plan_fills_a_card_but_not_to_the_brim() -> None:
    config = config_of(
        model__known_as="qwen2.5-7b", method__base=Base.nf4, engine__checkpointing=True, hardware__card="t4",
        precision__compute=Compute.fp16, data__max_tokens=1024, train__conversations_per_step=64,
    )  # fmt: skip
    plan = make_plan(config, T4, 1)
    assert (plan.micro_batch, plan.accumulation) == (8, 8)
    assert plan.memory_gib < 0.92 * 14.56
    assert sum(memory_gib(plan.shape, config, 1, 16 * 1024).values()) > 0.92 * 14.56
    assert make_plan(config, T4, 1, Counts(longest_tokens=128)).micro_batch > 8, "shorter data, larger micro-batches"


@pytest.mark.parametrize(
    ("values", "conversations", "steps", "epochs"),
    [
        ({"train__epochs": 3.0}, 4000, 750, 3.0),
        ({"train__epochs": 3.0}, 100, 21, 3.0),  # 7 a pass, the last of them with 4 conversations
        ({"train__epochs": 0.1}, 4800, 30, 0.1),  # not 31, although 0.1 is a little more than a tenth
        ({"train__epochs": 2.5}, 100, 7 + 7 + 4, 2.5),
        ({"train__steps": 14}, 100, 14, 2.0),
        ({"train__steps": 100}, None, 100, 0.0),
        ({"train__epochs": 3.0}, None, 0, 3.0),
    ],
)
def test_length(values: dict[str, Any], conversations: int | None, steps: int, epochs: float) -> None:
    plan = make_plan(config_of(**values), HERE, 1, Counts(conversations))
    assert (plan.steps, plan.epochs) == (steps, epochs)


def test_small_data_is_noted() -> None:
    config = config_of(train__epochs=100.0)
    assert make_plan(config, HERE, 1, Counts(5)).notes == ["the data has 5 conversations, fewer than the 16 of a step"]
    uneven = make_plan(config_of(train__micro_batch=5), HERE, 1)
    assert (uneven.micro_batch, uneven.accumulation, uneven.notes) == (4, 4, [])
    assert make_plan(config_of(train__conversations_per_step=7, train__micro_batch=4), HERE, 1).notes == [
        "7 conversations leave 1 of a step's 8 places empty"
    ]


# --- steps in tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "counted", "steps", "epochs", "per_step", "step_tokens"),
    [
        ({}, (4000, 312_000), 114, 3.0, 105, 8211),  # 38.09 steps of 8192: 38 a pass, each a little larger
        ({"train__epochs": 2.5}, (4000, 312_000), 95, 2.5, 105, 8211),
        ({"train__epochs": 0.1}, (4000, 40 * 8192), 4, 0.1, 100, 8192),
        ({"train__steps": 19}, (4000, 312_000), 19, 0.5, 105, 8211),
        ({"train__epochs": 20.0}, (4000, 5000), 20, 20.0, 4000, 5000),  # less than a step: one a pass
        ({"train__tokens_per_step": 1}, (40, 4000), 120, 3.0, 1, 100),  # never more than one a conversation
        ({}, (None, 0), 0, 3.0, 16, 8192),  # not counted: as many as would fit at least
        ({}, (4000, 0), 0, 3.0, 16, 8192),  # their number alone does not say it
        ({"train__steps": 19}, (None, 0), 19, 0.0, 16, 8192),
    ],
)  # fmt: skip
def test_length_of_steps_in_tokens(
    values: dict[str, Any], counted: tuple[int | None, int], steps: int, epochs: float, per_step: int, step_tokens: int
) -> None:
    config = config_of(**{"train__tokens_per_step": 8192, "optim__warmup_steps": 1, **values})
    plan = make_plan(config, HERE, 1, Counts(counted[0], tokens=counted[1], longest_tokens=480 if counted[1] else 0))
    assert (plan.steps, plan.epochs) == (steps, epochs)
    assert (plan.conversations_per_step, plan.tokens_per_step) == (per_step, step_tokens)


def test_steps_in_tokens_are_divided_as_they_come() -> None:
    """Ranks need not get equally many; a typed micro-batch is kept, as a smaller one would only make more of them in some steps."""
    config = config_of(train__tokens_per_step=8192, model__known_as="smollm2-135m", data__max_tokens=64)
    plan = make_plan(config, replace(HERE, ram_gib=99.0), 3, Counts(4000, tokens=312_000, longest_tokens=480))
    assert (plan.micro_batch, plan.accumulation) == (13, 3), "35 conversations a rank of 78 tokens, 1,024 in a forward"
    config.train.micro_batch = 40
    plan = make_plan(config, replace(HERE, ram_gib=99.0), 3, Counts(4000, tokens=312_000, longest_tokens=64))
    assert (plan.micro_batch, plan.accumulation) == (40, 1)
    assert plan.deepspeed["gradient_accumulation_steps"] == 2, "a step may have more than the mean"
    few = make_plan(config_of(train__tokens_per_step=64, optim__warmup_steps=1), replace(HERE, ram_gib=99.0), 4, Counts(40, tokens=1600, longest_tokens=60))
    assert (few.micro_batch, few.accumulation, few.conversations_per_step) == (1, 1, 2)
    assert few.notes == ["a step has about 2 conversations for 4 ranks: some compute nothing"]


def test_what_is_odd_about_steps_in_tokens_is_noted() -> None:
    def notes(*counted: int, **values: Any) -> list[str]:
        conversations, tokens, longest = counted or (0, 0, 0)
        return make_plan(config_of(**values), HERE, 1, Counts(conversations, tokens=tokens, longest_tokens=longest)).notes

    assert notes(train__tokens_per_step=8192) == notes(4000, 312_000, 480, train__tokens_per_step=8192) == []
    assert notes(train__tokens_per_step=8192, train__conversations_per_step=64) == [
        "train.conversations_per_step=64 is passed over, train.tokens_per_step=8192 is set"
    ]
    assert notes(4000, 312_000, 480, train__tokens_per_step=300) == [
        "the longest conversation has 480 tokens, more than train.tokens_per_step=300: its step is larger"
    ]
    assert notes(9, 700, 100, train__tokens_per_step=8192, train__steps=20) == ["the data has 700 tokens, fewer than the 8,192 of a step"]


def test_flops_of_a_step_in_tokens_are_a_bound() -> None:
    """Of 8,211 tokens on the mean a step has up to one longest conversation more, and attention costs most where all are that long."""
    config = config_of(train__tokens_per_step=8192)
    plan = make_plan(config, HERE, 1, Counts(4000, tokens=312_000, longest_tokens=480))
    tokens = 8211 + 480
    for length in (1, 100, 480):
        lengths = [length] * (tokens // length) + [tokens % length]
        assert step_flops(plan.shape, config.method, lengths, tokens).useful <= plan.flops.useful
    assert plan.flops.useful < 1.001 * step_flops(plan.shape, config.method, lengths, tokens).useful


@pytest.mark.parametrize("values", [{}, {"method__kind": FULL}, {"engine__checkpointing": True}, {"model__known_as": "qwen2.5-0.5b"}], ids=str)
def test_attention_cost_is_in_proportion_to_flops(values: dict[str, Any]) -> None:
    config = config_of(**values)
    plan = make_plan(config, replace(HERE, ram_gib=99.0), 1)
    flops = [step_flops(plan.shape, config.method, [n], 0, checkpointing=config.engine.checkpointing).executed for n in (1, 10, 100, 10_000)]
    costs = [n + plan.attention_cost * n * n for n in (1, 10, 100, 10_000)]
    for flop, cost in zip(flops, costs, strict=True):
        assert cost / costs[0] == pytest.approx(flop / flops[0])
    assert 1e-6 < plan.attention_cost < 1e-3


def test_packed_rows_are_planned_as_long_as_they_are() -> None:
    """A row has max_tokens tokens, however short the conversations in it; how many rows a step has is not known."""
    config = config_of(data__batching=Batching.packed, train__micro_batch=4)
    plan = make_plan(config, HERE, 1, Counts(4000, longest_tokens=100))
    assert (plan.longest_tokens, plan.micro_batch, plan.packed) == (512, 4, True)
    assert plan.memory == memory_gib(plan.shape, config, 1, 4 * 512, cpu=True)
    assert "16 conversations <= 4 rows in a micro-batch x 4 accumulated x 1 rank" in describe(plan)
    assert "GiB a rank, with rows of 512 tokens" in describe(plan)


# --- problems ------------------------------------------------------------------------------------------------------


def refused(
    config: Config, machine: Machine = HERE, world_size: int = 1, conversations: int | None = None, **more: Any
) -> list[str]:
    with pytest.raises(PlanError) as refusal:
        make_plan(config, machine, world_size, Counts(conversations), **more)
    assert isinstance(refusal.value, Refusal)
    assert str(refusal.value).splitlines() == refusal.value.problems
    return refusal.value.problems


ON_A10 = {"hardware__card": "a10", "precision__compute": Compute.bf16}


@pytest.mark.parametrize(
    ("values", "start", "advice"),
    [
        ({"optim__lr": 0.0}, "optim.lr=0.0: must be above 0", "optim.lr=0.0002"),
        ({"optim__lr": math.nan}, "optim.lr=nan: must be above 0", "optim.lr=0.0002"),
        ({"optim__lr": math.inf}, "optim.lr=inf: must be above 0", "optim.lr=0.0002"),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay=-0.1: must not be negative", "optim.weight_decay=0.0"),
        ({"optim__beta2": 1.0}, "optim.beta2=1.0: must be at least 0 and below 1", "optim.beta2=0.999"),
        ({"optim__min_lr_ratio": 1.5}, "optim.min_lr_ratio=1.5: must be between 0 and 1", "optim.min_lr_ratio=0.0"),
        ({"method__r": 0}, "method.r=0: must be at least 1", "method.r=16"),
        ({"method__dropout": 1.0}, "method.dropout=1.0: must be at least 0 and below 1", "method.dropout=0.0"),
        ({"train__keep": 0}, "train.keep=0: must be at least 1", "train.keep=2"),
        ({"train__seed": -1}, "train.seed=-1: must not be negative", "train.seed=0"),
        ({"train__epochs": math.inf}, "train.epochs=inf: must not be negative or", "train.epochs=3.0"),
        ({"train__epochs": 0.0}, "train.epochs=0.0: not one step", "train.epochs=3"),
        ({"train__tokens_per_step": -1}, "train.tokens_per_step=-1: must not be negative", "train.tokens_per_step=0"),
        ({"train__conversations_per_step": 0}, "train.conversations_per_step=0: must be at least 1", "per_step=16"),
        ({"eval__conversations": -5}, "eval.conversations=-5: must not be negative", "eval.conversations=200"),
        ({"data__prepare_train": 0}, "data.prepare_train=0: must be at least 1", "data.prepare_train=4000"),
        ({"data__max_tokens": 9000}, "data.max_tokens=9000: smollm2-135m knows 8192 positions", "data.max_tokens=8192"),
        ({"train__micro_batch": 0}, "train.micro_batch=0: must be at least 1", "train.micro_batch=auto"),
        ({"train__micro_batch": 17}, "train.micro_batch=17: a rank has only 16", "train.micro_batch=16"),
        ({"train__steps": 10}, "optim.warmup_steps=10: the run has only 10 steps", "optim.warmup_steps=1"),
        ({"engine__zero": 4}, "engine.zero=4: ZeRO has stages 0 to 3", "engine.zero=2"),
        ({"engine__offload": True, "engine__zero": 1}, "engine.offload=true: ZeRO 1 keeps", "engine.zero=2"),
        ({"engine__kind": EngineKind.accelerate, "engine__offload": True}, "engine.offload=true", "engine=deepspeed"),
        ({"method__kind": FULL, "method__base": Base.nf4}, "method.base=nf4: a quantised base", "method=qlora"),
        ({"method__kind": FULL, "method__base": Base.int8}, "method.base=int8: a quantised base", "method=lora_int8"),
        ({"method__base": Base.nf4, "engine__zero": 3}, "engine.zero=3: splits weights", "engine.zero=2"),
        ({"method__targets": ["query"]}, "method.targets=query: not in smollm2-135m", "some of q_proj, "),
        ({"method__targets": []}, "method.targets=[]: no layer", "method.targets=[all-linear]"),
        ({"precision__compute": Compute.fp16}, "precision.compute=fp16: on a CPU half precision", "precision=fp32"),
        ({"hardware__peak": "fast"}, "hardware.peak=fast: not table, measure or a positive n", "hardware.peak=125e12"),
        ({"hardware__card": "h100"}, "hardware.card=h100: no such row — type one of cpu, any, t4, ", "h100_sxm"),
        ({"model__known_as": "gpt-2"}, "model.known_as=gpt-2: no local config.json", "model.known_as=ROW"),
    ],
)  # fmt: skip
def test_each_problem_says_what_to_type(values: dict[str, Any], start: str, advice: str) -> None:
    (line,) = refused(config_of(**values))
    assert line.startswith(start)
    assert advice in line.split(" — ")[1]


def test_conversations_must_divide_by_the_ranks() -> None:
    for per_step, world_size, nearest in [(16, 3, 15), (17, 3, 18), (1, 4, 4), (16, 6, 18)]:
        (line,) = refused(config_of(train__conversations_per_step=per_step), replace(HERE, ram_gib=99), world_size)
        assert line == (
            f"train.conversations_per_step={per_step}: does not divide by {world_size} ranks, and each takes as many "
            f"— type train.conversations_per_step={nearest}"
        )


def test_tokens_need_not_divide_by_the_ranks() -> None:
    config = config_of(train__tokens_per_step=4096, train__conversations_per_step=7, train__micro_batch=9)
    assert problems(config, replace(HERE, ram_gib=99), 3, KNOWN["smollm2-135m"]) == []


def test_warm_up_is_held_against_the_data_too() -> None:
    (line,) = refused(config_of(train__epochs=1.0), conversations=100)
    assert line.startswith("optim.warmup_steps=10: the run has only 7 steps")
    assert make_plan(config_of(train__epochs=1.0), HERE, 1, Counts(1000)).steps == 63


def test_everything_is_said_at_once() -> None:
    config = config_of(
        optim__lr=-1.0, train__keep=0, train__conversations_per_step=7, engine__zero=1, engine__offload=True,
        method__kind=FULL, method__base=Base.nf4, hardware__peak="?", precision__compute=Compute.fp16,
        model__known_as="qwen2.5-7b",
    )  # fmt: skip
    paths = [line.partition("=")[0] for line in refused(config, world_size=2)]
    assert paths == [
        "train.keep", "optim.lr", "hardware.peak", "train.conversations_per_step", "engine.offload", "method.base",
        "precision.compute", "data.max_tokens",
    ]  # fmt: skip


def test_bf16_needs_units_for_it() -> None:
    for card in ("t4", "any"):
        (line,) = refused(config_of(hardware__card=card, precision__compute=Compute.bf16), T4)
        assert line.startswith("precision.compute=bf16: the t4 has no bf16 units (compute capability 7.5")
        assert line.endswith("type precision=fp16")
    assert make_plan(config_of(hardware__card="any", precision__compute=Compute.fp16), T4, 1).card == "t4"


def test_a_card_that_is_not_here() -> None:
    (line,) = refused(config_of(**ON_A10, hardware__count=2))
    assert line.startswith("hardware.card=a10: needs 2 x a10 (22 GiB each, ")
    assert "here is no GPU, 2 cores, 23.5 GiB of RAM (some CPU)" in line
    assert line.endswith(
        "type hardware=cpu precision=fp32 to run this very experiment here, or +exp=lora_cpu, made for a CPU"
    )
    as_told = config_of(hardware__card="cpu", precision__compute=Compute.fp32, hardware__count=2)
    assert make_plan(as_told, HERE, 1).card == "cpu", "the advice works"
    (line,) = refused(config_of(**ON_A10, model__known_as="qwen2.5-7b", data__max_tokens=2048))
    assert "it would not fit here either (41.6 of 23.5 GiB a rank); +exp=lora_cpu does" in line


def test_another_card_is_here() -> None:
    config = config_of(hardware__card="a10", precision__compute=Compute.fp16)
    assert refused(config, T4) == ["hardware.card=a10: here is Tesla T4 — type hardware.card=t4"]
    stranger = replace(T4, device_names=("NVIDIA Z9",))
    assert refused(config, stranger) == ["hardware.card=a10: here is NVIDIA Z9 — type hardware.card=any"]
    config.hardware.card = "any"
    plan = make_plan(config, stranger, 1)
    assert (plan.card, plan.peak_flops) == ("NVIDIA Z9", None)
    assert "add one to CARDS" in plan.peak_note


def test_ranks_and_cards_must_agree() -> None:
    (line,) = refused(config_of(**ON_A10), A10S, 8)
    assert line.startswith("hardware.card=a10: 8 ranks on this machine, but 4 x NVIDIA A10 — start 4 here")
    assert make_plan(config_of(**ON_A10), A10S, 8, local_size=4).world_size == 8, "two machines of four"
    (line,) = refused(config_of(**ON_A10, hardware__count=4), A10S, 1)
    assert line.startswith("hardware.count=4: 1 started — deepspeed --num_gpus 4 train.py")


def test_a_model_that_does_not_fit_comes_with_what_helps() -> None:
    config = config_of(
        hardware__card="t4", precision__compute=Compute.fp16, model__known_as="llama-3.1-8b", data__max_tokens=1024
    )
    (line,) = refused(config, T4)
    fact, advice = line.split(" — type ")
    assert fact.startswith("data.max_tokens=1024: llama-3.1-8b with 1 x 1024 tokens needs ")
    assert fact.endswith("GiB a rank, and the card is 14.6 GiB")
    assert advice.startswith("method.base=nf4 (")
    assert "or engine.checkpointing=true method.base=int8 (" in advice


TYPED: dict[str, Any] = {"true": True, "int8": Base.int8, "nf4": Base.nf4, "lora": LORA}


@pytest.mark.parametrize(
    ("machine", "world_size", "values"),
    [
        (T4, 1, {"model__known_as": "llama-3.1-8b", "data__max_tokens": 4096, "precision__compute": Compute.fp16, "hardware__card": "t4"}),
        (A10S, 1, {"model__known_as": "qwen2.5-1.5b", "method__kind": FULL, "data__max_tokens": 2048, **{"precision__compute": Compute.bf16}}),
        (A10S, 4, {"model__known_as": "qwen2.5-7b", "method__kind": FULL, "data__max_tokens": 512, "precision__compute": Compute.bf16}),
        (A10S, 4, {"model__known_as": "qwen2.5-7b", "train__micro_batch": 4, "data__max_tokens": 8192, "precision__compute": Compute.bf16}),
    ],
    ids=["8B on a T4", "full on an A10", "full on four", "long on four"],
)  # fmt: skip
def test_advice_works_and_is_not_more_than_needed(machine: Machine, world_size: int, values: dict[str, Any]) -> None:
    config = config_of(**{"hardware__card": "any", "engine__zero": 2, **values})
    shape = KNOWN[config.model.known_as]
    (line,) = problems(config, machine, world_size, shape)
    ways = [[word for word in way.split() if "=" in word] for way in line.split(" — type ")[1].split(", or ")]
    assert 1 <= len(ways) <= 3

    def fits(words: list[str]) -> bool:
        changes = {}
        for word in words:
            path, value = word.split("=")
            if path == "method":
                path = "method.kind"
            changes[path] = TYPED[value] if value in TYPED else int(value)
        return problems(changed(config, changes), machine, world_size, shape) == []

    for number, words in enumerate(ways):
        assert fits(words), words
        if any(set(fewer) < set(words) for fewer in ways[:number]):
            continue  # behind all others, where those are fewer than three: what leaves more room
        assert not any(set(fewer) < set(before) for before in ways[:number] for fewer in ways[:number])
        assert all(not fits([word for word in words if word != left_out]) for left_out in words), f"{words}: fewer would do"


def test_ranks_on_one_machine_share_its_ram() -> None:
    config = config_of(model__known_as="qwen2.5-1.5b", train__conversations_per_step=4)
    assert make_plan(config, HERE, 1).memory_limit_gib == 23.5
    (line,) = refused(config, HERE, 4)
    assert "the RAM of a rank is 5.9 GiB" in line
    assert make_plan(config, HERE, 4, local_size=1).world_size == 4


def test_a_good_config_has_no_problems_with_or_without_a_shape() -> None:
    assert problems(config_of(), HERE, 1) == problems(config_of(), HERE, 2, KNOWN["smollm2-135m"]) == []
    assert problems(config_of(hardware__card="any"), HERE, 1) == []


@pytest.mark.parametrize("key", CARDS)
def test_every_card_can_be_planned_for(key: str) -> None:
    card = CARDS[key]
    compute = Compute.bf16 if "bf16" in card.peak else Compute.fp16
    machine = Machine("cuda", card.names[-1:], (card.memory_gib,), 8, 64.0)
    config = config_of(
        hardware__card=key, precision__compute=compute, model__known_as="qwen2.5-7b", method__base=Base.nf4
    )
    plan = make_plan(config, machine, 1, Counts(1000))
    assert (plan.card, plan.peak_flops) == (key, card.peak[compute.value])
    assert plan.memory_gib <= 0.92 * card.memory_gib


# --- what follows --------------------------------------------------------------------------------------------------


def test_the_run_id_knows_what_changes_the_result() -> None:
    base = run_id(config_of())
    assert len(base) == 8
    assert int(base, 16) >= 0
    same: list[dict[str, Any]] = [
        {"outputs": "/elsewhere"}, {"engine__timeout_s": 5}, {"train__keep": 9}, {"train__save_every": 1},
        {"tracker__project": "x"}, {"eval__samples": 1}, {"hardware__card": "any"}, {"hardware__threads": 3},
        {"optim__lr": 0.0002}, {"train__epochs": 3}, {"method__targets": ["all-linear"]},
    ]  # fmt: skip
    for values in same:
        assert run_id(config_of(**values)) == base, values
    other: list[dict[str, Any]] = [
        {"name": "other"}, {"optim__lr": 1e-3}, {"train__seed": 1}, {"method__r": 8},
        {"precision__compute": Compute.bf16}, {"data__max_tokens": 511}, {"engine__zero": 1}, {"train__epochs": 3.5},
        {"method__targets": ["q_proj"]},
    ]  # fmt: skip
    assert len({base, *(run_id(config_of(**values)) for values in other)}) == 1 + len(other)


def test_deepspeed_is_told_what_was_planned() -> None:
    config = config_of(**ON_A10, optim__clip=0.5, engine__offload=True)
    told = make_plan(config, A10S, 4).deepspeed
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert told["zero_optimization"]["overlap_comm"] is True
    assert told["bf16"] == {"enabled": True}
    assert "fp16" not in told
    assert told["gradient_clipping"] == 0.5
    assert told["comms_logger"]["enabled"] is False
    config.precision.compute, config.engine.zero, config.engine.offload = Compute.fp16, 0, False
    told = make_plan(config, A10S, 4).deepspeed
    assert told["fp16"]["initial_scale_power"] == 16
    assert told["zero_optimization"]["stage"] == 0
    told = make_plan(config_of(), HERE, 1).deepspeed
    assert not {"fp16", "bf16"} & set(told)
    assert told["comms_logger"]["enabled"] is True
    assert told["zero_optimization"]["overlap_comm"] is False
    assert make_plan(config_of(engine__kind=EngineKind.accelerate), HERE, 1).deepspeed == {}


@pytest.mark.filterwarnings("ignore")
def test_deepspeed_understands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses keys it does not know inside its sections."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = config_of(**ON_A10, engine__offload=True, train__micro_batch=4)
    read = DeepSpeedConfig(make_plan(config, A10S, 1).deepspeed)
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps, read.train_batch_size) == (4, 4, 16)
    assert (read.zero_config.stage, read.zero_config.offload_optimizer.device) == (2, "cpu")
    assert read.bfloat16_config.enabled
    config.precision.compute, config.engine.zero, config.engine.offload = Compute.fp16, 3, False
    read = DeepSpeedConfig(make_plan(config, A10S, 1).deepspeed)
    assert (read.zero_config.stage, read.float16_config.enabled, read.float16_config.loss_scale) == (3, True, 0)
    assert DeepSpeedConfig(make_plan(config_of(), HERE, 1).deepspeed).comms_config.comms_logger.enabled


def test_describe_fits_a_glance() -> None:
    config = config_of(**ON_A10, name="lora_a10", model__known_as="qwen2.5-1.5b", data__max_tokens=2048)
    plan = make_plan(config, A10S, 4, Counts(4000))
    text = describe(plan)
    lines = text.splitlines()
    assert len(lines) <= 14
    assert max(map(len, lines)) <= 120
    for words in (
        f"lora_a10/{plan.run_id}", "qwen2.5-1.5b, 1,543.7 M weights, 18.5 M trained", "LoRA r=16, bf16, DeepSpeed",
        "16 conversations = 4 in a micro-batch x 1 accumulated x 4 ranks", "750 steps = 3 epochs of 4,000 convers",
        "of 22.0 GiB a rank", "125 TFLOPS a rank, table: NVIDIA A10 datasheet",
    ):  # fmt: skip
        assert words in text
    executed = plan.flops.executed
    assert f"{executed / 4 / 125e12:.3g} s at the peak" in text
    assert plan.trained_weights == trained_weights(plan.shape, config.method) == 18_464_768


def test_describe_says_steps_in_tokens() -> None:
    config = config_of(train__tokens_per_step=8192)
    words = "at most 13 in a micro-batch x about"
    text = describe(make_plan(config, HERE, 1, Counts(4000, tokens=312_000, longest_tokens=480)))
    assert f"~8,211 tokens, about 105 conversations, {words} 9 accumulated x 1 rank" in text
    assert "114 steps = 3 epochs of 4,000 conversations" in text
    text = describe(make_plan(config, HERE, 2, local_size=1))
    assert f"~8,192 tokens, 16 or more conversations, {words.replace('13', '2')} 4 accumulated x 2 ranks" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_common_beginning_leaves_room_for_more_conversations() -> None:
    """On a CPU a forward has as many as make 1,024 tokens of their own or twice what they share, which takes memory and time once."""
    config = config_of(train__conversations_per_step=64)

    def plan(common: int, **more: Any) -> Any:
        settings = config_of(train__conversations_per_step=64, **more)
        return make_plan(settings, HERE, 1, Counts(4000, tokens=4000 * 1300, longest_tokens=1310, common_tokens=common))

    alone, sharing = plan(0), plan(1200)
    assert (alone.micro_batch, sharing.micro_batch) == (1, 22), "1,024 / 1,300 and 2 x 1,200 / 100, evenly"
    assert plan(300).micro_batch == 1, "1,024 / 1,000"
    assert sharing.memory["activations"] < 3 * alone.memory["activations"], "1,200 + 22 x 110 tokens and 1,310"
    assert sharing.flops == alone.flops, "the bound is of conversations that share nothing"
    assert plan(1200, data__batching=Batching.padded).micro_batch == 1, "there nothing is shared"
    known = {"hardware__peak": 5e11, "train__micro_batch": 16}
    assert plan(1200, **known).time["matmul"] < 0.25 * plan(0, **known).time["matmul"], "1,200 + 16 x 100 tokens and 16 x 1,300"
    assert make_plan(config, T4, 1, Counts(4000, tokens=4000 * 1300, longest_tokens=1310, common_tokens=1200)).micro_batch >= 1


def test_describe_says_what_is_not_known_yet() -> None:
    text = describe(make_plan(config_of(train__conversations_per_step=7, train__micro_batch=4), HERE, 1))
    assert "as many steps as the data asks for, 3 epochs" in text
    assert "7 conversations <= 4 in a micro-batch x 2 accumulated x 1 rank" in text
    assert "note     7 conversations leave 1" in text
    assert len(text.splitlines()) <= 14


def test_a_plan_is_frozen_and_pure() -> None:
    config = config_of()
    plan = make_plan(config, HERE, 1)
    with pytest.raises(FrozenInstanceError):
        plan.steps = 1  # type: ignore[misc]
    assert make_plan(config, HERE, 1) == plan
    assert config == config_of(), "the config is not touched"


# --- time, cost, disk ----------------------------------------------------------------------------------------------


def test_time_is_the_roofline() -> None:
    """Four times the tokens take at least four times as long; a card with twice of everything half as long."""
    config = config_of(**ON_A10, model__known_as="qwen2.5-1.5b", train__micro_batch=1, train__conversations_per_step=4)
    one, four = (make_plan(config, A10S, 1, Counts(longest_tokens=tokens)) for tokens in (128, 512))
    assert 4 * one.time["matmul"] < four.time["matmul"] < 4.2 * one.time["matmul"]
    assert four.step_s > one.step_s > one.flops.executed / 125e12, "no faster than the peak"
    short = make_plan(config, A10S, 1, Counts(longest_tokens=32))
    assert short.time["operators"] > four.time["operators"], "a short micro-batch leaves the card waiting"
    assert one.time["communication"] == 0
    assert make_plan(config, A10S, 4, Counts(longest_tokens=512)).time["communication"] > 0


def test_tokens_and_hours_follow() -> None:
    config = config_of(**ON_A10, model__known_as="qwen2.5-1.5b", hardware__price_per_h=1.2)
    plan = make_plan(config, A10S, 4, Counts(4000, tokens=4000 * 100, longest_tokens=480))
    assert plan.expected_tokens == 16 * 100, "the mean of the data where it is counted"
    assert make_plan(config, A10S, 4).expected_tokens == 16 * 512
    assert plan.tokens_per_s == pytest.approx(plan.expected_tokens / plan.step_s)
    assert plan.hours == pytest.approx(plan.steps * plan.step_s / 3600)
    assert plan.cost == pytest.approx(4 * 1.2 * plan.hours)
    assert f"cost {plan.cost:.2f}" in describe(plan)
    assert "cost" not in describe(make_plan(config_of(**ON_A10, model__known_as="qwen2.5-1.5b"), A10S, 4, Counts(4000)))


def test_disk_is_what_a_run_keeps() -> None:
    """A checkpoint has trained weights and AdamW's moments, under DeepSpeed in halves beside an fp32 master."""
    full = make_plan(config_of(**ON_A10, method__kind=FULL), A10S, 1)
    assert full.disk == (14 * full.trained_weights / GIB, 4 * full.trained_weights / GIB)
    lora = make_plan(config_of(train__keep=5), HERE, 1)
    assert lora.disk == (12 * lora.trained_weights / GIB, 4 * lora.trained_weights / GIB)
    assert "5 + 1 checkpoints" in describe(lora)


def test_what_zero_sends() -> None:
    """ZeRO 3 sends weights for each forward and each backward, but those that stay in between; over PCI Express that is the step."""
    config = config_of(**ON_A10, model__known_as="qwen3-0.6b", method__kind=FULL, train__micro_batch=1)
    sent = {}
    for zero in range(4):
        config.engine.zero = zero
        sent[zero] = make_plan(config, A10S, 4).time["communication"]
    total = KNOWN["qwen3-0.6b"].total_weights
    weights = total * 2 * 3 / 4 / (31.5e9 * 0.75)
    assert sent[0] == pytest.approx(2 * weights)
    assert sent[1] == pytest.approx(3 * weights), "reduced on every rank, and gathered after the update"
    assert sent[2] == pytest.approx((4 * 2 + 1) * weights), "reduced after each of four micro-batches"
    assert sent[3] == pytest.approx(4 * (3 - 500e6 / total) * weights), "half of DeepSpeed's reuse distance stays gathered"


def test_predicted_beside_measured() -> None:
    plan = make_plan(config_of(**ON_A10), A10S, 1)
    rows = [{"time/step_s": second, "memory/peak_gib": 3.0 + second} for second in (9.0, 8.0, 7.0, 0.5, 0.7, 0.6)]
    words = beside(plan, rows)
    assert f"memory {plan.memory_gib:.2f} GiB predicted, 12.00 measured" in words
    assert f"step {plan.step_s:.3g} s predicted, 0.6 measured" in words
    assert beside(plan, []) == ""


# --- what is left to the plan --------------------------------------------------------------------------------------


def test_the_plan_chooses_the_fastest_that_fits() -> None:
    config = config_of(**ON_A10, model__known_as="qwen2.5-1.5b", engine__fit=True, engine__zero=3, engine__checkpointing=True)
    chosen = make_plan(config, A10S, 4)
    assert (chosen.config.engine.zero, chosen.config.engine.checkpointing, chosen.config.engine.offload) == (0, False, False)
    assert chosen.notes[0].startswith("engine.fit: DeepSpeed ZeRO 0 is the fastest of ")
    assert chosen.deepspeed["zero_optimization"]["stage"] == 0
    assert chosen.run_id == run_id(config), "what is chosen may change when the data is counted; the folder stays"
    for choice in engine_choices(config, 4):
        other = changed(config, {"engine.fit": False, **choice})
        if problems(other, A10S, 4, QWEN) == []:
            assert make_plan(other, A10S, 4).step_s >= chosen.step_s


def test_the_type_is_left_to_the_plan() -> None:
    """What the plan takes is what the doctor's table says is best on each card."""
    for card in ("cpu", *CARDS):
        row = row_for(None if card == "cpu" else CARDS[card].capability)
        assert row
        best = Compute(best_type(row))
        asked, given = (
            config_of(model__known_as="smollm2-135m", hardware__card=card, engine__kind=EngineKind.accelerate, precision__compute=compute)
            for compute in (Compute.auto, best)
        )
        machine = HERE if card == "cpu" else Machine("cuda", CARDS[card].names[:1], (CARDS[card].memory_gib,), 8, 64.0)
        chosen, plain = (make_plan(config, machine, 1) for config in (asked, given))
        assert chosen.config == plain.config
        assert chosen.notes[0].startswith(f"precision.compute=auto: {best.value}, ")
        assert (chosen.memory, chosen.time, chosen.deepspeed) == (plain.memory, plain.time, plain.deepspeed)
        assert chosen.run_id == run_id(asked) != plain.run_id
    unknown = Machine("cuda", ("NVIDIA X1",), (24.0,), 8, 64.0)
    (line,) = refused(config_of(precision__compute=Compute.auto, hardware__card="any"), unknown, 1)
    assert line.startswith("precision.compute=auto: NVIDIA X1 has no row in the card table — type precision=bf16 where its compute")
    for left in ({}, {"engine__zero": AUTO}):  # and what is wrong whatever the type is said with it
        asked = config_of(precision__compute=Compute.auto, hardware__card="any", optim__lr=-1.0, **left)
        first, *others = refused(asked, unknown, 1)
        assert first == line and [one.partition(":")[0] for one in others] == ["optim.lr=-1.0"]
    (line,) = refused(config_of(precision__compute=Compute.auto, hardware__card="b7"), HERE, 1)
    assert line.startswith("hardware.card=b7: no such row")
    # A run that has begun on another card goes on as it began, or is told that it cannot.
    asked = config_of(precision__compute=Compute.auto, hardware__card="any", model__known_as="smollm2-135m")
    again = make_plan(asked, A10S, 1, kept={"precision.compute": "fp16"})
    assert again.config.precision.compute is Compute.fp16
    assert again.notes[0] == "precision.compute=auto: fp16, as this run began with it"
    with pytest.raises(PlanError, match=r"precision\.compute=auto: bf16, as this run began with it\nprecision\.compute=bf16: "):
        make_plan(asked, T4, 1, kept={"precision.compute": "bf16"})
    both = make_plan(config_of(**ON_A10 | {"precision__compute": Compute.auto}, model__known_as="qwen2.5-1.5b", engine__zero=AUTO), A10S, 4)
    assert [note.partition("=auto: ")[0] for note in both.notes[:2]] == ["precision.compute", "engine.zero"]


def test_every_second_layer_recomputed_is_between_none_and_all_in_int8_too() -> None:
    settings: dict[str, Any] = {"model__known_as": "smollm2-135m", "hardware__card": "cpu", "hardware__peak": "1e12", "method__base": Base.int8}
    settings |= {"engine__kind": EngineKind.accelerate, "precision__int8": Int8.dynamic}
    none, second, every = (
        make_plan(config_of(**settings, engine__checkpointing=bool(n), engine__checkpoint_every=max(1, n)), HERE, 1) for n in (0, 2, 1)
    )
    assert second.time["matmul"] == pytest.approx((none.time["matmul"] + every.time["matmul"]) / 2, rel=0.01)


def test_one_setting_is_left_to_the_plan_and_the_others_stay() -> None:
    stay = {"zero": 2, "offload": True, "checkpointing": True, "checkpoint_every": 3, "fsdp": False}
    asked: dict[str, Any] = {f"engine__{name}": value for name, value in stay.items()} | {**ON_A10, "model__known_as": "qwen2.5-1.5b"}
    for name in ("zero", "offload", "checkpointing"):
        config = config_of(**asked | {f"engine__{name}": AUTO})
        chosen = make_plan(config, A10S, 4)
        others = {other: value for other, value in stay.items() if not other.startswith(name[:5])}
        assert {other: getattr(chosen.config.engine, other) for other in others} == others, "check... goes with checkpointing"
        assert chosen.notes[0].startswith(f"engine.{name}=auto: DeepSpeed ZeRO ")
        assert chosen.step_s <= make_plan(config_of(**asked), A10S, 4).step_s
        assert chosen.run_id == run_id(config) != run_id(config_of(**asked))
    assert make_plan(config_of(**asked | {"engine__offload": AUTO}), A10S, 4).config.engine.offload is False
    recomputed = list(engine_choices(config_of(**asked | {"engine__checkpointing": AUTO}), 4, ["engine.checkpointing"]))
    assert [(one["engine.checkpointing"], one["engine.checkpoint_every"]) for one in recomputed] == [(False, 1), (True, 3), (True, 1)]
    assert {(one["engine.zero"], one["engine.offload"]) for one in recomputed} == {(2, True)}
    (line,) = refused(config_of(**asked | {"engine__checkpointing": AUTO, "engine__checkpoint_every": -3}), A10S, 4)
    assert line.startswith("engine.checkpoint_every=-3: must be at least 1")
    # Of the other engine: its default.
    one = config_of(engine__kind=EngineKind.accelerate, engine__zero=AUTO, engine__offload=AUTO, engine__checkpointing=AUTO)
    assert make_plan(one, HERE, 1).config.engine == replace(one.engine, zero=2, offload=False, checkpointing=False)


def test_what_does_not_fit_is_not_chosen() -> None:
    config = config_of(**ON_A10, model__known_as="qwen2.5-3b", method__kind=FULL, engine__fit=True)
    chosen = make_plan(config, A10S, 4)
    assert chosen.config.engine.zero >= 2
    assert chosen.memory_gib <= 22
    (line,) = refused(config_of(**ON_A10, model__known_as="qwen2.5-7b", method__kind=FULL, engine__fit=True), A10S, 1)
    assert "data.max_tokens=" in line


def test_accelerate_is_split_where_whole_weights_do_not_fit() -> None:
    settings: dict[str, Any] = {**ON_A10, "engine__kind": EngineKind.accelerate, "model__known_as": "qwen2.5-3b", "engine__fit": True}
    whole = make_plan(config_of(**settings), A10S, 4)
    assert not whole.config.engine.fsdp
    assert whole.notes[0].startswith("engine.fit: Accelerate is the fastest of 6 that fit"), "DDP and FSDP2, with no, every second and every layer recomputed"
    split = make_plan(config_of(**settings, method__kind=FULL), A10S, 4)
    assert split.config.engine.fsdp
    assert split.notes[0].startswith("engine.fit: FSDP2")
    assert split.memory_gib <= 22
    # A run that has begun goes on with its own, whatever is fastest now (after running out of memory, or on another card): so its checkpoints fit.
    again = make_plan(config_of(**settings), A10S, 4, kept={"engine.fsdp": True, "engine.offload": False})
    assert again.config.engine.fsdp
    assert again.notes[0].startswith("engine.fit: FSDP2 is the fastest of 3 that fit"), "recomputation is still chosen"
    assert again.run_id == whole.run_id
    # What cannot be in pieces, and what has nobody to share them with, stays whole whatever was set.
    for world, changes in ((4, {"method__base": Base.nf4}), (4, {"optim__name": OptimizerKind.adamw_8bit}), (1, {"engine__fsdp": True})):
        choices = list(engine_choices(config_of(**settings, **changes), world))
        assert choices
        assert not any(choice["engine.fsdp"] for choice in choices), changes
    # What was set for the other engine is left to the plan as well.
    split_too = make_plan(config_of(**settings | {"engine__kind": EngineKind.deepspeed, "engine__fsdp": True}), A10S, 4)
    assert split_too.config.engine.fsdp is False
    assert make_plan(config_of(**settings, engine__offload=True), A10S, 4).config.engine.offload is False
    # What its checkpoints are of cannot be with one rank: none is chosen in its place, and so the record of it stays.
    with pytest.raises(PlanError, match=r"^engine\.fit: this run began with engine\.fsdp=true, which 1 ranks cannot have — start as many ranks"):
        make_plan(config_of(**settings), A10S, 1, kept={"engine.fsdp": True})
    # The thriftiest that is refused is FSDP2; what helps may be whole weights in four bits.
    large: dict[str, Any] = {**ON_A10, "engine__kind": EngineKind.accelerate, "engine__fit": True, "model__known_as": "qwen2.5-7b"}
    two = Machine("cuda", A10S.device_names[:2], (10.5, 10.5), 16, 128.0, "some CPU")
    (line,) = refused(config_of(**large, data__max_tokens=256), two, 2)
    assert "engine.fsdp=false method.base=nf4" in line
    table = plan_text(config_of(**settings, hardware__count=4), A10S, ranks=4, table=True)
    assert [line.split()[1] for line in table.splitlines()[2:4]] == ["DDP", "FSDP2"]
    assert not any("nf4" in line and "FSDP2" in line for line in table.splitlines())


def test_dropout_under_dora_is_told_what_it_costs_on_nf4() -> None:
    settings: dict[str, Any] = {**ON_A10, "model__known_as": "qwen2.5-1.5b", "method__base": Base.nf4, "method__dora": True}
    plain, dropped = (make_plan(config_of(**settings, method__dropout=share), A10S, 4) for share in (0.0, 0.05))
    assert not any("dropout" in note for note in plain.notes)
    (note,) = (note for note in dropped.notes if "dropout" in note)
    kept = float(note.split(" GiB of ")[0].split()[-1])
    weights = dropped.shape.matmul_weights_per_layer * dropped.shape.layers
    assert kept == pytest.approx(weights * 2 / 2**30, rel=0.05), "in bf16"
    assert note.endswith("type method.dropout=0")


def test_a_model_that_is_quantised_already_is_refused_by_the_plan(tmp_path: Path) -> None:
    """Before a submission too, which reads nothing of the model but this file."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}))
    (line,) = refused(config_of(model__path=str(tmp_path)), A10S, 4)
    assert line.startswith(f"model.path={tmp_path}: its weights are quantised already (gptq) — type model.path= ")


def test_what_fits_is_a_table() -> None:
    config = config_of(hardware__card="t4", precision__compute=Compute.fp16, model__known_as="qwen2.5-7b")
    start = perf_counter()
    text = plan_text(config, HERE, table=True)
    assert perf_counter() - start < 2
    lines = text.splitlines()
    assert lines[0].startswith("What fits on 1 x Tesla T4: qwen2.5-7b in fp16")
    assert lines[1].split()[:4] == ["method", "engine", "512", "1,024"]
    assert len(lines) == 3 + 6 * 2
    assert set(lines[2].split()[3:]) == {"—"}, "7B in full is no matter for a T4"
    nf4 = next(line for line in lines if line.startswith("LoRA on nf4   ZeRO 0"))
    assert "/s" in nf4
    found = list(fits(config, planned_machine(config, HERE), 1))
    assert all(fit.plan is None or fit.plan.memory_gib <= 14.56 for fit in found)
    with pytest.raises(PlanError, match="no known shape"):
        plan_text(config_of(model__known_as="gpt-2"), HERE, table=True)
    assert "ZeRO 3, offload" in plan_text(config_of(**ON_A10, model__known_as="qwen2.5-1.5b"), A10S, table=True)


def test_a_card_that_is_not_here_can_be_planned_for() -> None:
    config = config_of(**ON_A10, model__known_as="qwen2.5-1.5b", hardware__count=2)
    text = plan_text(config, HERE)
    assert text.startswith("note     planned for 2 x a10, which is not here")
    assert "x 2 ranks" in text
    assert planned_machine(config, A10S) is A10S
    assert "planned for" not in plan_text(config_of(), HERE)


def test_the_whole_command_takes_less_than_two_seconds() -> None:
    code = (
        "from tunesmith.compose import compose\nfrom tunesmith.hardware import this_machine\nfrom tunesmith.plan.table import plan_text\n"
        "import sys\nprint(plan_text(compose(['+exp=qlora_t4']), this_machine()))\nassert 'torch' not in sys.modules"
    )
    start = perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert perf_counter() - start < 2
    assert "of 14.6 GiB a rank" in done.stdout


def test_ranks_on_several_machines_wait_for_the_network() -> None:
    """The slowest link paces a ring: 8 + 8 ranks over 25 Gbit/s wait longer than 16 in one machine, over 1,000 Gbit/s only for hops."""
    config = config_of(**ON_A10, train__conversations_per_step=64)
    machine = replace(A10S, device_names=A10S.device_names[:1] * 16, memory_gib=A10S.memory_gib[:1] * 16)
    one, two = make_plan(config, machine, 16), make_plan(config, machine, 16, local_size=8)
    assert (one.nodes, two.nodes, one.sent) == (1, 2, two.sent)
    assert two.time["communication"] == pytest.approx(two.sent / (25e9 / 8 * 0.75), rel=0.1)
    assert one.time["communication"] == two.sent / (31.5e9 * 0.75)
    fast = make_plan(changed(config, {"hardware.network_gbit_per_s": 1000.0}), machine, 16, local_size=8)
    assert one.time["communication"] < fast.time["communication"] < two.time["communication"]
    assert "nodes    2 x 8 ranks, network 25 Gbit/s assumed" in describe(two) and "nodes " not in describe(one)
    assert fast.run_id == two.run_id


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight", "of_the_head"),
    [
        ({"precision__matmul": Matmul.high}, 8, 8),
        ({"method__base": Base.int8, "precision__int8": Int8.dynamic}, 2, 0),
        ({"method__base": Base.int8, "precision__int8": Int8.dynamic, "precision__matmul": Matmul.high}, 2, 8),
        ({}, 0, 0),
        ({"precision__matmul": Matmul.high, "method__dropout": 0.1}, 0, 8),
        ({"precision__matmul": Matmul.high, "method__kind": MethodKind.full}, 0, 0),
    ],
    ids=["high", "int8", "int8 and high", "highest", "dropout", "full"],
)
def test_frozen_weights_are_kept_in_tiles_where_there_are_some_and_room(
    changes: dict[str, Any], bytes_a_weight: int, of_the_head: int
) -> None:
    config = config_of(**changes, model__known_as="smollm2-135m", hardware__card="cpu", engine__kind=EngineKind.accelerate)
    without, there = (make_plan(config, replace(HERE, amx=amx), 1) for amx in (False, True))
    shape = there.shape
    wanted = bytes_a_weight * shape.layers * shape.matmul_weights_per_layer + of_the_head * shape.vocab * shape.hidden
    assert (there.memory["weights"] - without.memory["weights"]) * 2**30 == pytest.approx(wanted, rel=1e-6)
    assert there.tiles == (wanted > 0) and not without.tiles
    short = make_plan(config, replace(HERE, amx=True, ram_gib=without.memory_gib / 0.9), 1)
    assert not short.tiles and short.memory_gib <= without.memory_gib
    assert not make_plan(config, replace(HERE, amx=True), 1, micro_limit=1).tiles, "after running out of memory"


def test_fp32_matrices_multiplied_at_high_precision_divide_by_tf32s_peak_where_a_card_has_it() -> None:
    settings: dict[str, Any] = {"precision__matmul": Matmul.high, "model__known_as": "qwen2.5-1.5b"}
    on_a10 = make_plan(config_of(**settings, hardware__card="a10"), A10S, 1)
    exact = make_plan(config_of(**settings | {"precision__matmul": Matmul.highest}, hardware__card="a10"), A10S, 1)
    assert (on_a10.peak_flops, exact.peak_flops) == (CARDS["a10"].peak["tf32"], CARDS["a10"].peak["fp32"])
    assert "fp32 (matmul high)" in describe(on_a10) and "matmul high" not in describe(exact)
    assert on_a10.step_s < exact.step_s
    assert on_a10.run_id != exact.run_id, "the numbers differ"
    on_t4 = make_plan(config_of(**settings, hardware__card="t4"), T4, 1)
    assert on_t4.peak_flops == CARDS["t4"].peak["fp32"], "it has no TF32"
    (note,) = (note for note in make_plan(config_of(**settings, **ON_A10), A10S, 1).notes if "matmul" in note)
    assert note == "precision.matmul=high: precision.compute=bf16 multiplies no fp32 matrices"
