"""How good a model is on held-out conversations: loss and perplexity, and what it answers when asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tunesmith.config import Eval
from tunesmith.data import Call, Dataset, Question
from tunesmith.data.batches import held_out_batches
from tunesmith.data.beginning import common_beginning
from tunesmith.data.examples import Examples
from tunesmith.data.templates import Renderer, parse_call
from tunesmith.engine import Engine
from tunesmith.loop import held_out
from tunesmith.metrics.uncertainty import Interval, f1_interval, wilson
from tunesmith.model import Beginning, continue_all, is_prompt_learning, new_tokens, read_beginning

LEAST_READ = 64
"""Fewest tokens that are read once for all prompts: below it, rows of whole prompts cost less than a forward more."""

_BASELINES: WeakKeyDictionary[Examples, dict[str, float]] = WeakKeyDictionary()
"""By training examples, which each data set has for itself: the numbers before and after are the same."""


def evaluate(engine: Engine, dataset: Dataset, settings: Eval, micro_batch: int) -> dict[str, Any]:
    """Losses on dev and test, what an n-gram model reaches there, and the quality of generated answers, equal on all ranks.

    The answers are under "answers", 95 % intervals of what they score under "intervals".
    """
    start = time.perf_counter()
    found: dict[str, Any] = {}
    simple: dict[str, float] = engine.broadcast(baseline(dataset) if engine.world.is_main else {})
    for name in ("dev", "test"):
        if examples := getattr(dataset, name):
            batches = held_out_batches(examples, micro_batch, engine.world.rank, engine.world.size)
            found |= held_out(engine, batches, name)
            found |= {key: value for key, value in simple.items() if key.startswith(f"{name}/")}
    questions = dataset.questions[: settings.conversations or None]
    if questions:
        answers, shared = answer(engine, questions, dataset.renderer, settings)
        judged = [judge(*pair) for pair in zip(questions, answers, strict=True)]
        found |= scores(judged)
        found["intervals"] = intervals(judged)
        found["answers"] = answers
        found["shared_prompt_tokens"] = shared
    found["conversations"] = len(questions)
    found["seconds"] = time.perf_counter() - start
    return found


def baseline(dataset: Dataset) -> dict[str, float]:
    """Perplexities of a 3-gram model of the training targets: a model that does not beat it has not learned more than phrases."""
    parts = {"dev/ngram_perplexity": dataset.dev, "test/ngram_perplexity": dataset.test}
    asked = {name: examples for name, examples in parts.items() if examples}
    if asked and dataset.train not in _BASELINES:
        from tunesmith.data.ngram import fit, vocabulary_size

        model = fit(dataset.train, vocabulary_size(dataset.renderer.tokenizer))
        _BASELINES[dataset.train] = {name: model.perplexity(examples) for name, examples in asked.items()}
    return _BASELINES.get(dataset.train, {})


@torch.no_grad()
def answer(engine: Engine, questions: Sequence[Question], renderer: Renderer, settings: Eval) -> tuple[list[str], int]:
    """Greedy answers in question order, shared out over the ranks in equally many calls (split weights need all of them).

    What all prompts begin with is read once; how many tokens those are is said too, 0 where each prompt is read whole.
    """
    world = engine.world
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    size = settings.batch
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    mine: dict[int, str] = {}
    with engine.for_generation() as model:
        beginning = engine.loss_module.beginning or _shared_beginning(engine, model, questions)
        for first in range(0, len(parts), world.size):
            index = first + world.rank
            part = parts[min(index, len(parts) - 1)]
            prompts = [questions[i].prompt for i in part]
            if beginning:
                prompts = [prompt[len(beginning.ids) :] for prompt in prompts]
                said = continue_all(model, beginning, prompts, renderer.stop_ids, settings.max_new_tokens)
                texts = [_text(tokens, renderer) for tokens in said]
            else:
                texts = generate(model, prompts, renderer, settings.max_new_tokens, engine.splits_weights)
            mine.update(zip(part, texts, strict=True))
    everyone = {number: text for some in engine.gather(mine) for number, text in some.items()}
    return [everyone[number] for number in range(len(questions))], len(beginning.ids) if beginning else 0


def _shared_beginning(engine: Engine, model: Any, questions: Sequence[Question]) -> Beginning | None:
    """What all prompts begin with, read once by the model as it is; None where that is too short to be worth it, or cannot be shared:
    with split weights all ranks must take equally many steps, and virtual tokens are PEFT's own way."""
    if engine.splits_weights or is_prompt_learning(engine.model):
        return None
    shortest = min(len(question.prompt) for question in questions)
    ids = common_beginning(question.prompt for question in questions)[: shortest - 1]  # each goes on by a token at least
    return read_beginning(model, ids) if len(ids) >= LEAST_READ else None


def generate(model: Any, prompts: Sequence[list[int]], renderer: Renderer, max_new_tokens: int, synced: bool = False) -> list[str]:
    """Greedy continuations of prompts (token ids, padded on the left here), up to a stop token, without it."""
    longest = max(map(len, prompts))
    stop = list(renderer.stop_ids)
    device = next(model.parameters()).device
    ids = torch.tensor([[stop[0]] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    out = new_tokens(
        model,
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0],
        synced_gpus=synced,
    )
    texts = []
    for row in out.tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        texts.append(_text(row[:end], renderer))
    return texts


def _text(tokens: list[int], renderer: Renderer) -> str:
    return renderer.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Judged:
    """One answer held against what was wanted."""

    exact: bool
    intent: bool | None
    """Whether it calls the wanted function; None where no call was wanted."""
    slots: tuple[int, int, int]
    """Found, given and wanted parameters."""


def judge(question: Question, text: str) -> Judged:
    """A slot counts as found if name and value agree (values compared as text, ignoring case). An answer that is no call has
    no intent and no slots."""
    gold = question.answer.call
    if gold is None:
        return Judged(text.strip() == question.answer.content.strip(), None, (0, 0, 0))
    said = parse_call(text) or Call("", {})
    gold_slots, said_slots = slots(gold), slots(said)
    intent = said.name == gold.name
    return Judged(intent and said_slots == gold_slots, intent, (len(gold_slots & said_slots), len(said_slots), len(gold_slots)))


def scores(judged: Sequence[Judged]) -> dict[str, float]:
    """Intent accuracy, micro slot F1 and exact match where calls are wanted; exact match of the text elsewhere."""
    means = {"test/exact_match": sum(one.exact for one in judged) / len(judged)}
    if intents := [one.intent for one in judged if one.intent is not None]:
        found, given, wanted = (sum(one.slots[part] for one in judged) for part in range(3))
        means["test/intent_accuracy"] = sum(intents) / len(intents)
        means["test/slot_f1"] = 2 * found / max(1, given + wanted)
    return means


def intervals(judged: Sequence[Judged]) -> dict[str, Interval]:
    """95 % intervals of the scores, as if the questions were drawn from all that could be asked; training adds noise of its own."""
    found = {"test/exact_match": wilson(sum(one.exact for one in judged) / len(judged), len(judged))}
    if calls := [one for one in judged if one.intent is not None]:
        found["test/intent_accuracy"] = wilson(sum(bool(one.intent) for one in calls) / len(calls), len(calls))
        found["test/slot_f1"] = f1_interval([one.slots for one in calls])
    return found


def slots(call: Call) -> set[tuple[str, str]]:
    """The call's parameters as comparable (name, value) pairs."""
    return {(name, " ".join(str(value).lower().split())) for name, value in call.parameters.items()}


def side_by_side(dataset: Dataset, before: Mapping[str, Any], after: Mapping[str, Any], count: int) -> list[dict[str, str]]:
    """Answers before and after beside what is wanted, for people, spread evenly over the test set."""
    known = [len(answers["answers"]) for answers in (before, after) if "answers" in answers]
    asked = min(known, default=0)  # eval.conversations may have changed between two starts of a run
    rows = []
    for number in range(0, asked, max(1, asked // max(1, count)))[:count]:
        question = dataset.questions[number]
        wanted = question.answer
        rows.append(
            {
                "prompt": question.text,
                "reference": dataset.renderer.call_text(wanted.call) if wanted.call else wanted.content,
                "before": before["answers"][number] if "answers" in before else "",
                "after": after["answers"][number] if "answers" in after else "",
            }
        )
    return rows
