"""Put on PYTHONPATH by a test: makes one rank do something at one step, in the real program under its real launcher.

TUNESMITH_TEST_FAULT="RANK:STEP:ACTION" with ACTION raise, kill (SIGKILL), or the number of a signal sent to itself.
"""

import os
import signal
import sys
import threading
import time


def _arm(step: int, action: str) -> None:
    while not hasattr(sys.modules.get("tunesmith.loop"), "learning_rate"):  # the last name that the module defines
        time.sleep(0.005)
    loop = sys.modules["tunesmith.loop"]
    original = loop.take_step

    def take_step(parts, number):  # type: ignore[no-untyped-def]
        if number == step:
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
