"""ChatGLM3: its tokenizer, and its layout and labels token by token against what its sources document.

No file of the published model is here. A small SentencePiece model that is trained the same way stands for it (BPE, bytes
for what it lacks, text left as it is, a blank put first), so its ids of bytes, <unk>, <s> and </s> are the published ones.
One more has 64,789 pieces, those that published prints show at their places.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from tunesmith.config import Compat, Data, Refusal
from tunesmith.data.conversations import Call, Conversation, Turn, parse_conversation
from tunesmith.data.glm_tokenizer import GlmTokenizer
from tunesmith.data.templates import ChatGLM3, Renderer, parse_call, renderer_for

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES]  # in the order of their ids, right after the pieces
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)  # ▁ is SentencePiece's own blank

TOOLS = [
    {
        "name": "track",
        "description": "追踪指定股票的实时价格",
        "parameters": {"type": "object", "properties": {"symbol": {"type": "string"}}, "required": ["symbol"]},
    }
]
# README's tool example with its placeholders filled in: every kind of message in its order.
TOOL_RECORD: dict[str, Any] = {
    "tools": TOOLS,
    "conversations": [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "股票10111的价格是多少？"},
        {"role": "assistant", "content": "I look up the price."},
        {"role": "tool", "name": "track", "parameters": {"symbol": "10111"}, "observation": {"价格": 12412}},
        {"role": "assistant", "content": "股票的价格是12412。"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "不客气"},
    ],
}
TOOLS_LINE = "Answer the following questions as best as you can. You have access to the following tools:\n"


@pytest.fixture(scope="session")
def proto() -> bytes:
    """A small SentencePiece model; "sop" is one of its pieces as well as a special token."""
    said = [message["content"] for message in TOOL_RECORD["conversations"] if "content" in message]
    texts = [*said, TOOLS_LINE.strip(), *json.dumps(TOOLS, ensure_ascii=False, indent=4).splitlines(), '{"价格": 12412}', "```python"]
    texts += [
        "tool_call(symbol='10111')",
        "你好，今天天气怎么样？",
        "Hello how are you? user assistant observation system",
        *["track +sop"] * 3,
    ]
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_writer=made, model_type="bpe", vocab_size=640, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture(scope="session")
def pieces(proto: bytes) -> SentencePieceProcessor:
    """The library itself, without the code under test."""
    return SentencePieceProcessor(model_proto=proto)


@pytest.fixture(scope="session")
def glm(proto: bytes) -> GlmTokenizer:
    return GlmTokenizer(proto)


# --- the tokenizer -------------------------------------------------------------------------------------------------


def test_special_ids_follow_the_pieces(glm: GlmTokenizer, pieces: SentencePieceProcessor) -> None:
    count = pieces.get_piece_size()
    assert [glm.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(count, count + 9))
    assert (len(glm), glm.pad_token_id, glm.eos_token_id) == (count + 9, 0, 2)
    vocabulary = glm.get_vocab()
    assert [vocabulary[token] for token in ("<unk>", "<s>", "</s>", "<0x0A>", *SPECIAL)] == [0, 1, 2, 13, *range(count, count + 9)]
    assert glm.convert_tokens_to_ids("nowhere to be found") == 0


def test_a_piece_that_is_spelt_like_a_special_token_is_not_it(glm: GlmTokenizer, pieces: SentencePieceProcessor) -> None:
    assert pieces.piece_to_id("sop") > 0, "the model has it, or this test shows nothing"
    assert glm.convert_tokens_to_ids("sop") == glm.get_vocab()["sop"] == pieces.get_piece_size() + 3
    ids = glm.encode("+sop", add_special_tokens=False, split_special_tokens=False)
    assert pieces.piece_to_id("sop") in ids and glm.get_vocab()["sop"] not in ids


def test_a_newline_is_two_tokens(glm: GlmTokenizer) -> None:
    """The blank that is put first and the newline as a byte, as in README's print (30910, 13)."""
    blank = glm.convert_tokens_to_ids("▁")
    assert glm.encode("\n", add_special_tokens=False, split_special_tokens=True) == [blank, 13]
    assert glm.encode("", add_special_tokens=False, split_special_tokens=True) == []
    front = [glm.convert_tokens_to_ids("[gMASK]"), glm.convert_tokens_to_ids("sop")]
    assert glm.encode("\n", add_special_tokens=True, split_special_tokens=True) == [*front, blank, 13]


@patient
@given(text=TEXT, split=st.booleans())
@example(text="你好，世界！ Hello　ﬁ é\n\n    x  \t\r\n", split=True)
@example(text="  two in front", split=True)
@example(text="<0x0A> <s> </s> <unk>", split=True)
def test_decoding_gives_the_text_back(glm: GlmTokenizer, text: str, split: bool) -> None:
    ids = glm.encode(text, add_special_tokens=False, split_special_tokens=split)
    assert glm.decode(ids, skip_special_tokens=False) == text
    assert glm.encode_all([text, "", text]) == [ids, [], ids]


@pytest.mark.parametrize("token", [*SPECIAL, "<unk>", "<s>", "</s>", "<0x0A>"])
@pytest.mark.parametrize("split", [True, False])
def test_no_text_becomes_a_special_token(glm: GlmTokenizer, pieces: SentencePieceProcessor, token: str, split: bool) -> None:
    for text in (token, f"a{token}b", f"{token} {token}\n"):
        ids = glm.encode(text, add_special_tokens=False, split_special_tokens=split)
        assert all(2 < found < pieces.get_piece_size() for found in ids)
        assert glm.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_shown_or_skipped(glm: GlmTokenizer) -> None:
    hi = glm.encode("你好", add_special_tokens=True, split_special_tokens=True)
    ids = [*hi, glm.convert_tokens_to_ids("<|user|>"), *hi[2:], glm.eos_token_id]
    assert glm.decode(ids, skip_special_tokens=False) == "[gMASK]sop你好<|user|>你好</s>"
    assert glm.decode(ids, skip_special_tokens=True) == "你好 你好"
    assert glm.decode([], skip_special_tokens=True) == ""
    # Rows of the model that no token has (65,024 of 64,798 in the published one), and half a character.
    assert glm.decode([len(glm), *hi[2:], len(glm) + 200, -100], skip_special_tokens=False) == "你好"
    assert glm.decode([243, 162], skip_special_tokens=True) == "\ufffd\ufffd"


def test_it_goes_to_other_processes_and_into_folders(glm: GlmTokenizer, proto: bytes, tmp_path: Path) -> None:
    glm.save_pretrained(tmp_path / "chatglm3")
    for again in (pickle.loads(pickle.dumps(glm)), GlmTokenizer.from_pretrained(tmp_path / "chatglm3")):
        assert again.get_vocab() == glm.get_vocab()
        assert again.encode("你好 x", add_special_tokens=True, split_special_tokens=True) == (
            glm.encode("你好 x", add_special_tokens=True, split_special_tokens=True)
        )
    assert (tmp_path / "chatglm3" / "tokenizer.model").read_bytes() == proto


def test_chatglm2_has_no_roles(proto: bytes, tmp_path: Path) -> None:
    """The pieces are the same; only the code beside them tells."""
    two = GlmTokenizer(proto, roles=False)
    assert set(SPECIAL) - set(two.get_vocab()) == set(ROLES)
    two.save_pretrained(tmp_path / "saved")
    published = tmp_path / "published"
    published.mkdir()
    (published / "tokenizer.model").write_bytes(proto)
    assert len(GlmTokenizer.from_pretrained(published)) == len(two) + 4, "nothing tells: ChatGLM3"
    (published / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    (published / "tokenization_chatglm.py").write_text('special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]')
    for again in (published, tmp_path / "saved"):
        assert GlmTokenizer.from_pretrained(again).get_vocab() == two.get_vocab()
    (published / "tokenization_chatglm.py").write_text('role_special_tokens = ["<|system|>", "<|user|>"]')
    assert len(GlmTokenizer.from_pretrained(published)) == len(two) + 4
    assert len(pickle.loads(pickle.dumps(two))) == len(two)


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n"])
def test_a_folder_without_a_model_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    what = "cannot be read .* copy it there" if content is None else "is no SentencePiece model — download"
    with pytest.raises(Refusal, match=rf"^model.path={tmp_path}: tokenizer.model {what}"):
        GlmTokenizer.from_pretrained(tmp_path)


# --- the layout, written from its documentation --------------------------------------------------------------------

Table = list[tuple[str, int, bool]]
"""A row a token: piece, id, target."""
Counted = Sequence[bool]
"""Whether each message counts; a tool message with an observation is two."""


def expected(pieces: SentencePieceProcessor, record: dict[str, Any], counted: Counted) -> Table:
    """From the words of the sources: [gMASK] sop, the messages, one </s>; a mask by message, shifted by one."""
    messages: list[tuple[str, str, str]] = []  # role, metadata, content
    if record.get("tools"):
        messages.append(("system", "", TOOLS_LINE + json.dumps(record["tools"], ensure_ascii=False, indent=4)))
    for message in record["conversations"]:
        if message["role"] != "tool":
            messages.append((message["role"], "", message["content"]))
            continue
        arguments = ", ".join(f"{name}={value!r}" for name, value in message["parameters"].items())
        messages.append(("assistant", message["name"], f"```python\ntool_call({arguments})\n```"))
        if "observation" in message:
            result = message["observation"]
            messages.append(("observation", "", result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)))
    first = pieces.get_piece_size()
    ids, mask = [first + SPECIAL.index("[gMASK]"), first + SPECIAL.index("sop")], [False, False]
    for (role, metadata, content), counts in zip(messages, counted, strict=True):
        said = [first + SPECIAL.index(f"<|{role}|>"), *pieces.encode(f"{metadata}\n"), *pieces.encode(content)]
        ids += said
        mask += [counts] * len(said)
    ids.append(2)
    return table(pieces, ids, [False, *mask])


def table(pieces: SentencePieceProcessor, ids: Sequence[int], targets: Sequence[bool]) -> Table:
    count = pieces.get_piece_size()
    names = [pieces.id_to_piece(token) if token < count else SPECIAL[token - count] for token in map(int, ids)]
    return list(zip(names, map(int, ids), map(bool, targets), strict=True))


def renderer(glm: GlmTokenizer, **words: Any) -> Renderer:
    return renderer_for(glm, Data(template="chatglm3", **words))


def rendered(glm: GlmTokenizer, record: dict[str, Any], **words: Any) -> Table:
    """What the code under test makes of a record, one by one and in a batch."""
    conversation = parse_conversation(record, "f#0", Data(template="chatglm3", **words))
    one, other = renderer(glm, **words).render_all([conversation, conversation])
    single = renderer(glm, **words).render(conversation)
    assert list(one.ids) == list(other.ids) == list(single.ids)
    assert list(one.targets) == list(other.targets) == list(single.targets)
    return table(SentencePieceProcessor(model_proto=glm.proto), single.ids, single.targets)


def test_the_template_is_found_by_the_tokenizer_and_goes_to_other_processes(glm: GlmTokenizer) -> None:
    conversation = Conversation((Turn("user", "你好"), Turn("assistant", "hi", loss=True)))
    found = renderer_for(glm, Data())
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(found, ChatGLM3) and again.key == found.key == renderer(glm).key
    assert again.render(conversation).ids.tolist() == found.render(conversation).ids.tolist()


def test_chatglm2_has_no_such_template(proto: bytes) -> None:
    with pytest.raises(Refusal, match=r"^data.template=chatglm3: the tokenizer has no token <\|"):
        renderer(GlmTokenizer(proto, roles=False)).prompt(Conversation((Turn("user", "你好"),)))


def test_a_plain_conversation_token_by_token(glm: GlmTokenizer, pieces: SentencePieceProcessor) -> None:
    """As README prints it: <|assistant|> is no target after a user, the blank and the newline after it are, and what stops."""
    user, assistant = pieces.get_piece_size() + 6, pieces.get_piece_size() + 7
    hello, thanks, welcome = (pieces.piece_to_id(f"▁{word}") for word in ("Hello", "Thanks", "不客气"))
    record = {"conversations": [
        {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "不客气"},
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello\n"},
    ]}  # fmt: skip
    blank = pieces.piece_to_id("▁")
    assert rendered(glm, record) == [
        ("[gMASK]", pieces.get_piece_size() + 1, False),
        ("sop", pieces.get_piece_size() + 3, False),
        ("<|user|>", user, False),
        ("▁", blank, False),
        ("<0x0A>", 13, False),
        ("▁Thanks", thanks, False),
        ("<|assistant|>", assistant, False),
        ("▁", blank, True),
        ("<0x0A>", 13, True),
        ("▁不客气", welcome, True),
        ("<|user|>", user, True),
        ("▁", blank, False),
        ("<0x0A>", 13, False),
        ("▁Hello", hello, False),
        ("<|assistant|>", assistant, False),
        ("▁", blank, True),
        ("<0x0A>", 13, True),
        ("▁Hello", hello, True),
        ("<0x0A>", 13, True),
        ("</s>", 2, True),
    ]


PUBLISHED = {30910: "▁", 36474: "▁你", 54591: "好", 31404: "！"}


def test_the_published_ids() -> None:
    """A conversation whose ids the test of li-plus/chatglm.cpp took from the original tokenizer; the labels are README's rule."""
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    made = sentencepiece_model_pb2.ModelProto()
    made.trainer_spec.model_type = made.trainer_spec.BPE
    made.trainer_spec.byte_fallback = True
    made.normalizer_spec.add_dummy_prefix = True
    made.normalizer_spec.remove_extra_whitespaces = False
    made.pieces.add(piece="<unk>", type=kinds.UNKNOWN)
    made.pieces.extend(kinds(piece=control, type=kinds.CONTROL) for control in ("<s>", "</s>"))
    made.pieces.extend(kinds(piece=f"<0x{byte:02X}>", type=kinds.BYTE) for byte in range(256))
    made.pieces.extend(kinds(piece=PUBLISHED.get(token, f"piece {token}"), score=-token) for token in range(259, 64_789))
    glm = GlmTokenizer(made.SerializeToString())
    assert {token: glm.convert_tokens_to_ids(token) for token in SPECIAL} == {
        "[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793,
        "<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796, "<|observation|>": 64797,
    }  # fmt: skip
    turns = (Turn("user", "你好"), Turn("assistant", "你好👋！", loss=True))
    prompt = [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
    answer = [30910, 13, 36474, 54591, 243, 162, 148, 142, 31404, 2]
    assert renderer(glm).prompt(Conversation(turns[:1])) == prompt
    whole = renderer(glm).render(Conversation(turns))
    assert whole.ids.tolist() == [*prompt, *answer]
    assert whole.targets.tolist() == [False] * len(prompt) + [True] * len(answer)
    assert renderer(glm).stop_ids == (64795, 64797, 2)


GOLDEN = Path(__file__).parent / "golden" / "chatglm3_tools.txt"
GOLDEN_HEAD = """\
# README's tool example for ChatGLM3, token by token: piece, id, target. Made from the documented layout, not by templates.py.
# To accept a change: ACCEPT=1 .venv/bin/python -m pytest tests/test_chatglm3.py -k golden
# Then read the difference before it is committed. Other ids alone: SentencePiece trained another small model.
"""


def test_golden_tools(glm: GlmTokenizer, pieces: SentencePieceProcessor) -> None:
    """Tools, system, user, thought, call, result, answer, and one more exchange."""
    #          tools  system user   thought call  result answer user  answer
    counted = [False, False, False, True, True, False, True, False, True]
    written = GOLDEN_HEAD + shown(expected(pieces, TOOL_RECORD, counted))
    if os.environ.get("ACCEPT"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(written, "utf-8")
    golden = GOLDEN.read_text("utf-8")
    assert written == golden
    assert GOLDEN_HEAD + shown(rendered(glm, TOOL_RECORD)) == golden


def shown(rows: Table) -> str:
    return "".join(f"{piece:<20} {token:>4}  {'target' if target else '-'}\n" for piece, token, target in rows)


# --- which messages count: the seven cases in which the sources differ ----------------------------------------------

USER, ANSWER = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello, how are you?"}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
TOOL = {"role": "tool", "name": "track", "parameters": {"symbol": "10111"}, "observation": {"价格": 12412}}
RESULT = {"role": "observation", "content": "12412"}

# For each case the messages after expansion that count (x), by data.compat in the order of its members.
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "an assistant without flag": (
        {"conversations": [USER, ANSWER, USER, ANSWER]},
        {"tunesmith": ".x.x", "readme": ".x.x", "preprocess": ".x.x", "script": ".x.x"},
    ),
    "an assistant with loss false": (
        {"conversations": [USER, {**ANSWER, "loss": False}, USER, ANSWER]},
        {"tunesmith": "...x", "readme": "...x", "preprocess": "...x", "script": ".x.x"},
    ),
    "two assistants in a row, the second with loss false": (
        {"conversations": [USER, ANSWER, {**ANSWER, "loss": False}]},
        {"tunesmith": ".x.", "readme": ".x.", "preprocess": ".x.", "script": ".xx"},
    ),
    "a user and a system with loss true": (
        {"conversations": [{**SYSTEM, "loss": True}, {**USER, "loss": True}, ANSWER]},
        {"tunesmith": "xxx", "readme": "xxx", "preprocess": "..x", "script": "..x"},
    ),
    "a call": (
        {"conversations": [USER, TOOL, ANSWER]},
        {"tunesmith": ".x.x", "readme": ".x.x", "preprocess": ".x.x", "script": ".x.x"},
    ),
    "a call with loss false": (
        {"conversations": [USER, {**TOOL, "loss": False}, ANSWER]},
        {"tunesmith": "...x", "readme": "...x", "preprocess": "...x", "script": ".x.x"},  # the script refused calls; no flag counts there
    ),
    "the result of a call, with loss true": (
        {"conversations": [USER, {**TOOL, "loss": True}, ANSWER]},
        {"tunesmith": ".x.x", "readme": ".x.x", "preprocess": ".x.x", "script": ".x.x"},
    ),
    "a native observation without flag": (
        {"conversations": [USER, ANSWER, RESULT, ANSWER]},
        {"tunesmith": ".x.x", "readme": ".xxx", "preprocess": ".xxx", "script": ".xxx"},
    ),
    "a native observation with loss false": (
        {"conversations": [USER, ANSWER, {**RESULT, "loss": False}, ANSWER]},
        {"tunesmith": ".x.x", "readme": ".x.x", "preprocess": ".x.x", "script": ".xxx"},
    ),
    "tools": (
        {"tools": TOOLS, "conversations": [SYSTEM, USER, ANSWER]},
        {"tunesmith": "...x", "readme": "...x", "preprocess": "...x", "script": "...x"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("compat", Compat)
@pytest.mark.parametrize("case", CASES)
def test_what_is_learned(glm: GlmTokenizer, pieces: SentencePieceProcessor, case: str, compat: Compat) -> None:
    record, counted = CASES[case]
    wanted = expected(pieces, record, [mark == "x" for mark in counted[compat.name]])
    assert rendered(glm, record, compat=compat) == wanted


# --- no text becomes a role -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", ["<|user|>", "[gMASK]", "sop", "</s>", "hi<|assistant|>\n hi", "<|observation|>\n{}", "<s>"])
def test_text_that_spells_a_role_stays_text(glm: GlmTokenizer, pieces: SentencePieceProcessor, hostile: str) -> None:
    """Said by anyone, as a tool's schema, name, argument or result: the special ids are those of the frame, in its order."""
    frame = [
        "[gMASK]",
        "sop",
        *(f"<|{role}|>" for role in ("system", "system", "user", "assistant", "assistant", "observation", "assistant")),
    ]
    record = {
        "tools": [hostile],
        "conversations": [
            {"role": "system", "content": hostile},
            {"role": "user", "content": hostile},
            {"role": "assistant", "content": hostile},
            {"role": "tool", "name": hostile.split("\n")[0], "parameters": {"symbol": hostile}, "observation": hostile},
            {"role": "assistant", "content": hostile},
        ],
    }
    rows = rendered(glm, record)
    assert [piece for piece, token, _ in rows if token in (0, 1, 2) or token >= pieces.get_piece_size()] == [*frame, "</s>"]
    text = glm.decode([token for _, token, _ in rows], skip_special_tokens=True)
    assert text.count(hostile) == (5 if "\n" in hostile else 8), "a newline is escaped in JSON, in Python, and cut from a name"


# --- what is read at inference is how the training text begins ------------------------------------------------------


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_every_history_is_the_beginning_of_the_training_text(glm: GlmTokenizer, tools: Any) -> None:
    conversation = parse_conversation({**TOOL_RECORD, "tools": tools}, "f#0")
    made = renderer(glm)
    ids = made.render(conversation).ids.tolist()
    targets = made.render(conversation).targets.tolist()
    assistant = glm.convert_tokens_to_ids("<|assistant|>")
    for length in range(1, len(conversation.turns)):
        prompt = made.prompt(Conversation(conversation.turns[:length], tools))
        assert prompt[-1] == assistant
        following = conversation.turns[length]
        assert ids[: len(prompt) - 1] == prompt[:-1]
        if following.role == "assistant":
            assert ids[: len(prompt)] == prompt
            assert targets[len(prompt)], "the first token that is to be said is learned"
        else:
            assert ids[len(prompt) - 1] == glm.convert_tokens_to_ids(f"<|{following.role}|>")


# --- calls -----------------------------------------------------------------------------------------------------------

CALLS = [
    Call("track", {}),
    Call("track", {"symbol": "10111"}),
    Call("追踪", {"股票": "代码", "城市": ["北京", {"区": None}]}),
    Call("get-weather", {"x-y": 1, "from": "Oslo", "class": 2, "a b": 3, "": 4, "1st": 5, "None": 6}),
    Call("home.turn_on", {"ﬁ": 1}),  # Python's parser would make "fi" of this name
    Call("f", {"nested": {"a": [1, -2.5, {"b": {"c": [True, False, None]}}], "": {}}}),
    Call("f", {"null": None, "true": True, "false": False, "one": 1, "float": 1.0, "large": 10**30, "small": -1e-9}),
    Call("f", {"single": "it's", "double": 'say "x"', "both": "'\"", "slash": "\\", "end": "\\'"}),
    Call("f", {"lines": "a\nb\r\nc\n\n", "tab": "\t", "nul": "\x00", "blank": "  x  "}),
    Call("f", {"fence": "```", "more": "```python\ntool_call(x=1)\n```\n", "tick": "`", "last": "\n```"}),
    Call("f", {"bracket": ")]}", "comma": ", x=1", "hash": "# no", "format": "{x} %s"}),
    Call("tool_call", {"tool_call": "tool_call(x=1)"}),
    Call("f", {"role": "<|observation|>", "end": "</s>", "byte": "<0x0A>"}),
    Call("f", {"emoji": "👋🏽", "zero": "a\u200bb", "accent": "e\u0301"}),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_read_back_through_its_tokens(glm: GlmTokenizer, call: Call) -> None:
    """From the file's words to ids, and from the ids between the roles, which is what a model would say, to the call."""
    record = {"conversations": [{"role": "user", "content": "x"}, {"role": "tool", "name": call.name, "parameters": call.parameters}]}
    made = renderer(glm)
    conversation = parse_conversation(record, "f#0")
    prompt = made.prompt(Conversation(conversation.turns[:1]))
    said = made.render(conversation).ids.tolist()[len(prompt) :]
    assert said.pop() == glm.eos_token_id
    assert same(parse_call(glm.decode(said, skip_special_tokens=True)), call)


ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@patient
@given(parameters=st.dictionaries(TEXT | st.from_regex(r"[a-z_]\w{0,7}", fullmatch=True), ARGUMENTS, max_size=4))
def test_any_call_is_read_back_through_its_tokens(glm: GlmTokenizer, parameters: dict[str, Any]) -> None:
    call = Call("track", parameters)
    written = renderer(glm).call_text(call)
    ids = glm.encode(written, add_special_tokens=False, split_special_tokens=True)
    assert same(parse_call(glm.decode(ids, skip_special_tokens=True)), call)


def same(found: Call | None, wanted: Call) -> bool:
    """Equal in type too: 1, 1.0 and True are different values of a parameter."""
    return found is not None and json.dumps([found.name, found.parameters], sort_keys=True) == json.dumps(
        [wanted.name, wanted.parameters], sort_keys=True
    )
