"""Hydra's own -m under submitit on a real Slurm."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.test_cluster import Run, nothing_left, run  # noqa: F401
from tests.conftest import ROOT

pytestmark = pytest.mark.launch


def test_a_preempted_trial_is_queued_again(cluster: Cluster, run: Run) -> None:  # noqa: F811
    words = [word for word in run.words if not word.startswith(("engine", "slurm"))] + ["engine=accelerate"]
    options = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=60"]
    with ThreadPoolExecutor() as pool:
        sweep = pool.submit(cluster.run, "env", "-C", str(ROOT), sys.executable, "train.py", "-m", *options, *words, "train.steps=600,601", check=False)
        try:
            cluster.until(lambda: run.steps >= 6 and len(run.folders) == 2, [], 60)
            print(cluster.run("squeue").stdout, cluster.run("scontrol", "show", "job").stdout)
            rival = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1").stdout.strip()
            cluster.ended(rival)
            done = sweep.result(90)
            print(done.stdout[-3000:], done.stderr[-3000:])
        finally:
            print(cluster.run("squeue").stdout)
            import subprocess
            print(subprocess.run(f"tail -n 40 $(find {cluster.state}/shared -name '*_log.*')", shell=True, capture_output=True, text=True).stdout[-12000:])
    import json
    print([json.loads((f / "status.json").read_text()) for f in run.folders], [ (f/"metrics.jsonl").read_text().count("\n") for f in run.folders])
    assert done.returncode == 0
