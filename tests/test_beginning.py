"""What conversations begin with, read once: in evaluation, and under method.alora in training too. Against plain generate() and PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.test_model import config_for
from tunesmith.config import Batching, Refusal
from tunesmith.data.beginning import Behind, before_first_question, common_beginning
from tunesmith.data.examples import Example, ListedExamples
from tunesmith.data.layout import lay_out
from tunesmith.model import TargetLoss, act_from, build_model, continue_all, for_generation, new_tokens, read_beginning, save_model
from tunesmith.model.export import export

CPU = torch.device("cpu")
HEADER = (1, 90, 91)
"""Opens a user's turn in the conversations below."""


def conversations(count: int, tokens: int = 70) -> list[Example]:
    """Equal tools, then one question each, of which four of six begin alike; the answer is learned."""
    draw = np.random.default_rng(3)
    tools = draw.integers(100, 390, tokens).tolist()
    alike = draw.integers(100, 390, 20).tolist()
    made = []
    for number in range(count):
        question = [*alike[: 20 * (number % 3 > 0)], *draw.integers(100, 390, int(draw.integers(2, 12))).tolist()]
        ids = [*tools, *HEADER, *question, 2, *draw.integers(100, 390, 5).tolist()]
        made.append(Example(np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - 5, f"made:{number}"))
    return made


def stirred(folder: Path, std: float) -> TargetLoss:
    """A model whose adapters do something."""
    module = build_model(config_for(folder, r=4, alpha=8.0), folder, CPU)
    torch.manual_seed(5)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return module


def test_answers_behind_one_reading_are_those_of_generate(tiny_model: Path) -> None:
    """Prompts of different lengths, of which some end early and are taken out."""
    module = stirred(tiny_model, 2.0)  # enough to make a random model say different things
    prompts = [example.ids[:-5].tolist() for example in conversations(9)]
    common = common_beginning(prompts)
    assert len(common) >= 70
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with for_generation(module.model) as model:
        free = new_tokens(model, ids, mask, max_new_tokens=12, do_sample=False, eos_token_id=[399], pad_token_id=0).tolist()
        # Of all tokens the one at which answers end at the most different places.
        stop = [max(range(400), key=lambda token: len({row.index(token) if token in row else 12 for row in free}))]
        plain = new_tokens(model, ids, mask, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=stop[0]).tolist()
        beginning = read_beginning(model, common)
        ours = continue_all(model, beginning, [prompt[len(common) :] for prompt in prompts], stop, 12)
    wanted = [row[: next((at for at, token in enumerate(row) if token in stop), len(row))] for row in plain]
    assert ours == wanted
    assert len({len(answer) for answer in ours}) > 2, "all end together: nothing was taken out"
    assert module.model.get_base_model().config._attn_implementation == "tunesmith_ragged", "training goes on as before"


def test_alora_is_pefts(tiny_model: Path, tmp_path: Path) -> None:
    """Loss and every gradient, of adapters that act from the user's turn on, as PEFT computes them with the whole prompt."""
    module, examples = stirred(tiny_model, 0.2), conversations(6)
    tokens = len(before_first_question([ListedExamples(examples)], HEADER))
    assert tokens == 70
    with for_generation(module.model) as model, model.disable_adapter():
        module.beginning = read_beginning(model, examples[0].ids[:tokens].tolist())
    behind = Behind(ListedExamples(examples), tokens)
    batch = lay_out(list(behind), Batching.ragged)
    assert max(segment.context_length for segment in batch.segments) >= 16, "no beginning shared behind the beginning"
    assert batch.target_count == sum(example.target_count for example in examples) == int(behind.target_counts.sum())
    loss = module(batch)
    loss.backward()

    act_from(module.model, HEADER)
    save_model(module.model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    weights = {name: weight for name, weight in peft.named_parameters() if weight.requires_grad}
    trained = {name: weight for name, weight in module.model.named_parameters() if weight.requires_grad}
    assert trained.keys() == weights.keys()
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        logits = peft(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = torch.where(torch.from_numpy(example.targets[1:]), ids[0, 1:], -100)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for name, weight in weights.items():
        assert float((trained[name].grad - weight.grad).norm() / weight.grad.norm()) < 1e-4, name
    with pytest.raises(Refusal, match=r"acts from the user's turn on \(method.alora\), which no weight can"):
        export(tmp_path / "adapter", config_for(tiny_model).model, tmp_path / "merged", original=False)


def test_conversations_that_alora_cannot_read_once_are_refused() -> None:
    examples = conversations(3)
    with pytest.raises(Refusal, match=r"^method.alora=true: the conversations begin with 7\d tokens in common, which are no tools"):
        before_first_question([ListedExamples(examples)], (1, 90, 92))
    other = Example(examples[0].ids[::-1].copy(), examples[0].targets, "other:1")
    with pytest.raises(Refusal, match="begin with 0 tokens in common"):
        before_first_question([ListedExamples(examples), ListedExamples([other])], HEADER)
    twice = Example(np.concatenate([examples[0].ids, HEADER, examples[0].ids[-5:]]).astype(np.int32), np.ones(0, bool), "twice:1")
    two = [ListedExamples([*examples, twice])]
    with pytest.raises(Refusal, match=r"^method.alora=true: twice:1 has 2 user turns"):
        before_first_question(two, HEADER)
