"""C++ of this package, compiled for this very CPU when it is first used, in about a second, and kept in the cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from tunesmith.hardware import cache_folder, cpu_words


@cache
def library(source: Path, without: str) -> ctypes.CDLL | None:
    """A file of C functions as a library; None, with a line that says what is so without it, where none can be made."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _warn("no C++ compiler here", without)
        return None
    # By themselves compilers avoid the widest vectors, for which some CPUs slow their clock. psabi: none goes from one library to another.
    wide = ["-mprefer-vector-width=512"] if "avx512f" in cpu_words() else []
    options = ["-std=c++17", "-O3", "-march=native", *wide, "-Wno-psabi", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC"]
    command = [compiler, *options, str(source)]
    # A cache may be shared by machines with other CPUs.
    made_from = "\n".join([_whole_text(source), *command[:-1], platform.platform(), cpu_words()])
    made = cache_folder() / "native" / f"{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(made) + ".lock"):
            if not made.exists():
                with tempfile.TemporaryDirectory(dir=made.parent) as work:
                    draft = Path(work) / made.name
                    subprocess.run([*command, "-o", str(draft)], check=True, capture_output=True, text=True, timeout=120)
                    os.replace(draft, made)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        _warn(f"{compiler} makes no library of {source.name} ({said[0][:200] if said else 'no reason given'})", without)
        return None


def _whole_text(source: Path) -> str:
    """A file and the files of this package that it includes."""
    text = source.read_text("utf-8")
    return "\n".join([text, *(_whole_text(source.parent / name) for name in re.findall(r'^#include "(.+)"$', text, re.MULTILINE))])


def _warn(why: str, without: str) -> None:
    print(f"tunesmith: {why}: on this CPU {without}", file=sys.stderr)
