"""Jinja as transformers sets it up for chat templates, so that processes that render need no transformers.

Chat templates come with models and are foreign code: they run in a sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TODAY = datetime(2024, 7, 26)
"""What templates are told for today, so that a run renders the same on the day it is resumed. Llama's own fall back on this date."""


@lru_cache
def writer(source: str) -> Callable[[dict[str, Any]], str]:
    """A chat template, ready to write with the variables given; raises TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": TODAY.strftime, "dict": _Dictionary(), "namespace": _Namespace}
    template = environment.from_string(source)
    always = dict(template.globals)

    def write(variables: dict[str, Any]) -> str:
        # Template.render collects the globals anew each time, which takes longer than most templates.
        return "".join(template.root_render_func(template.new_context({**always, **variables}, shared=True)))

    return write


class _Generation(Extension):
    """{% generation %} marks answers for others; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    if not isinstance(value, Tool):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    form = repr((ensure_ascii, indent, separators, sort_keys))
    if form not in value._json:
        value._json[form] = json.dumps(dict(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return value._json[form]


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Dictionary:
    """dict, without what the sandbox does not know to be dangerous."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """namespace, without a way to Python's internals."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template must not set {name!r} in a namespace")
        super().__setitem__(name, value)


class Tool(dict[str, Any]):
    """A tool's schema, whose JSON is made once although the conversation is written several times."""

    def __init__(self, schema: dict[str, Any]):
        super().__init__({key: Tool(value) if key == "function" and isinstance(value, dict) else value for key, value in schema.items()})
        self._json: dict[str, str] = {}
