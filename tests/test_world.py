"""Who am I, under every launcher, by the variables that each one sets; contradictions; and where ranks meet."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config import Refusal
from tunesmith.world import World, rendezvous, this_world

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

DEEPSPEED = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": "1"}
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURMD_NODENAME": "node2",
}  # fmt: skip
LAUNCHERS = {"deepspeed": DEEPSPEED, "torchrun": TORCHRUN, "accelerate": ACCELERATE, "slurm": SLURM}


def place(environment: dict[str, str]) -> tuple[int, int, int, int]:
    world = this_world(environment)
    return world.rank, world.size, world.local_rank, world.local_size


# --- launchers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_launcher_gives_the_same_place(environment: dict[str, str]) -> None:
    assert place(environment) == (3, 4, 1, 2)
    assert not this_world(environment).is_main
    assert this_world({**environment, "RANK": "0", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "LOCAL_RANK": "0", "SLURM_LOCALID": "0"}).is_main


def test_plain_python_is_a_world_of_its_own() -> None:
    assert this_world({}) == World(node=socket.gethostname())
    assert place({}) == (0, 1, 0, 1)
    assert this_world({}).is_main
    assert place({"LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}) == (0, 1, 0, 1), "a leftover of another shell"


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    assert place({**DEEPSPEED}) == (this_world().rank, this_world().size, this_world().local_rank, this_world().local_size)


def test_rank_and_world_size_alone_are_enough() -> None:
    """One node, as nobody says otherwise."""
    assert place({"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2, 1, 2)


def test_rank_beats_slurm() -> None:
    """Under `srun torchrun` every rank inherits the SLURM_PROCID of its agent; the job and the node are still Slurm's."""
    world = this_world({**SLURM, **TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"})
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert (world.job, world.node) == ("77", "node2")


# --- slurm ---------------------------------------------------------------------------------------------------------


def test_slurm_job_and_node() -> None:
    world = this_world(SLURM)
    assert (world.job, world.node) == ("77", "node2")
    assert this_world({}).job == ""


@pytest.mark.parametrize("left_out", ["SLURM_STEP_ID", "SLURM_NTASKS"])
def test_an_allocation_is_not_a_step(left_out: str) -> None:
    """In `salloc` or a batch script only the job's variables are set: python there is one process, not rank 3 of 4."""
    environment = {name: value for name, value in SLURM.items() if name != left_out}
    assert place(environment) == (0, 1, 0, 1)
    assert this_world(environment).job == "77"


def test_a_step_of_one_task_is_plain() -> None:
    assert place({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"), [("2(x2)", "0", 2), ("3,1", "0", 3), ("3,1", "1", 1), ("1(x2),2", "2", 2), ("4", "0", 4)]
)
def test_slurm_says_how_many_tasks_are_on_this_node(tasks: str, node: str, expected: int) -> None:
    """Also where nodes differ, and where --ntasks-per-node was said for the job but not for this step."""
    environment = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "9"}
    assert this_world(environment).local_size == expected


def test_slurm_without_the_steps_own_count() -> None:
    rest = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_TASKS_PER_NODE"}
    assert place(rest) == (3, 4, 1, 2), "evenly spread"
    assert place({**rest, "SLURM_NTASKS_PER_NODE": "4", "SLURM_LOCALID": "3"}) == (3, 4, 3, 4)
    assert place({**rest, "SLURM_NTASKS": "3", "SLURM_PROCID": "1"}) == (1, 3, 1, 2), "3 tasks on 2 nodes: 2 on one of them"


# --- contradictions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set although its sister is: set both, or neither"),
        ({"WORLD_SIZE": "2"}, "RANK is not set although its sister is: set both, or neither"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: the rank must be at least 0 and below the size"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 with WORLD_SIZE=2: the rank must be at least 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 with WORLD_SIZE=0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' is not a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 with LOCAL_WORLD_SIZE=2 and WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=1 with LOCAL_WORLD_SIZE=8 and WORLD_SIZE=4"),
        ({**DEEPSPEED, "LOCAL_SIZE": "0"}, "LOCAL_RANK=1 with LOCAL_WORLD_SIZE=0"),
        ({**SLURM, "SLURM_LOCALID": "two"}, "SLURM_LOCALID='two' is not a whole number"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(Refusal) as refused:
        this_world(environment)
    assert str(refused.value).startswith(said)


@patient
@given(st.data())
def test_every_world_of_every_launcher_is_read_back(data: Any) -> None:
    """For any number of nodes and ranks a node, each rank gets its own place and no two share one."""
    nodes, local_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    size = nodes * local_size
    launcher = data.draw(st.sampled_from(["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM"]))
    if launcher == "SLURM" and size == 1:
        return
    places = set()
    for rank in range(size):
        node, local_rank = divmod(rank, local_size)
        if launcher == "SLURM":
            environment = {
                "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(local_rank),
                "SLURM_NODEID": str(node), "SLURM_NNODES": str(nodes), "SLURM_STEP_TASKS_PER_NODE": f"{local_size}(x{nodes})",
            }  # fmt: skip
        else:
            environment = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank), launcher: str(local_size)}
        assert place(environment) == (rank, size, local_rank, local_size)
        places.add(place(environment))
    assert len(places) == size


# --- the meeting point ---------------------------------------------------------------------------------------------


def test_ranks_meet_where_the_launcher_says() -> None:
    assert rendezvous(this_world(TORCHRUN), TORCHRUN) == ("node1", 29500)


def test_a_single_process_meets_itself_on_a_free_port() -> None:
    address, port = rendezvous(World(), {})
    assert address == "127.0.0.1"
    with socket.socket() as taken:
        taken.bind((address, port))  # fails if the port is in use
    assert rendezvous(World(), {"MASTER_ADDR": "elsewhere"})[0] == "127.0.0.1", "half of an address is none"


@pytest.mark.parametrize("left_out", ["MASTER_ADDR", "MASTER_PORT"])
def test_several_ranks_without_a_meeting_point_are_refused(left_out: str) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != left_out}
    with pytest.raises(Refusal, match=r"^WORLD_SIZE=4 but MASTER_ADDR and MASTER_PORT are not set: export both"):
        rendezvous(World(rank=3, size=4), environment)


def test_a_port_that_is_no_number_is_refused() -> None:
    with pytest.raises(Refusal, match="MASTER_PORT='http' is not a whole number"):
        rendezvous(World(size=2), {"MASTER_ADDR": "x", "MASTER_PORT": "http"})
