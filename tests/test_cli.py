"""The `tunesmith data` and `tunesmith plan` commands, as one types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment, launch, tiny_conversations
from tunesmith import cli
from tunesmith.config import Prepare, Refusal
from tunesmith.hardware import FAKE_MACHINE


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> list[str]:
    return ["model=local", f"model.path={tiny_model}", f"data.cache={tmp_path / 'cache'}"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in tiny_conversations(30)))
    return path


@pytest.fixture(autouse=True)
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal ends the process; here it is raised."""

    def refuse(refusal: Refusal) -> None:
        raise refusal

    monkeypatch.setattr(cli, "refuse", refuse)


def test_plan_prints_what_a_run_takes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE_MACHINE, json.dumps({"kind": "cpu", "cores": 8, "ram_gib": 64}))
    cli.main(["plan", "+exp=qlora_t4"])
    said = capsys.readouterr().out
    assert said.startswith("note     planned for 1 x t4, which is not here\n")
    assert re.search(r"^memory +[\d.]+ of 14\.6 GiB a rank", said, re.M)
    assert re.search(r"^time +[\d.]+ s a step", said, re.M)
    cli.main(["plan", "+exp=lora_a10", "--ranks", "4"])
    assert "on       4 x a10\n" in capsys.readouterr().out
    cli.main(["plan", "--fit", "+exp=qlora_t4"])
    assert capsys.readouterr().out.startswith("What fits on 1 x Tesla T4: qwen2.5-7b in fp16")


def test_a_plan_that_reads_the_data_reckons_with_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [f"data.{setting}" for setting in ("prepare_train=64", "prepare_dev=8", "prepare_test=8")]
    words = ["plan", "+exp=demo_tools", f"data.folder={tmp_path}/data", f"data.cache={tmp_path}/tokens", *few]
    texts = []
    for more in ([], ["--data"]):
        cli.main([*words, *more])
        texts.append(capsys.readouterr().out)
    assert "note     reckoned with 3,200 tokens in every conversation and nothing shared; --data reads" in texts[0]
    assert "reckoned" not in texts[1]
    unread, read = (float(re.search(r"^compute  at most ([\d.]+) TFLOP", said, re.M)[1]) for said in texts)
    assert read < unread / 10, "3,063 tokens of tools are read once; an update computes about 32 tokens of each of 8 conversations"
    with pytest.raises(Refusal, match=r"^--data --fit: "):
        cli.main([*words, "--data", "--fit"])


def test_a_plan_that_does_not_fit_is_one_line_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE_MACHINE, json.dumps({"kind": "cpu", "cores": 8, "ram_gib": 64}))
    with pytest.raises(Refusal) as refused:
        cli.main(["plan", "+exp=lora_t4", "model=qwen2_5_7b", "data.max_tokens=2048"])
    (line,) = str(refused.value).splitlines()
    fact, _, advice = line.partition(" — type ")
    assert re.fullmatch(r"data\.max_tokens=2048: qwen2.5-7b with 1 x 2048 tokens needs [\d.]+ GiB a rank, and the card is 14\.6 GiB", fact)
    assert advice.count(" GiB)") == 3, "nearer ones that fit; what does not fit is not advised"
    with pytest.raises(Refusal, match=r"^--ranks -1: "):
        cli.main(["plan", "+exp=lora_cpu", "--ranks=-1"])


@pytest.mark.parametrize(
    ("words", "code"), [(["+exp=qlora_t4"], 0), (["+exp=qlora_t4", "--fit"], 0), (["+exp=full_t4", "model=qwen2_5_7b"], 2)]
)
def test_a_plan_takes_less_than_two_seconds_and_no_torch(words: list[str], code: int) -> None:
    program = (
        "import sys\nfrom tunesmith import cli, run\n"
        "run.os._exit = lambda code: (print('torch' in sys.modules), sys.stdout.flush(), sys.exit(code))\n"
        f"cli.main({['plan', *words]!r})\nprint('torch' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert time.perf_counter() - start < 2
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (code == 2)


def test_files_take_the_place_of_what_the_experiment_reads() -> None:
    config = cli.data_config(["a.jsonl", "+exp=lora_cpu", "b.jsonl", "data.max_tokens=99"])
    assert (config.data.train, config.data.dev, config.data.test) == ("a.jsonl,b.jsonl", "", "")
    assert (config.name, config.data.max_tokens, config.data.prepare) == ("lora_cpu", 99, Prepare.none)
    config = cli.data_config(["a.jsonl", "data.dev=d.jsonl"])
    assert (config.name, config.data.train, config.data.dev) == ("data", "a.jsonl", "d.jsonl")
    config = cli.data_config(["+exp=lora_cpu"])
    assert (config.data.train, config.data.dev, config.data.prepare) == ("train.json", "dev.json", Prepare.smart_home)


def test_check_counts_and_ranks(file: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data", "check", str(file), *words])
    said = capsys.readouterr().out
    assert "data.train: 30 conversations, 30 used" in said
    assert re.search(r"tokens +[\d,]+, of which [\d,]+ targets", said)
    assert re.search(rf"least like the rest.*\n +\d+\.\d\d  {re.escape(str(file))}:\d+  ", said)


def test_check_refuses_and_still_counts(file: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with file.open("a") as stream:
        stream.write('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}\n{oops\n')
    with pytest.raises(Refusal) as refused:
        cli.main(["data", "check", str(file), *words])
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"{file}:31 turn 2: two user turns in a row")
    assert lines[1].startswith(f"{file}:32: not JSON")
    assert lines[2].startswith("data.train: 1 user_after_user, 1 broken_json — data.check.KIND=skip")
    assert "data.train: 32 conversations, 30 used" in capsys.readouterr().out
    cli.main(["data", "check", str(file), *words, "data.check.user_after_user=skip", "data.check.broken_json=skip"])
    said = capsys.readouterr().out
    assert "data.check.user_after_user=skip: data.train, of 32 conversations 1 are left out" in said
    assert "data.check.broken_json=skip: data.train, of 32 conversations 1 are left out" in said


def test_show_marks_what_is_learned(file: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data", "show", str(file), "-n", "2", "--first", "1", *words])
    said = capsys.readouterr().out
    assert said.count("HassTurnOn(area='") == 2
    assert re.search(r"«HassTurnOn\(area='garage'\)<\|im_end\|>»", said)
    assert "«turn on" not in said


def test_show_writes_a_page(file: Path, words: list[str], tmp_path: Path) -> None:
    cli.main(["data", "show", str(file), "--html", str(tmp_path / "page.html"), *words])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "HassTurnOn" in page
    assert "garage" in page


def test_a_missing_file_is_one_line(words: list[str], tmp_path: Path) -> None:
    for command in ("check", "show"):
        with pytest.raises(Refusal, match=r"nothing\.jsonl: no such file") as refused:
            cli.main(["data", command, str(tmp_path / "nothing.jsonl"), *words])
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("method", [["method.dora=true"], ["method=full"], ["method.modules_to_save=[embed_tokens]"]])
def test_export_writes_a_model_that_answers_as_the_run_does(
    method: list[str], overrides: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.model import read_adapter

    words = [*overrides, "engine=accelerate", "train.steps=2", "optim.warmup_steps=0", "eval.before=false", "eval.after=false", *method]
    done = launch("python", words)
    assert done.code == 0, done.output
    cli.main(["export", str(done.run), str(tmp_path / "merged")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    ids = torch.arange(40)[None]
    result = done.run / ("model" if method == ["method=full"] else "adapter")
    with torch.no_grad():
        wanted = read_adapter(result, tiny_model)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(merged(ids).logits, wanted, atol=1e-5)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits, wanted, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("hi") == AutoTokenizer.from_pretrained(tiny_model).encode("hi")
    with pytest.raises(Refusal, match="exists already"):
        cli.main(["export", str(done.run), str(tmp_path / "merged")])
    with pytest.raises(Refusal, match="in transformers' own layout already"):
        cli.main(["export", str(done.run), str(tmp_path / "other"), "--original"])
    assert not (tmp_path / "other").exists()


def test_export_of_what_cannot_be_merged_is_refused(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, "engine=accelerate", "train.steps=1", "optim.warmup_steps=0", "data.max_tokens=512", "eval.before=false", "eval.after=false", "method=prefix", "method.virtual_tokens=4"]
    done = launch("python", words)
    assert done.code == 0, done.output
    with pytest.raises(Refusal, match="PREFIX_TUNING adds virtual tokens, which no weight can hold"):
        cli.main(["export", str(done.run), str(tmp_path / "merged")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_bytes((done.run / "config.yaml").read_bytes())
    for verb in (["export", str(tmp_path / "empty"), str(tmp_path / "merged")], ["chat", str(tmp_path / "empty"), "--once", "hi"]):
        with pytest.raises(Refusal, match="no adapter and no model in it"):
            cli.main(verb)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("words", ["plan +exp=lora_a10 --fit", "plan +exp=lora_cpu", "doctor --matrix"])
def test_a_reader_that_leaves_is_no_mistake(words: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m tunesmith.cli {words} | true"], capture_output=True, text=True, env=environment(), timeout=120
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_other_mistakes_are_not_taken_for_a_reader_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a mistake of ours"), BrokenPipeError("of another process")):

        def answer(arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cli, "_answer", answer)
        with pytest.raises(type(error), match=str(error)):
            cli.main([])
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m tunesmith.cli plan +exp=lora_cpu >&-"], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, ""), "nobody reads it at all"
