"""The memory of words gives the tokenizer's own tokens, and stands only where it can be proved to."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.conftest import ROOT
from tunesmith.data.tokens import FastTokenizer
from tunesmith.data.words import PATTERNS, Words, splits_at_blanks

LLAMA3, QWEN2 = sorted(PATTERNS, key=lambda pattern: "{1,3}" not in pattern)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "with a prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}


def trained(splitter: pre_tokenizers.PreTokenizer) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = splitter
    made.decoder = decoders.ByteLevel()
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md", "docs/data.md")]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(texts, trainer)
    made.encode_special_tokens = True
    return made


@pytest.fixture(scope="module", params=SPLITTERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(SPLITTERS[request.param])


def encoded(words: Words, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in words.encode_all(texts)]


PARTS = st.sampled_from(
    ["a", "the", "word's", "'s", "I'LL", " ", "  ", "   ", "\n", " \n", "\n ", "\r\n", "\t", "\u00a0", "\u2028", "\x1c", "\x85", "\u3000", "1", "12",
     "2026", ".", "...", "!?", "<|end|>", "é", "e\u0301", "\u0301", "元", "天气", "🙂", "\u200b", "_", "-", "\ufeff", "ß", "ﬁ", "½", "Ⅷ"]
)  # fmt: skip
TEXTS = st.lists(PARTS | st.text(max_size=4), max_size=24).map("".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_the_same_tokens(tokenizer: Tokenizer, texts: list[str]) -> None:
    clean = [text.encode("utf-8", "ignore").decode() for text in texts]
    words = Words(tokenizer)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in clean]
    assert encoded(words, clean) == expected
    assert encoded(words, clean) == expected, "from memory"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_special_tokens_cut_a_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Where they are recognised, one that is the beginning of another included."""
    tokenizer.add_special_tokens(["<|end|>x", "<|im_start|>"])
    made = FastTokenizer(tokenizer.to_str())
    assert made.marks
    clean = [text.encode("utf-8", "ignore").decode() for text in [*texts, "<|end|>x <|end|>", "a <|im_start|>user\nb c<|end|>"]]
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = False
    expected = [plain.encode(text, add_special_tokens=False).ids for text in clean]
    assert [ids.tolist() for ids in made.encode_all(clean, split_special_tokens=False)] == expected


def test_a_special_token_that_takes_white_space_along_is_left_to_the_library() -> None:
    made = trained(SPLITTERS["gpt2"])
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer = FastTokenizer(made.to_str())
    assert tokenizer.marks is None
    assert [ids.tolist() for ids in tokenizer.encode_all(["a  <mask> b"], split_special_tokens=False)] == [
        Tokenizer.from_str(made.to_str()).encode("a  <mask> b", add_special_tokens=False).ids
    ]


def test_real_texts(tokenizer: Tokenizer) -> None:
    assert splits_at_blanks(json.loads(tokenizer.to_str()))
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    assert encoded(Words(tokenizer), texts) == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_it_is_used_from_the_first_text_on(tokenizer: Tokenizer) -> None:
    """An empty memory is false, as every empty dict: nothing but the clock would show that it is passed over."""
    tokenizer.add_special_tokens(["<|end|>"])
    made = FastTokenizer(tokenizer.to_str())
    assert made._words is not None and not made._words
    made.encode_all(["a word"])
    assert set(made._words) == {"a", " word"}
    made.encode_all(["another<|end|>a blank"], split_special_tokens=False)
    assert set(made._words) == {"a", " word", "another", " blank"}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data import words as room

    monkeypatch.setattr(room, "REMEMBERED", 1000)
    made = trained(SPLITTERS["gpt2"])
    words = Words(made)
    for number in range(200):
        text = " ".join(f"w{number}x{i}" for i in range(50))
        assert encoded(words, [text]) == [made.encode(text, add_special_tokens=False).ids]
        assert sum(map(len, words)) < 1000 + 2 * 50 * 8


def test_where_it_may_not_stand() -> None:
    made = trained(SPLITTERS["gpt2"])
    assert splits_at_blanks(json.loads(made.to_str()))
    made.normalizer = normalizers.NFKC()
    assert not splits_at_blanks(json.loads(made.to_str())), "a blank may come from another character"
    for token in (AddedToken("two words", special=False), AddedToken("x", lstrip=True, special=False), AddedToken("y", single_word=True, special=False)):
        made = trained(SPLITTERS["gpt2"])
        made.add_tokens([token])
        assert not splits_at_blanks(json.loads(made.to_str())), token
    for other in (pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(use_regex=False), pre_tokenizers.Split(Regex(r"\w+ ?"), "isolated")):
        made.pre_tokenizer = other
        assert not splits_at_blanks(json.loads(made.to_str())), other
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()])
    assert not splits_at_blanks(json.loads(made.to_str()))
    unigram = Tokenizer(models.Unigram([("a", -1.0)], 0))
    unigram.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert not splits_at_blanks(json.loads(unigram.to_str()))
