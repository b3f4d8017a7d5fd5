"""TRL's SFTTrainer under the comparison of bench/train.py; runs in an environment of its own, without tunesmith.

Its order of conversations is given, the longest of a step first: so its micro-batches hold conversations of like length (what its
group_by_length does over the whole data) and its updates are of the same conversations as ours.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

# E402: imports write warnings and log lines, which are silenced first, and `protocol` lies beside this file.
import datasets  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from protocol import Worker  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""What the model's own template writes, with TRL's mark around what is learned."""


class Windows(TrainerCallback):
    """Hands each update to the comparison."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def on_step_end(self, *_: object, **__: object) -> None:
        self.worker.step_done()

    def on_log(self, _args: object, _state: object, _control: object, logs: dict[str, float], **__: object) -> None:
        if "loss" in logs:
            self.worker.losses.append(logs["loss"])


def main(asked: dict) -> None:
    torch.set_num_threads(asked["threads"])
    if limit := int(asked["limit_gib"] * 2**30):  # a setting that is only tried: it fails alone, before the machine has no memory left
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def held_out() -> float:
        """Over target tokens, not over batches as Trainer.evaluate has it."""
        rows, model = list(trainer.eval_dataset), trainer.model
        model.eval()
        count = sum(label != -100 for row in rows for label in row["labels"][1:])
        with torch.no_grad():
            batches = [trainer.data_collator([row]) for row in rows]
            total = sum(float(trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(count))) for batch in batches)
        model.train()
        return total

    worker = Worker(held_out)
    worker.imported()
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output, max_length=None, assistant_only_loss=True, padding_free=asked["padding_free"],
            per_device_train_batch_size=asked["micro_batch"], gradient_accumulation_steps=asked["per_step"] // asked["micro_batch"],
            gradient_checkpointing=False, train_sampling_strategy="sequential", max_steps=asked["steps"], learning_rate=asked["lr"],
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", seed=0,
            use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
            torch_compile=asked.get("compile", False),
        )  # fmt: skip
        parts = {name: datasets.load_dataset("json", data_files=asked[name], split="train") for name in ("train", "dev")}
        if asked["order"]:
            parts["train"] = parts["train"].select(asked["order"])
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model, args=settings, train_dataset=parts["train"], eval_dataset=parts["dev"], processing_class=tokenizer, peft_config=lora,
            callbacks=[Windows(worker)],
        )  # fmt: skip
        if asked["tokens"]:  # what it would train on, for the other side to look at
            rows = {name: part for name, part in (("train", trainer.train_dataset), ("dev", trainer.eval_dataset))}
            facts = {name: [[row["input_ids"], [label != -100 for label in row["labels"]]] for row in part] for name, part in rows.items()}
            trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
            Path(asked["tokens"]).write_text(json.dumps(facts | {"trained": trained}))
            return
        trainer.train()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(json.loads(sys.argv[1]))
