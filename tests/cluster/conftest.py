"""A real Slurm cluster of two nodes, made of namespaces on this machine, and what tests do on it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "pdsh", "sshd", "ip", "nsenter", "unshare")
STARTER = Path(__file__).with_name("cluster.sh")
SHARED = Path("/srv/shared")
"""The shared folder, as programs in the cluster call it."""


@dataclass(frozen=True)
class Cluster:
    """The running cluster: commands run on its login node; files are read where they lie outside of it."""

    state: Path
    pid: int
    """Of the login node's first process."""

    def run(self, *command: str, check: bool = True, folder: Path = SHARED, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, in the shared folder, and wait for its end."""
        process = self.start(*command, folder=folder)
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert not check or process.returncode == 0, f"{command}\n{out}\n{err}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def start(self, *command: str, folder: Path = SHARED) -> subprocess.Popen[str]:
        """Start a command on the login node."""
        enter = ["nsenter", "-t", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--", "env", f"--chdir={folder}"]
        env = environment({"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "VENV": sys.prefix})
        return subprocess.Popen([*enter, *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def launch(self, words: Sequence[str], *options: str) -> str:
        """Submit by the launcher, and give the job's id."""
        done = self.run(sys.executable, "-m", "launcher", *words, "--slurm", *options)
        return done.stdout.split()[-1]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return self.tasks(job)[0]

    def tasks(self, job: str) -> list[dict[str, str]]:
        """What Slurm says of each task of an array; a job alone is one."""
        shown = self.run("scontrol", "-d", "-o", "show", "job", job).stdout.splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown]

    def outside(self, folder: Path) -> Path:
        """Where a folder of the cluster is for the test."""
        return self.state / folder.relative_to("/srv")

    def until(self, what: Callable[[], Any], jobs: Sequence[str], timeout_s: float = 150) -> Any:
        """Poll until `what` gives something true, and give that; fails with all that is known of `jobs` if it does not."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.1)
        known = "\n".join(f"{self.job(job)}" for job in jobs)
        pytest.fail(f"not within {timeout_s} s\n{known}\n{self.told()}")

    def ended(self, job: str, timeout_s: float = 150) -> str:
        """Wait for a job's end, and give its state as Slurm calls it; that of a task that did not complete, if any."""
        going = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED"}

        def state() -> str:
            found = {task["JobState"] for task in self.tasks(job)}
            return "" if found & going else max(found, key=lambda name: name != "COMPLETED")

        return str(self.until(state, [job], timeout_s))

    def told(self) -> str:
        """The last lines of what all jobs have printed."""
        files = sorted((self.state / "shared").rglob("*.out"), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"--- {path}\n{path.read_text()[-4000:]}" for path in files[-2:])

    def ranks(self, node: str = "") -> list[str]:
        """Process ids of the ranks on a node, or on all, as the login node counts them."""
        rows = self._processes()
        home = next((place for _, place, words in rows if words == f"bash {STARTER} node {node}"), "")
        return [pid for pid, place, words in rows if re.match(r"\S*python\S* (-u )?\S*/train\.py ", words) and (not node or place == home)]

    def launchers(self) -> list[str]:
        """Process ids of the launchers at work on the login node."""
        return [pid for pid, _, words in self._processes() if re.match(r"\S*python\S* -m launcher ", words)]

    def crash(self, node: str) -> None:
        """A power failure: nothing comes from the node any more, not even the end of a connection."""
        self.run("ip", "link", "set", f"v{node}", "down")
        (first, *_) = [pid for pid, _, words in self._processes() if words == f"bash {STARTER} node {node}"]
        self.run("kill", "-KILL", first)

    def switch_on(self, node: str) -> None:
        self.run("bash", str(STARTER), "switch_on", node)

    def configure(self, old: str, new: str) -> None:
        """Change a line of slurm.conf while Slurm runs."""
        conf = self.state / "slurm" / "slurm.conf"
        text = conf.read_text()
        assert old in text
        conf.write_text(text.replace(old, new))
        self.run("scontrol", "reconfigure")

    def _processes(self) -> list[list[str]]:
        """Process id, host-name namespace and command line."""
        return [row.split(maxsplit=2) for row in self.run("ps", "--no-headers", "-ww", "-eo", "pid,utsns,args").stdout.splitlines()]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid():
        pytest.skip("a Slurm cluster in namespaces needs root")
    here = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=here) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge pdsh openssh-server iproute2)")
    state = Path(tempfile.mkdtemp(prefix="tunesmith-slurm-", dir="/var/tmp"))
    state.chmod(0o755)
    with (state / "login.out").open("w") as out:
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        # With --pdeathsig the cluster ends also when the tests are killed.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", str(STARTER), "login", str(state)]
        outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (state / "ready").exists():
            told = f"{(state / 'login.out').read_text()}\n{[path.read_text()[-2000:] for path in (state / 'log').glob('*')]}"
            assert outer.poll() is None and time.monotonic() < end, f"the cluster did not start:\n{told}"
            time.sleep(0.05)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        yield Cluster(state, int(children[0]))
    finally:
        outer.send_signal(signal.SIGKILL)
        outer.wait()
        shutil.rmtree(state, ignore_errors=True)
