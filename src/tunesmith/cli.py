"""The `tunesmith` command: everything one does with data and with runs besides training."""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.compose import compose, drop_local_rank, stored_config
from tunesmith.config import Config, Prepare, Refusal
from tunesmith.hardware import prepare_environment, this_machine
from tunesmith.run import RunFolder, refuse
from tunesmith.world import World

if TYPE_CHECKING:
    from tunesmith.data import Conversation
    from tunesmith.data.templates import Rendered, Renderer

MOST_UNLIKELY = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says; a user's mistake ends with one line and exit code 2."""
    try:
        _answer(arguments)
    except BrokenPipeError:
        if not _reader_left():
            raise
        sys.exit(1)  # half an answer: a doctor has not said yet what it found
    except SystemExit:
        _reader_left()
        raise
    _reader_left()


def _reader_left() -> bool:
    """Write what is left of standard output; whether whoever reads it has left, as `head` does. Python's own last flush is silent then."""
    with suppress(BrokenPipeError):
        print(end="", flush=True)
    pipe = select.poll()
    pipe.register(1, 0)
    if not any(seen & (select.POLLERR | select.POLLHUP) for _, seen in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _answer(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="tunesmith", description="Work with data and runs. Training: deepspeed train.py +exp=NAME")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="look at training data before it is trained on").add_subparsers(dest="what", required=True)
    check = data.add_parser("check", help="find what is wrong with files, and count what is in them")
    show = data.add_parser("show", help="show conversations as the model reads them, with what it learns marked")
    for one in (check, show):
        words = "files, folders or globs (none: what +exp=NAME reads), and words as for train.py"
        one.add_argument("words", nargs="*", metavar="FILE|KEY=VALUE", help=words)
        one.add_argument("--html", type=Path, metavar="PAGE", help="write a page that needs no network")
        one.add_argument("-n", type=int, default=3, metavar="COUNT", help="conversations shown (3)")
        one.add_argument("--first", type=int, default=0, metavar="INDEX", help="the first one that is shown, from 0")
    doctor = commands.add_parser("doctor", help="look for what would keep a run from starting, or slow it down")
    doctor.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for train.py, e.g. +exp=lora_a10")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument("--matrix", action="store_true", help="what is legal on which card")
    plan = commands.add_parser("plan", help="what a run would take before it is started: memory, time, cost; or what fits on a card")
    plan.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for train.py, e.g. +exp=qlora_t4")
    plan.add_argument("--ranks", type=int, default=0, metavar="N", help="ranks (hardware.count, or a rank for each card that is here)")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that the ranks are on (1)")
    plan.add_argument("--fit", action="store_true", help="what fits: methods and ZeRO stages down, lengths across")
    plan.add_argument("--data", action="store_true", help="read the data first, as a run does, and reckon with what is in it")
    chat = commands.add_parser("chat", help="talk with what a run made")
    chat.add_argument("run", type=Path, help="the run folder, outputs/NAME/ID")
    chat.add_argument("--once", metavar="TEXT", help="answer this one text and leave")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    export = commands.add_parser("export", help="write what a run made as a model of its own, adapters merged into the base")
    export.add_argument("run", type=Path, help="the run folder, outputs/NAME/ID")
    export.add_argument("out", type=Path, help="the folder to write, which must not exist")
    export.add_argument("--original", action="store_true", help="in ChatGLM's published layout, for its own code")
    report = commands.add_parser("report", help="write a run's report.html anew")
    report.add_argument("run", type=Path, help="the run folder, outputs/NAME/ID")
    add_comparing(commands)
    asked, more = parser.parse_known_args(drop_local_rank(list(sys.argv[1:] if arguments is None else arguments)))
    if any(word.startswith("-") for word in more) or (more and not hasattr(asked, "words")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # words after an option: argparse takes only those in one piece
        asked.words += more
    try:
        if asked.command == "data":
            look_at_data(asked)
            return
        if asked.command == "doctor":
            from tunesmith.doctor import doctor as examine
            from tunesmith.doctor import matrix_table

            if asked.matrix:
                print(matrix_table())
                return
            sys.exit(examine(asked.words, asked.json))
        if asked.command == "plan":
            print(planned(asked))
            return
        if asked.command in COMPARING:
            COMPARING[asked.command](asked)
            return
        if not (asked.run / "config.yaml").is_file():
            raise Refusal(f"{asked.run}: not a run folder (no config.yaml) — name a folder outputs/NAME/ID")
        prepare_environment(on_cpu=this_machine().kind == "cpu")
        if asked.command == "chat":
            from tunesmith.chat import chat as talk

            talk(finished(asked.run), stored_config(asked.run), asked.once, asked.max_new_tokens)
        elif asked.command == "export":
            from tunesmith.model.export import export as write_model

            write_model(finished(asked.run), stored_config(asked.run).model, asked.out, asked.original)
            print(asked.out)
        else:
            from tunesmith.report import write_report

            print(write_report(asked.run))
    except Refusal as refusal:
        refuse(refusal)


def add_comparing(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The words of what looks at many runs."""
    runs = commands.add_parser("runs", help="what runs there are, and how far they are")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), metavar="FOLDER", help="where runs are (outputs)")
    runs.add_argument("--watch", action="store_true", help="go on until all are over, or Ctrl-C")
    runs.add_argument("--json", action="store_true", help="for programs")
    compare = commands.add_parser("compare", help="runs side by side: what differs, what came of it, and what of that is noise")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of runs (outputs/NAME), or patterns of them")
    compare.add_argument("--quality", default="", metavar="METRIC", help="what runs are judged by (dev/loss)")
    compare.add_argument("--against", default="", metavar="METRIC", help="what that is held against (run/cost, else run/hours)")
    compare.add_argument("--html", type=Path, metavar="PAGE", help="write a page that needs no network")
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write a row a run")
    differ = commands.add_parser("diff", help="two runs: settings, data, versions, and what came of it")
    differ.add_argument("runs", nargs=2, metavar="RUN", help="a run folder, outputs/NAME/ID")
    view = commands.add_parser("wandb-view", help="save a workspace with these tables and charts in a W&B project")
    view.add_argument("project", nargs="?", default="tunesmith", help="the W&B project (tunesmith)")
    view.add_argument("--entity", default="", help="team or user (the account's own)")
    view.add_argument("--name", default="tunesmith", help="what the view is called")
    view.add_argument("--quality", default="dev/loss", metavar="METRIC", help="what runs are judged by (dev/loss)")


def look_at_runs(asked: argparse.Namespace) -> None:
    """The runs below a folder, as a table or for programs."""
    from tunesmith.compare import Glance, find_runs, glance
    from tunesmith.report.terminal import show_runs

    def glances() -> list[Glance]:
        return [glance(run) for run in find_runs([str(asked.folder)])]

    if not asked.json:
        show_runs(glances, asked.watch)
        return
    found = [vars(one) for one in glances()]
    plain = [{key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in one.items()} for one in found]
    print(json.dumps(plain, indent=1, ensure_ascii=False))


def compare_runs(asked: argparse.Namespace) -> None:
    """Runs side by side, in the terminal and in files."""
    from tunesmith.compare import Run, compare, find_runs
    from tunesmith.report.compare_page import BRAND, write_compare_page
    from tunesmith.report.terminal import check_ours, show_comparison, write_csv

    found = compare([Run(run) for run in find_runs(asked.runs)], asked.quality, asked.against)
    if asked.html:
        check_ours(asked.html, BRAND)
    if asked.csv:
        write_csv(asked.csv, found)
    show_comparison(found)
    if asked.html:
        write_compare_page(asked.html, found)
        print(f"\n{asked.html}")


def diff_runs(asked: argparse.Namespace) -> None:
    """What differs between two runs."""
    from tunesmith.compare import Run, difference
    from tunesmith.compare.runs import is_run
    from tunesmith.report.terminal import show_difference

    for word in asked.runs:
        if not is_run(Path(word)):
            raise Refusal(f"{word}: not a run folder (no config.yaml) — name a folder outputs/NAME/ID")
    first, second = (Run(Path(word)) for word in asked.runs)
    show_difference([first.name, second.name], difference(first, second))


def save_view(asked: argparse.Namespace) -> None:
    """A workspace in W&B with the panels of a comparison."""
    from tunesmith.metrics.wandb_view import save

    print(save(asked.project, asked.entity, asked.name, asked.quality))


COMPARING = {"runs": look_at_runs, "compare": compare_runs, "diff": diff_runs, "wandb-view": save_view}


def finished(run: Path) -> Path:
    """What a run left, an adapter or a model; raises Refusal if there is none yet."""
    folder = RunFolder(run, World())
    if not folder.result.is_dir():
        raise Refusal(f"{run}: no adapter and no model in it — is the run complete? (status: {folder.status().get('state', 'none')})")
    return folder.result


def planned(asked: argparse.Namespace) -> str:
    """The plan of a run, or what fits; raises Refusal where it cannot go as asked."""
    from tunesmith.plan import UNCOUNTED, shape_needs_files
    from tunesmith.plan.table import plan_text

    if asked.ranks < 0:
        raise Refusal(f"--ranks {asked.ranks}: a run has at least one — type --ranks 1")
    if asked.nodes < 1:
        raise Refusal(f"--nodes {asked.nodes}: a run has at least one — type --nodes 1")
    if asked.data and asked.fit:
        raise Refusal("--data --fit: what fits goes over lengths, not over those of some data — leave one of them out")
    config, folder, counts = compose(asked.words), None, UNCOUNTED
    if asked.data or shape_needs_files(config.model.path, config.model.known_as):
        from tunesmith.model.source import model_folder

        folder = model_folder(config.model)
    if asked.data:
        from tunesmith import data, model

        data.prepare_files(config)
        counts = data.load(config, model.load_tokenizer(folder or model.model_folder(config.model))).counts(config)
    return plan_text(
        config, this_machine(), counts=counts, ranks=asked.ranks, nodes=asked.nodes, table=asked.fit, model_folder=folder
    )  # fmt: skip


def data_config(words: Sequence[str]) -> Config:
    """The config that files and overrides stand for: files take the place of all that an experiment reads."""
    is_override = [word.startswith(("+", "~")) or ("=" in word and not Path(word).exists()) for word in words]
    overrides = [word for word, yes in zip(words, is_override, strict=True) if yes]
    files = [word for word, yes in zip(words, is_override, strict=True) if not yes]
    if not any(word.lstrip("+").startswith(("exp=", "name=")) for word in overrides):
        overrides = ["name=data", *overrides]
    config = compose(overrides)
    if files:
        config.data.folder, config.data.train, config.data.prepare = "", ",".join(files), Prepare.none
        for part in ("dev", "test"):
            if not any(word.startswith(f"data.{part}=") for word in overrides):
                setattr(config.data, part, "")
    return config


def look_at_data(asked: argparse.Namespace) -> None:
    """Check or show data; raises Refusal for what would keep a run from starting."""
    config = data_config(asked.words)
    prepare_environment(on_cpu=this_machine().kind == "cpu")
    from tunesmith import data, model
    from tunesmith.data.ngram import rank_unlikely
    from tunesmith.data.templates import renderer_for
    from tunesmith.report.data_page import show_in_terminal, write_data_page

    data.prepare_files(config)
    renderer = renderer_for(model.load_tokenizer(model.model_folder(config.model)), config.data)
    samples = list(islice(rendered(config, renderer), asked.first, asked.first + asked.n)) if asked.what == "show" or asked.html else []
    if asked.what == "show":
        for conversation, tokens in samples:
            show_in_terminal(sys.stdout, conversation, tokens, renderer.tokenizer)
        if not asked.html:
            return
    parts = data.survey(config, renderer)
    print(f"tokens and template as of {config.model.path}, {type(renderer).__name__}")
    for name, part in parts.items():
        print(f"\ndata.{name}: {part.read:,} conversations, {len(part.examples):,} used")
        for line in [*part.statistics.lines(), *part.notes(config.data)]:
            print(f"  {line}")
    unlikely = rank_unlikely(parts["train"].examples, MOST_UNLIKELY) if len(parts["train"].examples) else []
    if unlikely and asked.what == "check":
        print("\nleast like the rest (nats a target token, by an n-gram model of the others):")
        for one in unlikely:
            text = " ".join(renderer.tokenizer.decode(one.ids[:60].tolist(), skip_special_tokens=True).split())
            print(f"  {one.nats:6.2f}  {one.place}  {text[:100]}")
    if asked.html:
        write_data_page(
            asked.html, title=config.data.train, samples=samples, tokenizer=renderer.tokenizer,
            statistics={name: part.statistics for name, part in parts.items()}, unlikely=unlikely,
            findings=[row for part in parts.values() for row in part.table()],
        )  # fmt: skip
        print(f"\n{asked.html}")
    if problems := [line for part in parts.values() for line in part.problems(config.data)]:
        raise Refusal("\n".join(problems))


def rendered(config: Config, renderer: Renderer) -> Iterator[tuple[Conversation, Rendered]]:
    """The training conversations in file order, as they are read; raises Refusal at one that cannot be."""
    from tunesmith.data.conversations import parse_conversation
    from tunesmith.data.files import Mistake, sources

    for source in sources(config.data.train, Path(config.data.folder)):
        for place, record in source.records():
            try:
                conversation = parse_conversation(record, place, config.data)
            except Mistake as mistake:
                print(f"{mistake}\n", file=sys.stderr)
                continue
            yield conversation, renderer.render(conversation)


if __name__ == "__main__":
    main()
