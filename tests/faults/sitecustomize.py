"""Put on PYTHONPATH by a test: makes one rank do something at one step, in the real program under its real launcher.

TUNESMITH_TEST_FAULT="RANK:STEP:ACTION" with ACTION raise, kill (SIGKILL), the number of a signal sent to itself, or oom_forward or
oom_backward: once, memory does not suffice for the last micro-batch.
"""

import os
import signal
import sys
import threading
import time


def _run_out(parts, action):  # type: ignore[no-untyped-def]
    import torch

    module = parts.engine.loss_module
    original, wanted = module.forward, parts.plan.accumulation
    seen = []

    def fail(*_):  # type: ignore[no-untyped-def]
        with open(os.environ["TUNESMITH_TEST_FAULT_FILE"], "a") as file:
            file.write(f"{time.time()}\n")
        raise torch.OutOfMemoryError("a fault made by a test")

    def forward(batch):  # type: ignore[no-untyped-def]
        seen.append(batch)
        if len(seen) < wanted:
            return original(batch)
        if action == "oom_forward":
            fail()
        loss = original(batch)
        loss.register_hook(fail)
        return loss

    module.forward = forward


def _arm(step: int, action: str) -> None:
    while not hasattr(sys.modules.get("tunesmith.loop"), "learning_rate"):  # the last name that the module defines
        time.sleep(0.005)
    loop = sys.modules["tunesmith.loop"]
    original = loop.take_step

    def take_step(parts, number):  # type: ignore[no-untyped-def]
        if number == step and action.startswith("oom"):
            if not os.path.exists(os.environ["TUNESMITH_TEST_FAULT_FILE"]):
                _run_out(parts, action)
        elif number == step:
            with open(os.environ["TUNESMITH_TEST_FAULT_FILE"], "a") as file:
                file.write(f"{time.time()}\n")
            if action == "raise":
                raise RuntimeError("a fault made by a test")
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else int(action))
        return original(parts, number)

    loop.take_step = take_step


if os.environ.get("TUNESMITH_TEST_FAULT"):
    _rank, _step, _action = os.environ["TUNESMITH_TEST_FAULT"].split(":")
    if os.environ.get("RANK", "0") == _rank:
        threading.Thread(target=_arm, args=(int(_step), _action), daemon=True).start()
