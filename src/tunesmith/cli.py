"""The `tunesmith` command: everything one does with a run besides training it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tunesmith.compose import stored_config
from tunesmith.config import Refusal
from tunesmith.hardware import prepare_environment, this_machine
from tunesmith.run import refuse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says; a user's mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="tunesmith", description="Work with runs. Training: deepspeed train.py +exp=NAME")
    commands = parser.add_subparsers(dest="command", required=True)
    chat = commands.add_parser("chat", help="talk with what a run made")
    chat.add_argument("run", type=Path, help="the run folder, outputs/NAME/ID")
    chat.add_argument("--once", metavar="TEXT", help="answer this one text and leave")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    report = commands.add_parser("report", help="write a run's report.html anew")
    report.add_argument("run", type=Path, help="the run folder, outputs/NAME/ID")
    asked = parser.parse_args(arguments)
    try:
        if not (asked.run / "config.yaml").is_file():
            raise Refusal(f"{asked.run}: not a run folder (no config.yaml) — name a folder outputs/NAME/ID")
        prepare_environment(on_cpu=this_machine().kind == "cpu")
        if asked.command == "chat":
            from tunesmith.chat import chat as talk

            talk(asked.run, stored_config(asked.run), asked.once, asked.max_new_tokens)
        else:
            from tunesmith.report import write_report

            print(write_report(asked.run))
    except Refusal as refusal:
        refuse(refusal)

if __name__ == "__main__":
    main()
