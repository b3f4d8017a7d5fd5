"""What the pages have in common: how a template becomes a file, and how numbers are written for people."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Fill a template of this folder and write it, whole or not at all."""
    here = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["num"] = number
    page = pages.get_template(template).render(values)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the page from the rest of the group
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def number(value: Any) -> str:
    """For a person to read: three digits, thousands apart, a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(number, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if 100 <= abs(value) < math.inf else f"{value:#.3g}".rstrip(".").replace("-", "−", 1)
    return f"{value:,}" if isinstance(value, int) else str(value)
