"""A tiny model, tokenizer and data set that every test of training shares, and a way to start real ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` has a worker a core, and tiny models gain nothing from a second thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROOMS = ["kitchen", "garage", "cellar", "attic", "study", "hall", "pantry", "porch"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts ranks first: workers take whole files, and the longest should not be left for the end."""
    items.sort(key=lambda item: item.get_closest_marker("launch") is None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer Llama (grouped keys, tied head) and a ChatML byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [json.dumps(conversation) for conversation in tiny_conversations(64)]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=CHATML, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_conversations(count: int) -> list[dict[str, object]]:
    """Lights to switch, of different lengths, a few with a second question."""
    made: list[dict[str, object]] = []
    for number in range(count):
        room, name = ROOMS[number % len(ROOMS)], "HassTurnOn" if number % 3 else "HassTurnOff"
        said = f"turn {'on' if number % 3 else 'off'} the light{' please' * (number % 4)} in the {room} {number}"
        turns: list[dict[str, object]] = [{"role": "user", "content": said}, {"role": "tool", "name": name, "parameters": {"area": room}}]
        if number % 5 == 0:
            turns[1]["observation"] = {"ok": True}
            turns += [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "Gladly."}]
        made.append({"conversations": turns})
    return made


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (26 conversations: the last step of an epoch is short), dev.json and test.json."""
    folder = tmp_path_factory.mktemp("tiny-data")
    made = tiny_conversations(37)  # each part has its own: what is trained on and tested too is refused
    for name, conversations in (("train", made[:26]), ("dev", made[26:31]), ("test", made[31:])):
        (folder / f"{name}.json").write_text(json.dumps(conversations))
    return folder


def read(spec: str | Path, folder: Path = Path()) -> list[Any]:
    """Every conversation that a spec names, parsed, each once; raises the first mistake."""
    from tunesmith.data.conversations import parse_conversation
    from tunesmith.data.files import sources

    return [parse_conversation(record, place) for source in sources(str(spec), folder) for place, record in source.records()]


@pytest.fixture
def overrides(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """The words that make any experiment a tiny one: 7 steps (two epochs less one step) of 8 conversations."""
    return [
        "name=tiny", f"outputs={tmp_path / 'outputs'}", f"data.cache={tmp_path / 'cache'}", "model=local", f"model.path={tiny_model}", "data=local", f"data.folder={tiny_data}",
        "data.train=train.json", "data.dev=dev.json", "data.test=test.json", "train.steps=7", "train.conversations_per_step=8",
        "train.save_every=0", "train.eval_every=0", "optim.lr=1e-2", "optim.warmup_steps=2", "method.r=4", "hardware.peak=1e11",
        "eval.max_new_tokens=4", "eval.conversations=4", "eval.samples=1", "hardware.threads=1",
    ]  # fmt: skip


@dataclass
class Finished:
    """What a launch left."""

    code: int
    output: str
    outputs: Path

    @property
    def run(self) -> Path:
        runs = sorted(self.outputs.glob("*/*/"))
        assert len(runs) == 1, f"{len(runs)} run folders, expected one\n{self.output}"
        return runs[0]

    @property
    def metrics(self) -> list[dict[str, float]]:
        from tunesmith.metrics import read_metrics

        rows = read_metrics(self.run / "metrics.jsonl")
        for row in rows:
            if row.get("speed/hfu") is not None:
                assert 0 < row["speed/mfu"] <= row["speed/hfu"] <= 1, f"more than there is: {row}"
        return rows

    @property
    def world_size(self) -> int:
        size: int = json.loads((self.run / "environment.json").read_text())["world_size"]
        return size

    @property
    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.metrics]


def free_port() -> int:
    """A port that nobody listens on, which neither another worker nor the kernel gives away before it is used."""
    below = 20_000 + 1_000 * (int(WORKER.removeprefix("gw")) % 12)  # Linux gives from 32,768 on to who asks for any
    while True:
        port = random.SystemRandom().randrange(below, below + 1_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A clean environment for a launch: nothing of this test's own ranks, no hub, no W&B account."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    binaries = str(Path(sys.executable).parent)
    kept |= {"PATH": f"{binaries}:{kept['PATH']}", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | dict(extra or {})


LAUNCHERS: dict[str, Callable[[int], list[str]]] = {
    "python": lambda ranks: [sys.executable, "train.py"],
    "deepspeed": lambda ranks: ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), "train.py"],
    "torchrun": lambda ranks: ["torchrun", f"--nproc-per-node={ranks}", f"--master-port={free_port()}", "train.py"],
    "accelerate": lambda ranks: [
        # --multi_gpu starts several ranks on a CPU as well; --cpu would start one, whatever --num_processes says.
        "accelerate", "launch", "--multi_gpu" if ranks > 1 else "--cpu", "--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", str(free_port()), "train.py",
    ],
}  # fmt: skip


def launch(launcher: str, words: Sequence[str], ranks: int = 1, timeout_s: float = 240, extra: Mapping[str, str] | None = None) -> Finished:
    """Start train.py under a real launcher and wait for its end; `plain` starts ranks by RANK and WORLD_SIZE alone."""
    processes = start(launcher, words, ranks, extra)
    texts = []
    for process in processes:
        try:
            texts.append(process.communicate(timeout=timeout_s)[0])
        except subprocess.TimeoutExpired:
            for other in processes:
                os.killpg(other.pid, signal.SIGKILL)
            texts.append(process.communicate()[0] + f"\n[killed by the test after {timeout_s} s]")
    outputs = next(Path(word.partition("=")[2]) for word in words if word.startswith("outputs="))
    return Finished(next((p.returncode for p in processes if p.returncode), 0), "\n".join(texts), outputs)


def start(launcher: str, words: Sequence[str], ranks: int = 1, extra: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """The processes of a launch, each in a group of its own."""
    commands = [(environment(extra), LAUNCHERS.get(launcher, LAUNCHERS["python"])(ranks))]
    if launcher == "plain":
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(extra or {})}
        commands = [(environment({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}), LAUNCHERS["python"](1)) for rank in range(ranks)]
    return [
        subprocess.Popen(
            [*command, *words], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        for env, command in commands
    ]
