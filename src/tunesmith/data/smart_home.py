"""Make the smart-home data set: typed requests, each with the one function call that answers it.

The sentences are sampled from the hand-written templates of the package home-assistant-intents, which hassil parses;
the names of rooms, devices and so on come from `smart_home_words`. Dev and test are made of sentence patterns and of
names that training never shows, so their score measures understanding and copying, not recall.

Articles are drawn at random from a template's alternatives, so languages with genders show wrong ones at times
("in die Küche" for "in der Küche"): the templates are written to recognise speech, not to generate it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data import smart_home_words

try:
    import home_assistant_intents
    from hassil.expression import (
        Alternative,
        Expression,
        Group,
        ListReference,
        Permutation,
        RuleReference,
        Sentence,
        TextChunk,
    )
    from hassil.intents import IntentData, Intents, RangeFractionType, RangeSlotList, SlotList, TextSlotList
    from hassil.numbers import get_rbnf_engine
    from hassil.parse_expression import parse_sentence
    from hassil.util import CJK_WHITESPACE, normalize_whitespace
except ImportError as error:
    raise ImportError(
        "data.prepare=smart_home needs the packages home-assistant-intents and hassil: pip install 'tunesmith[demo]'"
    ) from error

SPLITS = ("train", "dev", "test")
"""The splits in the order they are made: where two splits could hold the same text, the earlier one keeps it."""

RECIPE = 1
"""Raised when this module would make other data from the same arguments, so that old folders are made again."""

OPTIONAL_KEPT = 0.35
"""Chance that an optional part of a template is said; people type the short form more often."""

NUMBER_IN_WORDS = 0.15
"""Chance that a whole number is spelled out ("twenty") where the list allows it."""

FRACTION = 0.2
"""Chance of a number between two steps ("21.5") where the list allows it."""

DEV_SHARE, TEST_SHARE = 0.08, 0.15
"""Share of each intent's patterns that dev and test hold out."""

ENUM_LIMIT = 12
"""Most values that a parameter's schema lists as an enum."""

TRIES = 40
"""Draws per wanted conversation before a split is taken to have run dry."""

_PACKAGES = ("hassil", "home-assistant-intents")
_UNSPEAKABLE = (
    re.compile(r"[][(){}<>|]"),  # template markup
    # "light light", "floor floor", "ErdgeschossGeschoss": an optional noun said after a name that already has it.
    re.compile(r"\b(\w+)\s+\1\b|([^\W\d]{4,})[\s-]*\2", re.IGNORECASE),
    re.compile(r"\b[dl]'[bcdfgjklmnpqrstvwxz]", re.IGNORECASE),  # "l'cuisine"
)
# The templates write "l' {area}"; people write "l'entrée".
_ELISION = re.compile(r"\b([cdjlmnst]|qu|un|\w*ll)' (?=\w)", re.IGNORECASE)

Value = str | int | float


@dataclass(frozen=True)
class _Block:
    """What a template says beside its text: the intent data block it stands in, and what it refers to by name."""

    fixed: dict[str, Value]
    domains: tuple[str, ...]
    rules: dict[str, Sentence]
    lists: dict[str, SlotList]


@dataclass(frozen=True)
class _Pattern:
    """One template string of one intent, with every block of the intent that holds it."""

    intent: str
    template: str
    sentence: Sentence
    blocks: tuple[_Block, ...]

    @property
    def key(self) -> str:
        return _key(self.template)


@dataclass(frozen=True)
class _Sample:
    """One request and its call."""

    pattern: _Pattern
    text: str
    parameters: dict[str, Value]

    def conversation(self) -> dict[str, Any]:
        call = {"role": "tool", "name": self.pattern.intent, "parameters": self.parameters}
        return {
            "conversations": [{"role": "user", "content": self.text}, call],
            "metadata": {"pattern": self.pattern.template, "intent": self.pattern.intent},
        }


class _Rejected(Exception):
    """A draw that must not become data."""


def prepare(
    folder: Path, *, language: str = "en", train: int = 4000, dev: int = 300, test: int = 400, seed: int = 0
) -> dict[str, Any]:
    """Write train.json, dev.json and test.json of at most so many conversations, and return prepared.json's content.

    prepared.json is written last and says what was made; where it is there and was made from the same arguments,
    package versions and recipe, nothing is done. A split that runs dry is smaller than asked for, as `counts` tells.
    Raises ValueError for a language that the package lacks and for a negative size.
    """
    sizes = {"train": train, "dev": dev, "test": test}
    if min(sizes.values()) < 0:
        raise ValueError(f"sizes of the splits must not be negative, not {sizes}")
    languages = sorted(home_assistant_intents.get_languages())
    if language not in languages:
        raise ValueError(
            f"no intents for the language {language!r}; there are {len(languages)}: {', '.join(languages)}"
        )

    made_from = {
        "language": language,
        "sizes": sizes,
        "seed": seed,
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "recipe": RECIPE,
    }
    mark = folder / "prepared.json"
    done = _read(mark)
    if done.items() >= made_from.items() and all((folder / f"{split}.json").is_file() for split in SPLITS):
        return done
    mark.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)

    intents = Intents.from_dict(home_assistant_intents.get_intents(language) or {})
    names_language = language if language in smart_home_words.WORDS else "en"
    patterns = _patterns(intents, smart_home_words.names(names_language, held_out=False).keys())
    splits = _split(patterns, f"{language}/{seed}")
    samples, dropped = _sample_all(splits, sizes, intents, names_language, f"{language}/{seed}")
    tools = json.dumps(_tools(patterns), ensure_ascii=False)
    sha256 = {split: _write(folder / f"{split}.json", _lines(samples[split], tools)) for split in SPLITS}
    prepared = {
        **made_from,
        "names_language": names_language,
        "counts": {split: len(samples[split]) for split in SPLITS},
        "patterns": {split: len(splits[split]) for split in SPLITS},
        "intents": {split: len({pattern.intent for pattern in splits[split]}) for split in SPLITS},
        "dropped": dropped,
        "sha256": sha256,
    }
    _write(mark, [json.dumps(prepared, ensure_ascii=False, indent=2)])
    return prepared


# The templates


def _patterns(intents: Intents, kinds: Iterable[str]) -> list[_Pattern]:
    """Return every pattern whose lists can all be filled, from the package or from our names of these kinds."""
    known = set(kinds)
    found: dict[tuple[str, str], _Pattern] = {}
    for name, intent in sorted(intents.intents.items()):
        for data in intent.data:
            block = _block(data, intents, known)
            for template in data.sentence_texts:
                sentence = parse_sentence(template)
                references = _group(sentence).list_references(block.rules)
                if not all(_fillable(reference.list_name, block, known) for reference in references):
                    continue
                twin = found.get((name, _key(template)))
                blocks = (*twin.blocks, block) if twin else (block,)
                found[name, _key(template)] = _Pattern(name, template, sentence, blocks)
    return list(found.values())


def _block(data: IntentData, intents: Intents, known: set[str]) -> _Block:
    domains = data.requires_context.get("domain", [])
    return _Block(
        fixed=dict(data.slots),
        domains=tuple(sorted(known.intersection([domains] if isinstance(domains, str) else domains))),
        rules={**intents.expansion_rules, **data.expansion_rules},
        lists={
            name: slot_list
            for name, slot_list in {**intents.slot_lists, **data.slot_lists}.items()
            if isinstance(slot_list, TextSlotList | RangeSlotList)  # a wildcard is filled by our names
        },
    )


def _fillable(list_name: str, block: _Block, known: set[str]) -> bool:
    return list_name in block.lists or (bool(block.domains) if list_name == "name" else list_name in known)


def _split(patterns: list[_Pattern], seed: str) -> dict[str, list[_Pattern]]:
    """Deal each intent's patterns to the splits; a template that two intents share is only ever trained on."""
    shared = Counter(pattern.key for pattern in patterns)
    by_intent = _by_intent(patterns)
    splits: dict[str, list[_Pattern]] = {split: [] for split in SPLITS}
    for intent, mine in by_intent.items():
        own = [pattern for pattern in mine if shared[pattern.key] == 1]
        random.Random(f"smart_home/{seed}/patterns/{intent}").shuffle(own)
        for_test = max(1, round(TEST_SHARE * len(mine))) if len(mine) >= 3 else 0
        for_dev = max(1, round(DEV_SHARE * len(mine))) if len(mine) >= 5 else 0
        splits["test"] += own[:for_test]
        splits["dev"] += own[for_test : for_test + for_dev]
        splits["train"] += own[for_test + for_dev :] + [pattern for pattern in mine if shared[pattern.key] > 1]
    return splits


# The sentences


def _sample_all(
    splits: dict[str, list[_Pattern]], sizes: dict[str, int], intents: Intents, names_language: str, seed: str
) -> tuple[dict[str, list[_Sample]], dict[str, int]]:
    """Fill each split, and count what was left out so that no text is there twice or has two targets."""
    seen: dict[str, tuple[str, _Sample]] = {}  # key of a text -> the split that has it, and what it stands for
    ambiguous: set[str] = set()
    dropped = Counter(dict.fromkeys(("repeated_text", "other_parameters", "two_intents", "unspeakable"), 0))
    glue = intents.settings.ignore_whitespace
    for split in SPLITS:
        names = smart_home_words.names(names_language, held_out=split != "train")
        rng = random.Random(f"smart_home/{seed}/{split}")
        kept = 0
        for _, pattern in zip(range(TRIES * sizes[split]), _draws(splits[split], rng), strict=False):
            if kept == sizes[split]:
                break
            try:
                sample = _realise(pattern, rng, names, intents.language, glue=glue)
            except _Rejected:
                dropped["unspeakable"] += 1
                continue
            key = _key(sample.text)
            if key in ambiguous:
                dropped["two_intents"] += 1
            elif key not in seen:
                seen[key] = (split, sample)
                kept += 1
            elif seen[key][1].pattern.intent != pattern.intent:
                ambiguous.add(key)
                kept -= seen.pop(key)[0] == split
                dropped["two_intents"] += 2
            elif seen[key][1].parameters != sample.parameters:
                dropped["other_parameters"] += 1
            else:
                dropped["repeated_text"] += 1
    samples: dict[str, list[_Sample]] = {split: [] for split in SPLITS}
    for split, sample in seen.values():
        samples[split].append(sample)
    for split in SPLITS:
        random.Random(f"smart_home/{seed}/{split}/order").shuffle(samples[split])
    return samples, dict(dropped)


def _draws(patterns: list[_Pattern], rng: random.Random) -> Iterator[_Pattern]:
    """Yield patterns without end: each intent once, then intents by the square root of how many patterns they have.

    The root keeps an intent of one pattern in sight beside one of two hundred.
    """
    by_intent = _by_intent(patterns)
    if not by_intent:
        return
    for mine in by_intent.values():
        yield rng.choice(mine)
    choices = list(by_intent.values())
    weights = [math.sqrt(len(mine)) for mine in choices]
    while True:
        yield rng.choice(rng.choices(choices, weights)[0])


def _realise(
    pattern: _Pattern, rng: random.Random, names: dict[str, list[str]], language: str, *, glue: bool
) -> _Sample:
    """Say a pattern once; `glue` closes the gaps between characters of scripts that have none."""
    block = rng.choice(pattern.blocks)
    parameters = dict(block.fixed)
    speaker = _Speaker(block, rng, names, language, parameters)
    text = normalize_whitespace(speaker.say(pattern.sentence.expression)).strip()
    text = _ELISION.sub(r"\1'", CJK_WHITESPACE.sub("", text) if glue else text)
    if not text or any(slip.search(text) for slip in _UNSPEAKABLE):
        raise _Rejected
    return _Sample(pattern, text, parameters)


@dataclass(frozen=True)
class _Speaker:
    """Draws one text from a parsed template, and notes in `parameters` what its lists stand for."""

    block: _Block
    rng: random.Random
    names: dict[str, list[str]]
    language: str
    parameters: dict[str, Value]

    def say(self, part: Expression) -> str:
        if isinstance(part, TextChunk):
            return str(part.text)
        if isinstance(part, RuleReference):
            return self.say(self.block.rules[part.rule_name].expression)
        if isinstance(part, ListReference):
            return self._fill(part)
        assert isinstance(part, Group)
        if isinstance(part, Alternative):
            if not part.is_optional:
                return self.say(self.rng.choice(part.items))
            # hassil ends the items of an optional with the empty text.
            return self.say(self.rng.choice(part.items[:-1])) if self.rng.random() < OPTIONAL_KEPT else ""
        items = self.rng.sample(part.items, len(part.items)) if isinstance(part, Permutation) else part.items
        return "".join([self.say(item) for item in items])

    def _fill(self, reference: ListReference) -> str:
        text, value = self._draw(reference.list_name)
        if self.parameters.setdefault(reference.slot_name, value) != value:
            raise _Rejected  # one parameter cannot hold two values
        return text

    def _draw(self, list_name: str) -> tuple[str, Value]:
        slot_list = self.block.lists.get(list_name)
        if isinstance(slot_list, RangeSlotList):
            return self._number(slot_list)
        if isinstance(slot_list, TextSlotList):
            entry = self.rng.choice(slot_list.values)
            text = normalize_whitespace(self.say(entry.text_in)).strip()
            value = text if entry.value_out is None else entry.value_out
            if not isinstance(value, Value):
                raise _Rejected  # French has one word for two device classes
            return text, value
        kind = self.rng.choice(self.block.domains) if list_name == "name" else list_name
        name = self.rng.choice(self.names[kind])
        return name, name

    def _number(self, numbers: RangeSlotList) -> tuple[str, Value]:
        number: float = self.rng.randrange(numbers.start, numbers.stop + 1, numbers.step)
        fractions = RangeFractionType.get_fractions(numbers.fraction_type)
        if fractions and number < numbers.stop and self.rng.random() < FRACTION:
            number += self.rng.choice(fractions)
        text = str(number)
        in_words = numbers.words and (self.rng.random() < NUMBER_IN_WORDS or not numbers.digits)
        if in_words and number == int(number):
            with contextlib.suppress(ValueError):  # no number words for this language: digits it is
                text = get_rbnf_engine(numbers.words_language or self.language).format_number(int(number)).text
        value = number * (1 if numbers.multiplier is None else numbers.multiplier)
        return text, int(value) if value == int(value) else value


# The functions


def _tools(patterns: list[_Pattern]) -> list[dict[str, Any]]:
    """Return each intent as a function schema, its parameters derived from what its patterns can yield."""
    return [
        {
            "name": intent,
            "description": _description(intent),
            "parameters": {"type": "object", "properties": _properties(mine), "required": []},
        }
        for intent, mine in _by_intent(patterns).items()
    ]


def _description(intent: str) -> str:
    """Return an intent's name as words: HassTurnOn -> Turn on."""
    return " ".join(re.findall("[A-Z][a-z]*", intent.removeprefix("Hass"))).capitalize()


def _properties(patterns: list[_Pattern]) -> dict[str, Any]:
    """Return the schema of each parameter; where some values are words and some numbers its type names both."""
    values: dict[str, set[Value]] = defaultdict(set)
    types: dict[str, set[str]] = defaultdict(set)
    open_ended: set[str] = set()
    for pattern in patterns:
        for block in pattern.blocks:
            sources: list[tuple[str, Iterable[Value] | None, type]] = [
                (slot, [value], type(value)) for slot, value in block.fixed.items()
            ]
            for reference in _group(pattern.sentence).list_references(block.rules):
                slot_list = block.lists.get(reference.list_name)
                if isinstance(slot_list, TextSlotList):
                    outs = [entry.value_out for entry in slot_list.values if isinstance(entry.value_out, Value)]
                    sources += [(reference.slot_name, [out], type(out)) for out in outs]
                else:
                    sources.append((reference.slot_name, None, int if isinstance(slot_list, RangeSlotList) else str))
            for slot, closed, kind in sources:
                types[slot].add("string" if kind is str else "number")
                values[slot].update(closed or ())
                open_ended.update([slot] if closed is None else ())
    properties: dict[str, Any] = {}
    for slot in sorted(types):
        kinds = sorted(types[slot], reverse=True)
        properties[slot] = {"type": kinds[0] if len(kinds) == 1 else kinds}
        if slot not in open_ended and len(kinds) == 1 and len(values[slot]) <= ENUM_LIMIT:
            properties[slot]["enum"] = sorted(values[slot], key=lambda value: (isinstance(value, str), value))
    return properties


# Small things


def _key(text: str) -> str:
    """Return what makes two texts the same: case and spacing do not tell them apart."""
    return str(normalize_whitespace(text)).strip().casefold()


def _group(sentence: Sentence) -> Group:
    assert isinstance(sentence.expression, Group)  # hassil always wraps a sentence
    return sentence.expression


def _by_intent(patterns: Iterable[_Pattern]) -> dict[str, list[_Pattern]]:
    by_intent: dict[str, list[_Pattern]] = {}
    for pattern in sorted(patterns, key=lambda pattern: (pattern.intent, pattern.key)):
        by_intent.setdefault(pattern.intent, []).append(pattern)
    return by_intent


def _lines(samples: list[_Sample], tools: str) -> Iterator[str]:
    """Yield the lines of a JSON list with one conversation a line; `tools` is the same JSON text in each."""
    yield "["
    for number, sample in enumerate(samples, 1):
        conversation = json.dumps(sample.conversation(), ensure_ascii=False)
        yield f'{{"tools": {tools}, {conversation[1:]}' + ("," if number < len(samples) else "")
    yield "]"


def _write(path: Path, lines: Iterable[str]) -> str:
    """Write lines to a file that is there only when complete, and return the SHA-256 of its content."""
    digest = hashlib.sha256()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            for line in lines:
                data = f"{line}\n".encode()
                digest.update(data)
                file.write(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, or an empty one where the file is missing or not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
