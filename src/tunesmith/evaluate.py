"""How good a model is on held-out conversations: loss and perplexity, and what it answers when asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tunesmith.config import Eval
from tunesmith.data import Call, Dataset, Question
from tunesmith.data.batches import held_out_batches
from tunesmith.data.examples import Examples
from tunesmith.data.templates import Renderer, parse_call
from tunesmith.engine import Engine
from tunesmith.loop import held_out
from tunesmith.model import new_tokens

_BASELINES: WeakKeyDictionary[Examples, dict[str, float]] = WeakKeyDictionary()
"""By training examples, which each data set has for itself: the numbers before and after are the same."""


def evaluate(engine: Engine, dataset: Dataset, settings: Eval, micro_batch: int) -> dict[str, Any]:
    """Losses on dev and test, what an n-gram model reaches there, and the quality of generated answers, equal on all ranks.

    The answers are under "answers".
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
        answers = answer(engine, questions, dataset.renderer, settings)
        found |= score(questions, answers)
        found["answers"] = answers
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
def answer(engine: Engine, questions: Sequence[Question], renderer: Renderer, settings: Eval) -> list[str]:
    """Greedy answers in question order, shared out over the ranks in equally many calls (split weights need all of them)."""
    world = engine.world
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    size = settings.batch
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    mine: dict[int, str] = {}
    with engine.for_generation() as model:
        for first in range(0, len(parts), world.size):
            index = first + world.rank
            part = parts[min(index, len(parts) - 1)]
            texts = generate(model, [questions[i].prompt for i in part], renderer, settings.max_new_tokens, engine.splits_weights)
            mine.update(zip(part, texts, strict=True))
    everyone = {number: text for some in engine.gather(mine) for number, text in some.items()}
    return [everyone[number] for number in range(len(questions))]


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
        texts.append(renderer.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return texts


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Intent accuracy, micro slot F1 and exact match where calls are wanted; exact match of the text elsewhere.

    A slot counts as found if name and value agree (values compared as text, ignoring case). An answer that is no call has
    no intent and no slots.
    """
    intents = exact = 0
    true_positive = predicted = wanted = 0
    calls = 0
    for question, text in zip(questions, answers, strict=True):
        gold = question.answer.call
        if gold is None:
            exact += text.strip() == question.answer.content.strip()
            continue
        calls += 1
        said = parse_call(text) or Call("", {})
        gold_slots, said_slots = slots(gold), slots(said)
        intents += said.name == gold.name
        exact += said.name == gold.name and said_slots == gold_slots
        true_positive += len(gold_slots & said_slots)
        predicted += len(said_slots)
        wanted += len(gold_slots)
    scores = {"test/exact_match": exact / len(questions)}
    if calls:
        scores["test/intent_accuracy"] = intents / calls
        scores["test/slot_f1"] = 2 * true_positive / max(1, predicted + wanted)
    return scores


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
