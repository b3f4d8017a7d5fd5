"""The page of a run: its numbers are the run's, it holds no markup of others, and it needs nothing but itself."""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.report import read_metrics, write_report

MEANS = {"data": 0.02, "forward": 4.0, "backward": 7.5, "optimizer": 0.3, "communication": 0.0, "other": 0.1}


def metrics(steps: int) -> list[dict[str, Any]]:
    rng, rows, now = random.Random(0), [], 1.75e9
    for step in range(1, steps + 1):
        warm = 3.0 if step <= 2 else 1.0  # the first two steps are slow: medians must not see them
        phases = {f"time/{name}_s": mean * warm * rng.uniform(0.97, 1.03) for name, mean in MEANS.items()}
        tokens, target, step_s = rng.randint(5600, 6400), rng.randint(700, 900), sum(phases.values())
        loss = 0.3 + 2.7 * math.exp(-step / 18) + rng.gauss(0, 0.04)
        rows.append(
            {"step": step, "time": (now := now + step_s), "train/loss": loss, "train/lr": 2e-4, "train/grad_norm": 1.1}
            | {"speed/computed_tokens_per_s": tokens / step_s, "speed/target_tokens_per_s": target / step_s}
            | {"speed/conversations_per_s": 16 / step_s, "speed/tflops_per_device": 0.351, "speed/mfu": 0.412}
            | {"speed/hfu": 0.437, "time/step_s": step_s, "memory/peak_gib": 2.71 + 0.001 * (step == 7), **phases}
            | {"data/computed_tokens": tokens, "data/target_tokens": target, "data/padding_tokens": tokens // 50}
            | {"plan/step_s": 2.5, "plan/tokens_per_s": 2400.0, "plan/peak_gib": 2.582}
            | ({"dev/loss": loss + 0.05, "dev/perplexity": math.exp(loss + 0.05)} if step % 20 == 0 else {})
        )
    return rows


def make_run(folder: Path, steps: int = 120, **files: Any) -> Path:
    """A run folder as the program leaves it; a file given as None is left out."""
    run = folder / "outputs" / "smart_home" / "3f9a01c7"
    run.mkdir(parents=True)
    call = '{"name": "HassTurnOn", "arguments": {"area": "kitchen", "domain": "light"}}'
    before = {"dev/loss": 3.021, "dev/perplexity": 20.51, "test/loss": 3.034, "test/perplexity": 20.78}
    before |= {"test/intent_accuracy": 0.115, "test/slot_f1": 0.124, "test/exact_match": 0.015, "conversations": 200}
    after = {"dev/loss": 0.349, "dev/perplexity": 1.418, "test/loss": 0.352, "test/perplexity": 1.422}
    after |= {"test/intent_accuracy": 0.985, "test/slot_f1": 0.943, "test/exact_match": 0.91, "conversations": 200}
    texts = [
        ("turn on the kitchen lights", call, "Sure! I can help you with that. Which lights do you mean?", call),
        ("is the garage door open?", call.replace("TurnOn", "GetState"), "<script>alert(1)</script>", call),
        ("<script>alert('prompt')</script> & set it to 40%", "</script><b>ok</b>", "", "</script><b>ok</b>"),
        ("set the living room to 21 degrees", call.replace("TurnOn", "ClimateSet"), call, call),
        ("打开厨房的灯", call, "好的", call),
    ]
    samples = [dict(zip(("prompt", "reference", "before", "after"), text, strict=True)) for text in texts]
    content: dict[str, Any] = {
        "config.yaml": "name: smart_home\nmodel:\n  path: <models>/smollm2\ntrain:\n  conversations_per_step: 16\n",
        "command.txt": "python train.py +exp=smart_home_cpu train.steps=120\n",
        "plan.json": {
            "describe": "smollm2_135m, LoRA r=16 on nf4, 1 rank\n16 conversations a step = 4 x 4 accumulation",
            "micro_batch": 4,
            "accumulation": 4,
            "trainable_parameters": 4884480,
            "offload": False,
            "memory": {"weights": 0.5, "adapter": 0.018, "optimizer": 0.036, "gradients": 0.018, "activations": 2.01},
        },
        "status.json": {"state": "completed", "step": steps, "steps": steps},
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metrics(steps)),
        "evaluation.json": {"before": before, "after": {**after, "seconds": 83.2}, "samples": samples},
        "environment.json": {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "device": "cpu", "world": 1},
    }
    for name, value in (content | {name.replace("__", "."): value for name, value in files.items()}).items():
        if value is not None:
            (run / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return run


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def seen(page: str) -> str:
    """What a reader sees, roughly: the body without scripts and tags, with single spaces."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page[page.index("<body>") :].replace("<wbr>", ""), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = seen(page_of(run))
    for part in ("smart_home 3f9a01c7", "✓ completed", "120 of 120 steps in 24", "slot F1 0.124 → 0.943"):
        assert part in text
    for tile in ("0.351 TFLOPS", "41.2 %", "HFU 43.7 %", "2.71 GiB", "Padding 1.99 %", "conversations/s"):
        assert tile in text
    rows = read_metrics(run / "metrics.jsonl")
    speeds = sorted(row["speed/computed_tokens_per_s"] for row in rows[2:])
    assert f"Computed {(speeds[58] + speeds[59]) / 2:,.0f} tokens/s" in text, "median without the two warm-up steps"
    assert "Backward is 62.9 % of the time, forward 33.6 %" in text
    assert "Waiting for data is only 0.168 %" in text
    assert "test/slot_f1 0.124 0.943 +0.819 better" in text
    assert "test/loss 3.03 0.352 −2.68 better" in text
    assert "0.0150 0.910 +0.895" in text
    assert "total, planned 2.582 GiB peak, measured 2.711 GiB" in text
    assert re.search(r"Predicted and measured predicted measured a step, s 2\.50 [\d.]+ tokens/s 2,400 [\d,]+ peak memory, GiB 2\.58 2\.71", text)
    assert "python train.py +exp=smart_home_cpu train.steps=120" in text
    assert f"tunesmith chat {run}" in text
    assert "trainable_parameters 4,884,480" in text
    assert "versions.torch 2.13.0" in text
    assert text.count("✓ as wanted") == 3
    assert text.count("✗ differs") == 7


def test_charts_hold_every_step_and_every_dev_point(tmp_path: Path) -> None:
    found = re.search(r'id="charts">(.*?)</script>', page_of(make_run(tmp_path)), flags=re.DOTALL)
    assert found
    loss, speed = json.loads(found[1])
    assert [len(trace["x"]) for trace in loss["traces"]] == [120, 6]
    assert [trace["name"] for trace in speed["traces"]] == ["computed", "target"]


def test_what_comes_from_data_is_text(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert "<script>alert" not in page
    assert "<b>ok" not in page
    assert "<models>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;script&gt;alert(&#39;prompt&#39;)" in page
    assert page.count("<script") == page.count("</script>") == 3


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert "default-src 'none'" in page, "the browser itself refuses every request"
    assert not re.search(r"""\b(src|href|action|poster|srcset)\s*=|@import|url\(|https?://|<link|<iframe""", page)
    assert 'showSendToCloud: false, plotlyServerURL: ""' in page, "plotly's own button would carry the data away"
    assert len(page.encode()) < 2_500_000


def test_the_newest_line_of_a_step_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 2, "a": 1}\n{"step": 1}\n{"step": 3, "a{"step": 2, "a": 5}\n[]\n{"x": 1}\n{"step": 4, "t')
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "a": 5}]
    path.write_bytes('{"step": 1}\n{"step": 2, "note": "é'.encode()[:-1])  # torn inside a letter
    assert read_metrics(path) == [{"step": 1}]


def test_a_run_without_evaluation_or_peak(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "speed/mfu"} for row in metrics(10)]
    torn = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "train/lo'
    status = {"state": "running", "step": 10, "steps": 120}
    run = make_run(tmp_path, evaluation__json=None, metrics__jsonl=torn, status__json=status)
    text = seen(page_of(run))
    assert "running 10 of 120 steps" in text
    assert "MFU – peak not known" in text
    assert "Before and after" not in text
    assert "Sample answers" not in text
    assert "slot F1 0" not in text


def test_only_after_was_evaluated(tmp_path: Path) -> None:
    samples = [{"prompt": "p", "reference": "r", "after": "r"}]
    text = seen(page_of(make_run(tmp_path, evaluation__json={"after": {"test/loss": 0.5}, "samples": samples})))
    assert "test/loss – 0.500 –" in text
    assert "not evaluated ✓ as wanted r" in text


def test_the_ngram_model_is_beaten_or_not(tmp_path: Path) -> None:
    before = {"dev/perplexity": 20.5, "dev/ngram_perplexity": 8.85, "test/perplexity": 20.8, "test/ngram_perplexity": 8.23}
    after = before | {"dev/perplexity": 1.42, "test/perplexity": 9.1}
    text = seen(page_of(make_run(tmp_path / "a", evaluation__json={"before": before, "after": after})))
    assert "dev/perplexity 20.5 1.42 −19.1 better dev/ngram_perplexity 8.85 8.85 beaten" in text
    assert "test/ngram_perplexity 8.23 8.23 not beaten" in text
    assert "n-gram perplexity That of a 3-gram model" in text
    alone = seen(page_of(make_run(tmp_path / "b", evaluation__json={"before": before})))
    assert "dev/ngram_perplexity 8.85 – –" in alone


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "empty", metrics__jsonl=""))
    assert "No steps yet" in page
    assert "<script" not in page
    bare = tmp_path / "bare" / "id"
    bare.mkdir(parents=True)
    assert "? unknown" in page_of(bare)


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    rows = metrics(5)
    rows[-1]["train/loss"] = math.nan
    page = page_of(make_run(tmp_path, metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows)))
    assert "→ nan" in seen(page)
    assert "NaN" not in page.split('id="plotly"')[0]


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    before = page_of(run)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in run.glob(".report*")] == []


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for place, content in (("a", "{torn"), ("b", "[1, 2]")):
        with pytest.raises(ValueError, match=r"plan\.json: not a JSON object"):
            write_report(make_run(tmp_path / place, plan__json=content))


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(1, 5001))
    page = page_of(make_run(tmp_path, metrics__jsonl=rows))
    charts = re.search(r'id="charts">(.*?)</script>', page, flags=re.DOTALL)
    assert charts
    assert len(json.loads(charts[1])[0]["traces"][0]["x"]) == 1667
    assert "Thinned to at most 2,000 points" in seen(page)
