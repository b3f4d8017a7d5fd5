"""A model's own chat template: the tokens that transformers makes of it, each answer found without searching, or a refusal."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.test_templates import CALLS, patient, same
from tunesmith.config import Data, Refusal, ToolPrompt
from tunesmith.data.chat_template import ChatTemplate
from tunesmith.data.conversations import Call, Conversation, Turn, parse_conversation
from tunesmith.data.jinja import writer
from tunesmith.data.templates import ChatGLM3, ChatML, Rendered, Renderer, parse_call, renderer_for

# The templates below are written after those of the models, shortened: long instructions about tools are cut to a few words, and
# branches for images, built-in tools and documents are left out. What opens, orders, refuses and ends turns is as published.

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each call, return\n<tool_call>\n{\"name\": <name>, \"arguments\": <args>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA31 = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined and dated is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Given the following functions, respond with a JSON for a function call.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
            {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM4 = r"""[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{%- for tool in tools %}

## {{ tool.function.name }}

{{ tool.function | tojson(indent=4) }}
{%- endfor %}
{%- endif -%}
{%- for item in messages -%}
    {%- if item.tool_calls -%}
        {%- for call in item.tool_calls -%}
            {{- '<|assistant|>' + call.function.name + '\n' + call.function.arguments | tojson -}}
        {%- endfor -%}
    {%- elif item.role == 'tool' -%}
        {{- '<|observation|>\n' + item.content -}}
    {%- else -%}
        {{- '<|' + item.role + '|>' + item.metadata | default('') + '\n' + item.content -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
# After Qwen3's, which writes what was thought only behind the last question.
THINKING = (
    "{% for message in messages %}{% set said = message.content if loop.last else message.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + message.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str, str]] = {  # text, special tokens, bos, eos
    "smollm2": (SMOLLM2, IM, "<|im_start|>", "<|im_end|>"),
    "qwen2.5": (QWEN25, IM, "", "<|im_end|>"),
    "llama3.1": (LLAMA31, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": (
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "<s>",
        "</s>",
    ),
    "gemma": (GEMMA, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "phi3": (PHI3, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "", "<|endoftext|>"),
    "glm4": (
        GLM4,
        ("<|endoftext|>", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "",
        "<|endoftext|>",
    ),
}
SYSTEMS = ("smollm2", "qwen2.5", "llama3.1", "phi3", "glm4")
CALLING = ("qwen2.5", "llama3.1", "mistral", "glm4")
every_template = pytest.mark.parametrize("name", TEMPLATES)
every_caller = pytest.mark.parametrize("name", CALLING)
USER, ANSWER = Turn("user", "hi"), Turn("assistant", "yo", loss=True)
FORECAST = Call("weather", {"city": "Berlin"})
CALL = Turn("assistant", call=FORECAST, loss=True)
RESULT = Turn("observation", "ok")
# Llama-3's, Qwen's and GLM-4's: line breaks are one word whatever follows, so that a header has the same tokens in a prompt.
WORDS_OF_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOOLS = [{"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]


@cache
def tokenizer(name: str, kind: str = "bytes") -> Any:
    """A tiny trained tokenizer with a template and its special tokens.

    pieces: as SentencePiece's are, a blank before the first; words: its special tokens are added as if they were words.
    """
    text, special, bos, eos = TEMPLATES[name]
    backend = Backend(models.BPE())
    if kind != "pieces":
        words_of = pre_tokenizers.Split(Regex(WORDS_OF_LLAMA3), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words_of, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(10, 127)] + ["▁"]
    learned = ["hi yo user assistant system tool observation weather city Berlin name arguments parameters ok done model\n\n"] * 9
    added = () if kind == "words" else special
    backend.train_from_iterator(learned, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=list(added)))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in special if token not in added])
    words = {key: token for key, token in (("bos_token", bos), ("eos_token", eos)) if token}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **words)
    made.chat_template = text
    return made


def renderer(name: str, kind: str = "bytes", **settings: Any) -> ChatTemplate:
    made = renderer_for(tokenizer(name, kind), Data(**settings))
    assert isinstance(made, ChatTemplate)
    return made


def with_template(source: str, like: str = "smollm2", **settings: Any) -> Renderer:
    """A template of the test's own on the tokenizer of another."""
    given = pickle.loads(pickle.dumps(tokenizer(like)))
    given.chat_template = source
    return renderer_for(given, Data(**{"template": "own", **settings}))


def runs(made: Renderer, rendered: Rendered) -> list[tuple[str, bool]]:
    """(text, target) of the stretches of equal targets."""
    found: list[tuple[list[int], bool]] = []
    for token, target in zip(rendered.ids.tolist(), rendered.targets.tolist(), strict=True):
        if not found or found[-1][1] != target:
            found.append(([], target))
        found[-1][0].append(token)
    return [(made.tokenizer.decode(ids, skip_special_tokens=False), target) for ids, target in found]


def learned(made: Renderer, *turns: Turn, tools: Any = None) -> list[str]:
    return [text for text, target in runs(made, made.render(Conversation(turns, tools, place="f#0"))) if target]


# --- which template ------------------------------------------------------------------------------------------------


def test_a_tokenizers_own_template_is_taken_where_it_has_one(tmp_path: Path) -> None:
    assert type(renderer_for(tokenizer("smollm2"), Data())) is ChatTemplate
    assert type(renderer_for(tokenizer("glm4"), Data())) is ChatTemplate, "[gMASK] with <sop> is GLM-4"
    assert type(renderer_for(tokenizer("smollm2"), Data(template="chatml"))) is ChatML
    (tmp_path / "a.jinja").write_text(SMOLLM2.replace("SmolLM", "Tom"), "utf-8")
    by_file = renderer_for(tokenizer("qwen2.5"), Data(template=str(tmp_path / "a.jinja")))
    assert "assistant named Tom" in by_file.tokenizer.decode(by_file.prompt(Conversation((USER,))))


def test_chatglm3_is_told_by_its_tokens_whatever_template_it_has() -> None:
    from tests.test_templates import tokenizer as other

    given = pickle.loads(pickle.dumps(other("chatglm3")))
    given.chat_template = SMOLLM2
    assert type(renderer_for(given, Data())) is ChatGLM3


def test_what_cannot_be_a_template_is_refused(tmp_path: Path) -> None:
    def refused(template: str, source: str = SMOLLM2) -> str:
        with pytest.raises(Refusal) as error:
            with_template(source, template=template)
        return str(error.value)

    assert refused("qwen").startswith("data.template=qwen: no such template — auto, own, chatml, llama3, chatglm3, or a Jinja file")
    missing = tmp_path / "a.jinja"
    assert refused(str(missing)).startswith(f"data.template={missing}: the file cannot be read (No such file or directory) — ")
    missing.write_bytes(b"\xff")
    assert "(it is not UTF-8)" in refused(str(missing))
    missing.write_text("{% for message in messages %}", "utf-8")
    assert refused(str(missing)).startswith(f"data.template={missing}: Jinja cannot read it, line 1: Unexpected end of template.")
    assert "line 1: No filter named 'nothing'" in refused("own", "{{ messages | nothing }}")
    assert refused("own", "").startswith("data.template=own: the tokenizer has no chat template — another data.template (chatml|")
    assert refused("own", "{{ messages.nobody.content }}").startswith(
        "data.template=own: it cannot write a question and its answer: the template says "
    )
    assert refused("own", "{{ messages[-1].content }}").startswith(
        "data.template=own: it cannot write a question and its answer: the template does not write all of 'Where?'"
    )


def test_an_answer_that_nothing_can_end_is_refused() -> None:
    given = pickle.loads(pickle.dumps(tokenizer("smollm2")))
    given.eos_token = None
    given.chat_template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    with pytest.raises(Refusal, match=r"^data.template=own: no special token ends an answer, and the tokenizer has no eos token"):
        renderer_for(given, Data(template="own"))


# --- as transformers writes it -------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(["<b>&'\"", "{{ x }}", "\\n", " a ", "天气 Łódź", "<think>x</think>y"])
EVERY_SPECIAL = {token for _, special, *_ in TEMPLATES.values() for token in special}
WORDS = TEXTS.filter(lambda text: bool(text.strip()) and text == text.strip() and not any(token in text for token in EVERY_SPECIAL))
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS, st.lists, max_leaves=3)
EVERYTHING = r"""
{%- set ns = namespace(count=0, self='n') -%}
{%- set table = dict(b=1, a=2) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {%- if ns.count > 9 -%}{%- break -%}{%- endif -%}
    <|im_start|>{{ message.role }} {{ ns.count }} {{ table | tojson(sort_keys=true) }}
    {% generation %}{{ message | tojson }} {{ message | tojson(indent=2, ensure_ascii=true) }} {{ message.content | upper | trim }}{% endgeneration %}
    {{ tools | tojson(separators=(',', ':')) }}{{ bos_token }}{{ eos_token }}{{ documents }}
{%- endfor -%}
{% macro twice(text) %}{{ text }}{{ text }}{% endmacro %}
{{ twice(messages | map(attribute='role') | join(',')) }}{{ add_generation_prompt }}
"""


@st.composite
def messages(draw: st.DrawFn, name: str, texts: st.SearchStrategy[str] = WORDS, calls: bool = True) -> list[dict[str, Any]]:
    """OpenAI's messages in an order that a template allows, ending with an answer."""
    found: list[dict[str, Any]] = []
    if name in SYSTEMS and draw(st.booleans()):
        found.append({"role": "system", "content": draw(texts)})
    count = 0
    for _ in range(draw(st.integers(1, 3))):
        found.append({"role": "user", "content": draw(texts)})
        if calls and name in CALLING and draw(st.booleans()):
            parallel = 1 if name == "llama3.1" else draw(st.integers(1, 2))
            ids = [f"call{count + number:05}" for number in range(parallel)]
            count += parallel
            functions = [{"name": draw(st.sampled_from(["weather", "home.on"])), "arguments": draw(st.dictionaries(texts, VALUES, max_size=2))} for _ in ids]
            made = [{"type": "function", "id": identity, "function": function} for identity, function in zip(ids, functions, strict=True)]
            text = draw(texts) if name == "qwen2.5" and draw(st.booleans()) else ""
            found.append({"role": "assistant", "content": text, "tool_calls": made})
            for call in made:
                function: Any = call["function"]
                found.append({"role": "tool", "content": draw(texts), "tool_call_id": call["id"], "name": function["name"]})
        found.append({"role": "assistant", "content": draw(texts)})
    return found


def conversation(said: list[dict[str, Any]], tools: Any = None) -> Conversation:
    return parse_conversation({"messages": said, "tools": tools}, "f#0")


def schemas(tools: list[dict[str, Any]] | None) -> Any:
    return tools and [{"type": "function", "function": tool} for tool in tools]


@pytest.mark.parametrize("source", [*(text for text, *_ in TEMPLATES.values()), EVERYTHING], ids=[*TEMPLATES, "everything"])
@patient
@given(st.data())
def test_the_text_is_what_transformers_makes(source: str, data: st.DataObject) -> None:
    """Through apply_chat_template itself, for all of Jinja that transformers sets up."""
    name = next((name for name, (text, *_) in TEMPLATES.items() if text == source), "qwen2.5")
    said = data.draw(messages(name))
    tools = schemas(data.draw(st.sampled_from([None, TOOLS]))) if name in CALLING else None
    ask = data.draw(st.booleans())
    given = tokenizer(name)
    theirs = given.apply_chat_template(said, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=ask)
    ours = writer(source)(
        {"messages": said, "tools": tools, "documents": None, "add_generation_prompt": ask, **given.special_tokens_map}
    )
    assert ours == theirs


@every_template
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@patient
@given(st.data())
def test_the_tokens_are_what_transformers_makes(name: str, kind: str, data: st.DataObject) -> None:
    """Token for token, where no text begins with white space: that could fuse with a header's end, which stays in the prompt here."""
    texts = WORDS if kind != "pieces" else st.from_regex(r"[a-z][a-z \n{}:.]{0,8}[a-z]", fullmatch=True)
    said = data.draw(messages(name, texts))
    has_tools = name in CALLING and (name != "mistral" or sum(message["role"] == "user" for message in said) == 1) and data.draw(st.booleans())
    tools = TOOLS if has_tools else None
    made, given = renderer(name, kind), tokenizer(name, kind)
    theirs = given.apply_chat_template(said, tools=schemas(tools), tokenize=True, return_dict=False)
    assert made.render(conversation(said, tools)).ids.tolist() == theirs
    asked = given.apply_chat_template(said[:-1], tools=schemas(tools), tokenize=True, return_dict=False, add_generation_prompt=True)
    assert made.prompt(conversation(said[:-1], tools)) == asked


def test_the_date_is_the_same_on_every_day() -> None:
    """A run that is resumed tomorrow must find the tokens that it began with."""
    source = LLAMA31.replace(" and dated is defined", "")
    made = with_template(source, "llama3.1")
    assert "Today Date: 26 Jul 2024\n" in made.tokenizer.decode(made.prompt(Conversation((USER,))))


def test_a_template_cannot_reach_pythons_insides() -> None:
    given = tokenizer("smollm2")
    for attack in ("{{ ''.__class__.__mro__ }}", "{% set ns = namespace(__x=1) %}", "{{ dict.mro() }}", "{{ messages.append(1) }}"):
        with pytest.raises(Refusal, match="the template"):
            with_template(attack + given.chat_template)


# --- what is learned -----------------------------------------------------------------------------------------------

HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n</tool_call><|im_end|>'
LEARNED = {
    "qwen2.5": [HERMES, "yo<|im_end|>", "yo<|im_end|>"],
    "llama3.1": ['{"name": "weather", "parameters": {"city": "Berlin"}}<|eot_id|>', "yo<|eot_id|>", "yo<|eot_id|>"],
    "mistral": ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Berlin"}, "id": "call00000"}]</s>', " yo</s>", " yo</s>"],
    "glm4": ['weather\n{"city": "Berlin"}<|observation|>', "\nyo<|user|>", "\nyo"],
}


@every_caller
def test_answers_and_calls_are_learned_with_the_token_that_stops_them(name: str) -> None:
    made = renderer(name)
    assert learned(made, USER, CALL, RESULT, ANSWER, USER, ANSWER) == LEARNED[name]
    silent = Turn("assistant", "yo", loss=False)
    assert learned(made, USER, CALL, RESULT, silent, USER, ANSWER) == [LEARNED[name][0], LEARNED[name][2]]
    assert learned(made, USER, silent) == []


def test_gemma_token_by_token() -> None:
    made = renderer("gemma")
    assert runs(made, made.render(Conversation((USER, ANSWER, USER, ANSWER)))) == [
        ("<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", False),
        ("yo<end_of_turn>", True),
        ("\n<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", False),
        ("yo<end_of_turn>", True),
        ("\n", False),
    ]


def test_the_next_role_ends_an_answer_of_glm4_and_at_the_end_nothing_does() -> None:
    made = renderer("glm4")
    assert made.render(Conversation((USER, ANSWER))).unstopped == 1
    assert made.render(Conversation((USER, ANSWER, USER, ANSWER))).unstopped == 3
    assert made.render(Conversation((USER, ANSWER, USER, Turn("assistant", "yo")))).unstopped is None
    assert renderer("glm4", system="s").render(Conversation((USER, ANSWER))).unstopped == 2, "an index into what was said"
    rendered = made.render(Conversation((USER, ANSWER, USER)))
    assert rendered.unstopped is None
    (place,) = (at for at in range(len(rendered.ids)) if rendered.targets[at] and rendered.turns[at] != 1)
    assert (rendered.ids[place], rendered.turns[place]) == (tokenizer("glm4").convert_tokens_to_ids("<|user|>"), 2)


STOPS = {
    "smollm2": ["<|im_end|>"], "qwen2.5": ["<|im_end|>"], "llama3.1": ["<|eot_id|>"], "mistral": ["</s>"],
    "gemma": ["<end_of_turn>", "<eos>"], "phi3": ["<|end|>", "<|endoftext|>"], "glm4": ["<|user|>", "<|observation|>", "<|endoftext|>"],
}  # fmt: skip


# What opens and ends the turns of users and assistants: what is told to be special by a template, where a tokenizer does not.
TURNS = {
    "smollm2": ["<|im_start|>", "<|im_end|>"], "qwen2.5": ["<|im_start|>", "<|im_end|>"], "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "llama3.1": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|end|>"], "glm4": ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"],
}  # fmt: skip


@every_template
def test_stop_tokens_and_the_end_of_plain_text(name: str) -> None:
    made, given = renderer(name), tokenizer(name)
    assert given.convert_ids_to_tokens(list(made.stop_ids)) == STOPS[name]
    assert made.text_end == given.eos_token_id
    text = Conversation((Turn("text", "hi <|im_end|>", loss=True),))
    rendered = made.render(text)
    assert rendered.ids.tolist() == [*made.encode("hi <|im_end|>"), made.text_end]
    assert rendered.targets.all() and rendered.unstopped is None
    assert made.prompt(text) == list(made.encode("hi <|im_end|>"))


@every_template
def test_each_token_belongs_to_its_turn(name: str) -> None:
    made = renderer(name)
    rendered = made.render(Conversation((USER, ANSWER, Turn("user", "ok"))))
    texts = [made.tokenizer.decode(rendered.ids[rendered.turns == turn].tolist(), skip_special_tokens=True) for turn in range(3)]
    assert [text.split()[-1] for text in texts] == ["hi", "yo", "ok"]
    assert rendered.said == (USER, ANSWER, Turn("user", "ok"))
    frame = made.tokenizer.decode(rendered.ids[rendered.turns == -1].tolist())
    if name == "phi3":
        assert frame == "<|endoftext|>", "the template closes with it"
        return
    starts = {"smollm2": "<|im_start|>system", "qwen2.5": "<|im_start|>system", "llama3.1": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>"}
    assert frame.startswith(starts.get(name, "[gMASK]<sop>"))


@every_template
def test_a_users_turn_can_be_learned(name: str) -> None:
    """Its text and what ends it; not the header, nor a system line that the template makes up."""
    made = renderer(name)
    ends = {"mistral": "[/INST]", "gemma": "<end_of_turn>", "llama3.1": "<|eot_id|>", "phi3": "<|end|>", "glm4": "<|assistant|>"}
    said = Turn("user", "hi", loss=True)
    assert learned(made, said, Turn("assistant", "yo")) == ["hi" + ends.get(name, "<|im_end|>")]
    if name in SYSTEMS and name != "glm4":
        assert learned(made, Turn("system", "hi", loss=True), USER, Turn("assistant", "yo")) == ["hi" + ends.get(name, "<|im_end|>")]
    first = learned(made, Turn("assistant", "yo", loss=True), USER) if name in SYSTEMS else ["yo"]
    assert first[0].strip().startswith("yo"), "an answer that nobody asked for"


def test_what_an_assistant_says_and_calls_at_once_is_one_message() -> None:
    text = Turn("assistant", "Let me look.", loss=True)
    other = Turn("assistant", call=Call("f", {}), loss=True)
    hermes = HERMES.removesuffix("<|im_end|>")
    made = renderer("qwen2.5")
    assert learned(made, USER, text, CALL, other, RESULT, RESULT, ANSWER) == [
        f'Let me look.\n{hermes}\n<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call><|im_end|>', "yo<|im_end|>",
    ]  # fmt: skip
    assert learned(made, USER, Turn("assistant", "Let me look."), CALL) == [HERMES], "unless only a part of it is learned"
    assert learned(renderer("llama3.1"), USER, text, CALL, other)[1:] == [LEARNED["llama3.1"][0], '{"name": "f", "parameters": {}}<|eot_id|>'], (
        "a template that allows one call, and no text beside it, gets a message for each"
    )


def test_a_template_that_knows_no_calls_gets_them_as_text() -> None:
    made = renderer("smollm2")
    assert learned(made, USER, CALL, RESULT, ANSWER, tools=TOOLS) == ["weather(city='Berlin')<|im_end|>", "yo<|im_end|>"]
    asked = made.tokenizer.decode(made.prompt(Conversation((USER,), TOOLS)))
    assert asked.startswith("<|im_start|>system\nYou can call these tools:\n[{") and "named SmolLM" not in asked
    assert made.call_text(FORECAST) == "weather(city='Berlin')"
    both = made.render(Conversation((Turn("system", "Be brief."), USER, ANSWER), TOOLS)).said
    assert [turn.role for turn in both] == ["system", "user", "assistant"] and both[0].content.endswith("]\n\nBe brief.")


# --- what is put in front ------------------------------------------------------------------------------------------


@every_caller
def test_tools_can_be_left_out_and_come_in_every_form(name: str) -> None:
    def asked(offered: Any, **settings: Any) -> str:
        made = renderer(name, **settings)
        return str(made.tokenizer.decode(made.prompt(Conversation((USER,), offered))))

    assert "Tells the weather." in asked(TOOLS)
    assert asked(TOOLS) == asked(schemas(TOOLS)) == asked(str(TOOLS).replace("'", '"'))
    assert asked(TOOLS, tools=ToolPrompt.omit) == asked(None) == asked([])
    if name in SYSTEMS:
        assert "You can call these tools:\nonly words" in asked("only words"), "what is no list of tools is a system line"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_line_can_be_put_in(name: str) -> None:
    own, put = Turn("system", "Be brief."), renderer(name, system="Be brief.")
    assert put.prompt(Conversation((USER,))) == renderer(name).prompt(Conversation((own, USER)))
    assert renderer(name, system="no").prompt(Conversation((own, USER))) == put.prompt(Conversation((USER,))), "a conversation's own wins"
    assert put.render(Conversation((USER, ANSWER))).said[0] == own


# --- what is trained is what is read -------------------------------------------------------------------------------

SAID = TEXTS.map(lambda text: f"{text}.")


@every_template
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@patient
@given(st.data())
def test_the_prompt_is_the_beginning_of_the_training_text(name: str, kind: str, data: st.DataObject) -> None:
    """For each answer, whatever is said: train text is inference text, and what follows the prompt is target up to a stop token."""
    hostile = SAID | st.sampled_from(TEMPLATES[name][1])
    said = data.draw(messages(name, hostile, calls=name != "mistral" or data.draw(st.booleans())))
    tools = TOOLS if name in CALLING and name != "mistral" else None
    whole = conversation(said, tools)
    made = renderer(name, kind)
    rendered = made.render(whole)
    for number, turn in enumerate(whole.turns):
        if turn.role == "assistant":
            asked = made.prompt(Conversation(whole.turns[:number], tools))
            assert rendered.ids[: len(asked)].tolist() == asked
            answered = rendered.ids[len(asked) :].tolist()
            end = next((place for place, token in enumerate(answered) if token in made.stop_ids), len(answered) - 1)
            assert rendered.targets[len(asked) : len(asked) + end + 1].all()
            assert not rendered.targets[len(asked) - 1] or name == "glm4"


@every_template
@patient
@given(st.data())
def test_a_known_shape_gives_the_same_as_looking_at_each_conversation(name: str, data: st.DataObject) -> None:
    """Empty texts, texts that are parts of what the template writes, and white space at their edges included."""
    said = data.draw(messages(name, SAID | st.sampled_from(["", " ", "user", "assistant", " a\n", *TEMPLATES[name][1]]), calls=False))
    learned = [{**message, "loss": data.draw(st.booleans())} for message in said]
    turns = tuple(Turn(message["role"], message["content"], loss=message["loss"]) for message in learned)
    kind, asked, whole = data.draw(st.sampled_from(["bytes", "words"])), data.draw(st.booleans()), Conversation(turns, place="f#0")
    made, slow = renderer(name, kind), pickle.loads(pickle.dumps(renderer(name, kind)))
    slow._shape = lambda draft, ask: None

    def tokens(by: ChatTemplate) -> list[Any]:
        layout = by.lay_out(whole, asked)
        ids = by.encoder.tokens([part.content for part in layout.parts])
        each = [(token, part.turn, part.learned) for part, some in zip(layout.parts, ids, strict=True) for token in some.tolist()]
        return [each, layout.said, layout.unstopped]

    expected = found(lambda: tokens(slow))
    assert [found(lambda: tokens(made)) for _ in range(2)] == [expected, expected]


def found(look: Callable[[], Any]) -> Any:
    """What it gives, or why it refuses."""
    try:
        return look()
    except Refusal as refusal:
        return str(refusal)


def test_most_conversations_are_written_once() -> None:
    """The tenth of a shape costs one look at the template, however many answers it has."""
    made = renderer("qwen2.5")
    written: list[int] = []
    write = made._rendered
    made._rendered = lambda messages, tools, ask: written.append(len(messages)) or write(messages, tools, ask)  # type: ignore[method-assign, func-returns-value]
    for number in range(10):
        turns = [Turn("user", f"and {number}?"), Turn("assistant", f"{number}.", loss=True)] * 3
        made.render(Conversation(tuple(turns), place="f#0"))
    assert written[-9:] == [6] * 9


@every_template
@pytest.mark.parametrize("kind", ["bytes", "words"])
@patient
@given(st.data())
def test_no_text_becomes_a_special_token(name: str, kind: str, data: st.DataObject) -> None:
    """Whatever is said by anyone, or in a schema, the special ids are those of the frame, in the same order."""
    special = TEMPLATES[name][1] if kind == "bytes" else TURNS[name]
    hostile = st.lists(st.sampled_from(special) | st.sampled_from(["\U000f0000", "\U000f0001", "\U0010fffd"]) | st.text(max_size=5), min_size=1, max_size=6)
    made = renderer(name, kind)
    ids = set(tokenizer(name, kind).convert_tokens_to_ids(list(special)))

    def frame(text: str) -> tuple[list[int], str]:
        turns: tuple[Turn, ...] = (Turn("user", text), Turn("assistant", text, loss=True))
        if name in CALLING:
            call = Turn("assistant", call=Call(text, {text: [text]}), loss=True)
            turns = (Turn("user", text), call, Turn("observation", text), Turn("assistant", text, loss=True))
        tools = [{"name": text, "parameters": {text: text}}] if name in CALLING else None
        found = made.render(Conversation(turns, tools)).ids.tolist()
        return [token for token in found if token in ids], made.tokenizer.decode(found, skip_special_tokens=True)

    said = "".join(data.draw(hostile))
    found, text = frame(f"({said})")
    assert found == frame("hi")[0]
    assert text.count(f"({said})") >= 2, "and it can be read as it was said"


def test_a_token_that_would_reach_over_a_headers_end_is_torn_apart() -> None:
    """The prompt ends with a blank; read as one text, the answer's first word would have it."""
    given = pickle.loads(pickle.dumps(tokenizer("smollm2")))
    given.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    made = renderer_for(given, Data())
    rendered = made.render(Conversation((USER, ANSWER)))
    assert given.convert_ids_to_tokens(rendered.ids[rendered.targets].tolist()) == ["yo", "<|im_end|>"]
    assert rendered.ids.tolist()[: -rendered.targets.sum()] == made.prompt(Conversation((USER,)))
    whole = given.apply_chat_template([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], return_dict=False)
    assert given.decode(whole) == given.decode(rendered.ids) and whole != rendered.ids.tolist()


# --- refusals ------------------------------------------------------------------------------------------------------


def refusal(made: Renderer, *turns: Turn, tools: Any = None) -> str:
    with pytest.raises(Refusal) as error:
        made.render_all([Conversation((USER, ANSWER)), Conversation(turns, tools, place="f.jsonl:7")])
    return str(error.value)


def test_a_templates_own_refusal_names_the_conversation_and_is_quoted() -> None:
    gemma = renderer("gemma")
    assert refusal(gemma, Turn("system", "s"), USER, ANSWER).startswith(
        "f.jsonl:7: data.template=own: the template says 'System role not supported' — change the conversation, or another"
    )
    assert "roles must alternate" in refusal(gemma, USER, ANSWER, ANSWER)
    assert "roles must alternate" in refusal(renderer("mistral"), USER, Turn("assistant", "a", loss=True), ANSWER)
    with pytest.raises(Refusal, match=r'^data.system="s": the template writes no system turn — data.system="", or another data.template'):
        renderer("gemma", system="s")


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    made = with_template(THINKING)
    thought = Turn("assistant", "<think>hm</think>yo", loss=True)
    assert learned(made, USER, thought) == ["<think>hm</think>yo<|im_end|>"]
    assert learned(made, USER, Turn("assistant", "<think>hm</think>yo"), USER, thought) == ["<think>hm</think>yo<|im_end|>"], (
        "what is not learned may be rewritten: it is the same in the prompt"
    )
    assert refusal(made, USER, thought, USER, ANSWER) == (
        r"f.jsonl:7 turn 2 (assistant): data.template=own: the template writes 'im_start|>assistant\n<think>hm</think>yo<|im_end|>\n' if the "
        r"conversation ends here but 'im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\n' in the whole, so training text would not be "
        "what is read at inference — another data.template (chatml|llama3|chatglm3), or a conversation for each answer"
    )
    system = refusal(renderer("mistral"), Turn("system", "Be brief."), USER, ANSWER)  # written if the last turn is a user's
    assert system.startswith("f.jsonl:7 turn 1 (system): data.template=own: the template does not write all of 'Be brief.' — another")
    tools = refusal(renderer("mistral"), USER, ANSWER, Turn("user", "ok"), ANSWER, tools=TOOLS)  # shown at the last question only
    assert tools.startswith("f.jsonl:7 turn 2 (assistant): data.template=own: the template writes '<s>[AVAILABLE_TOOLS] [")


def test_a_prompt_that_begins_the_answer_otherwise_is_refused() -> None:
    """DeepSeek's opens <think> in the prompt, and leaves it out of a conversation."""
    source = SMOLLM2.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
    with pytest.raises(Refusal, match=r"cannot write a question and its answer: the template writes .*<think>"):
        with_template(source)


def test_what_is_learned_but_not_written_is_refused() -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    assert refusal(with_template(source), Turn("system", "s", loss=True), USER, ANSWER).startswith(
        "f.jsonl:7 turn 1 (system): data.template=own: the template does not write all of 's' — another data.template"
    )
    source = SMOLLM2.replace("message['content']", "message['content'].split('</think>')[-1]")
    assert "turn 2 (assistant): data.template=own: the template does not write all of '<think>hm</think>yo'" in refusal(
        with_template(source), USER, Turn("assistant", "<think>hm</think>yo", loss=True)
    )
    deaf = SMOLLM2.replace("{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}")
    assert "turn 3 (tool): data.template=own: the template does not write all of 'ok'" in refusal(with_template(deaf), USER, CALL, RESULT, ANSWER)
    loose = SMOLLM2.replace("message['content']", "message['content'].replace('</think>', '\n</think>\n\n')")
    assert learned(with_template(loose), USER, Turn("assistant", "<think>hm</think>yo", loss=True)) == ["<think>hm\n</think>\n\nyo<|im_end|>"]


# --- calls as text -------------------------------------------------------------------------------------------------


@every_caller
@patient
@given(CALLS)
def test_a_call_is_read_back_as_the_template_writes_it(name: str, call: Call) -> None:
    call = Call(call.name.replace("天气", "rain"), call.parameters)
    made = renderer(name)
    said = made.call_text(call)
    assert same(parse_call(said), call)
    heard = made.tokenizer.decode(made.encode(said), skip_special_tokens=True)
    assert same(parse_call(heard.replace("[TOOL_CALLS]", "")), call), "as it is heard, without special tokens"


# --- other processes, caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "own"])
def test_a_renderer_works_in_a_process_without_transformers(template: str, tmp_path: Path) -> None:
    made = renderer_for(tokenizer("smollm2"), Data(template=template, system="Be brief."))
    whole = Conversation((USER, CALL, RESULT, ANSWER), TOOLS)
    (tmp_path / "work").write_bytes(pickle.dumps((made, whole)))
    code = (
        "import pickle, sys\n"
        f"made, whole = pickle.load(open({str(tmp_path / 'work')!r}, 'rb'))\n"
        "rendered = made.render_all([whole, whole])[1]\n"
        "print(rendered.ids.tolist(), made.prompt(whole), made.key, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{made.render(whole).ids.tolist()} {made.prompt(whole)} {made.key} []"


def test_the_key_tells_what_tokens_depend_on() -> None:
    keys = [
        renderer("smollm2").key, renderer("smollm2", "pieces").key, renderer("smollm2", system="s").key, renderer("smollm2", tools=ToolPrompt.omit).key,
        with_template(SMOLLM2.replace("SmolLM", "Tom")).key, with_template(SMOLLM2, "qwen2.5").key, renderer_for(tokenizer("smollm2"), Data(template="chatml")).key,
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert with_template(SMOLLM2).key == renderer("smollm2").key, "own is what auto found"


def test_named_templates_are_chosen_by_whether_there_are_tools() -> None:
    given = pickle.loads(pickle.dumps(tokenizer("qwen2.5")))
    given.chat_template = {"default": SMOLLM2, "tool_use": QWEN25}
    made = renderer_for(given, Data())
    assert "named SmolLM" in given.decode(made.prompt(Conversation((USER,))))
    assert "# Tools" in given.decode(made.prompt(Conversation((USER,), TOOLS)))
    assert learned(made, USER, CALL, tools=TOOLS) == [HERMES]
    assert made.call_text(FORECAST) == HERMES.removesuffix("<|im_end|>")
    assert "does not write all of 'weather'" in refusal(made, USER, CALL), "without tools it is the other template, which knows no calls"
    given.chat_template["tool_use"] = QWEN25.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>Action:' }}")
    broken = renderer_for(given, Data())
    assert "as the prompt but" in refusal(broken, USER, CALL, tools=TOOLS)
    assert broken.call_text(FORECAST) == "weather(city='Berlin')", "for people"
