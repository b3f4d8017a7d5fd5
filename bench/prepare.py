"""How fast conversations become tokens, and in how much memory: tunesmith beside TRL, the same file, the same cores.

    python -m bench.prepare                 rates on a file of 64 MiB, three rounds, TRL in turn with us
    python -m bench.prepare --mib 2048 --only tunesmith      the memory of a large one

Each measurement is a fresh process. TRL's time is from the file to its trainer's tokenised data set (datasets' JSON reader,
then SFTTrainer._prepare_dataset with a process for each core); imports and the model are not counted, for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import psutil

TOOLS = [
    {"name": name, "description": f"Calls {name}", "parameters": {"type": "object", "properties": {"area": {"type": "string"}}}}
    for name in ("turn_on", "turn_off", "set_temperature", "get_weather", "play_music")
]


def sentences() -> list[str]:
    """Some ten thousand real ones: the descriptions of installed packages, Python's manual, and our Chinese README."""
    texts = [distribution.metadata.get_payload() or distribution.metadata.get("Description", "") for distribution in distributions()]
    texts += [*topics.values(), (Path(__file__).parents[1] / "README.zh-CN.md").read_text("utf-8")]
    found = {sentence.strip() for text in texts for sentence in re.split(r"(?<=[.!?。])\s+|\n\n", str(text))}
    return sorted(sentence for sentence in found if 20 <= len(sentence) <= 600)


def write_conversations(path: Path, size: int, seed: int = 0) -> int:
    """Write lines until the file has `size` bytes: two to ten turns of one to four sentences, tools in a third; gives their number."""
    chance, said = random.Random(seed), sentences()
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            turns: list[dict[str, object]] = []
            for _ in range(chance.randint(1, 5)):
                for role in ("user", "assistant"):
                    turns.append({"role": role, "content": " ".join(chance.sample(said, chance.randint(1, 4)))})
            record: dict[str, object] = {"messages": turns}
            if count % 3 == 0:
                record["messages"] = [{"role": "system", "content": "You can call these tools:\n" + json.dumps(TOOLS)}, *turns]
            line = json.dumps(record, ensure_ascii=False) + "\n"
            written += len(line.encode())
            count += 1
            file.write(line)
    return count


def prepare_ours(file: Path, model: Path, cache: Path, template: str) -> dict[str, float]:
    """Prepare by tunesmith: check, render, mask, hash and write. Then start once more."""
    from tunesmith.config import Data
    from tunesmith.data.parts import read_parts
    from tunesmith.data.templates import renderer_for
    from tunesmith.model import load_tokenizer

    data = Data(folder="", train=str(file), template=template, max_tokens=10**6, cache=str(cache))
    renderer = renderer_for(load_tokenizer(model), data)
    start = time.perf_counter()
    part = read_parts(data, renderer)["train"]
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    again = read_parts(data, renderer)["train"]
    assert len(again.examples) == len(part.examples)
    again_s = time.perf_counter() - start
    return {"seconds": seconds, "again_s": again_s, "conversations": len(part.examples), "tokens": part.statistics.tokens}


def prepare_trl(file: Path, model: Path, cache: Path, template: str) -> dict[str, float]:
    """Prepare by TRL's SFTTrainer, by the model's own template with as many processes as there are cores."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    small = LlamaForCausalLM(shape).to(torch.float32)
    cores = len(os.sched_getaffinity(0))
    words = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    settings = SFTConfig(output_dir=str(cache / "trl"), max_length=None, dataset_num_proc=cores, **words)
    start = time.perf_counter()
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache / "datasets"))
    trainer = SFTTrainer(small, args=settings, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    lengths = trainer.train_dataset.with_format("arrow")["input_ids"]
    return {"seconds": seconds, "conversations": len(trainer.train_dataset), "tokens": sum(len(row) for row in lengths)}


def measured(who: str, file: Path, model: Path, template: str) -> dict[str, float]:
    """Run one of them in a process of its own; adds the peak of what it and its children hold, in MiB (shared pages divided)."""
    with tempfile.TemporaryDirectory() as cache:
        words = ["--template", template, "--run", who, str(file), str(model), cache]
        command = [sys.executable, "-W", "ignore", "-m", "bench.prepare", *words]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        peak = [0.0]
        watching = threading.Thread(target=_watch, args=(process, peak), daemon=True)
        watching.start()
        said, _ = process.communicate()
        watching.join()
        if process.returncode:
            raise SystemExit(f"{who} failed with {process.returncode}")
        return {**json.loads(said.splitlines()[-1]), "peak_mib": peak[0]}


def _watch(process: subprocess.Popen[str], peak: list[float]) -> None:
    while process.poll() is None:
        total = 0
        try:
            mother = psutil.Process(process.pid)
            for one in [mother, *mother.children(recursive=True)]:
                total += one.memory_full_info().pss
        except psutil.Error:
            pass
        peak[0] = max(peak[0], total / 2**20)
        time.sleep(0.1)


def main() -> None:
    """Measure in turn, print each round and the ratio of the medians."""
    parser = argparse.ArgumentParser(prog="python -m bench.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("tunesmith", "trl"))
    parser.add_argument("--template", default="own", help="data.template of ours (own, as TRL's, or chatml)")
    parser.add_argument("--run", nargs=4, metavar=("WHO", "FILE", "MODEL", "CACHE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        who, *paths = asked.run
        print(json.dumps({"tunesmith": prepare_ours, "trl": prepare_trl}[who](*map(Path, paths), asked.template)))
        return
    from tunesmith.compose import compose
    from tunesmith.model import model_folder

    model = model_folder(compose(["+exp=lora_cpu"]).model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversations.jsonl"
        count = write_conversations(file, asked.mib * 2**20)
        print(f"{count:,} conversations, {asked.mib} MiB, {len(os.sched_getaffinity(0))} cores")
        seconds: dict[str, list[float]] = {}
        for number in range(asked.rounds):
            for who in ("tunesmith", "trl") if not asked.only else (asked.only,):
                found = measured(who, file, model, asked.template)
                seconds.setdefault(who, []).append(found["seconds"])
                rate = found["conversations"] / found["seconds"]
                again = f", second start {found['again_s']:.2f} s" if "again_s" in found else ""
                print(
                    f"round {number + 1}  {who:<10} {found['seconds']:7.1f} s  {rate:8,.0f} conversations/s  {found['tokens']:,} tokens  "
                    f"peak {found['peak_mib']:,.0f} MiB{again}",
                    flush=True,
                )
        if len(seconds) == 2:
            print(f"tunesmith prepares {median(seconds['trl']) / median(seconds['tunesmith']):.2f} times as fast as TRL")


if __name__ == "__main__":
    main()
