"""DeepSpeed's own config, as it follows from a run's."""

from __future__ import annotations

from typing import Any

from tunesmith.config import Compute, Config, EngineKind
from tunesmith.plan.memory import BUCKET


def deepspeed_config(config: Config, micro: int, accumulation: int, on_cpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given, with micro-batch and accumulation as planned; empty for another engine."""
    if config.engine.kind is not EngineKind.deepspeed:
        return {}
    zero: dict[str, Any] = {
        "stage": config.engine.zero,
        "overlap_comm": not on_cpu,  # there are no streams to overlap on a CPU
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    half: dict[str, Any] = {}
    if config.precision.compute is Compute.fp16:
        # Starts at 2^16, halves at an overflow, doubles after 1000 steps without one (arXiv 1710.03740).
        scaling = {
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
        half = {"fp16": {"enabled": True, **scaling}}
    elif config.precision.compute is Compute.bf16:
        half = {"bf16": {"enabled": True}}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "gradient_clipping": config.optim.clip,
        **half,
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's or bitsandbytes' in every case ...
        "zero_force_ds_cpu_optimizer": False,  # ... with offload too
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "comms_logger": {"enabled": on_cpu, "verbose": False, "prof_all": True, "debug": False},
    }
