"""python -m tunesmith.doctor.probe NAME: one question about this machine, asked in a process that may hang or crash.

Each probe only looks and tries; what its answer means is for rules.py to say.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.doctor.asking import answer_to, first_line

Tell = Callable[[Mapping[str, Any]], None]
NVIDIA = "0x10de"
SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Clock event reasons (NVML) that hold a card below what it is sold for; idling and the power limit are not among them."""
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
KERNELS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


def driver(order: Mapping[str, Any], tell: Tell) -> None:
    """The driver and every card, as NVML tells; and how many NVIDIA cards the PCI bus shows without any driver."""
    devices = Path("/sys/bus/pci/devices")
    on_bus = 0
    for device in devices.iterdir() if devices.is_dir() else ():
        with suppress(OSError):
            display = (device / "class").read_text().startswith("0x03")
            on_bus += display and (device / "vendor").read_text().strip() == NVIDIA
    tell({"on_bus": on_bus})
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:  # no package, no library, no permission: the text says which
        tell({"error": first_line(error)})
        return

    def ask(query: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, query)(*arguments)
        except (nvml.NVMLError, AttributeError):  # not on this card, or not in this driver
            return None

    uncorrected = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    cuda = ask("nvmlSystemGetCudaDriverVersion") or 0
    tell({"driver": str(ask("nvmlSystemGetDriverVersion") or ""), "cuda": [cuda // 1000, cuda % 1000 // 10]})
    cards = []
    for index in range(ask("nvmlDeviceGetCount") or 0):
        handle = ask("nvmlDeviceGetHandleByIndex", index)
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", handle) or ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
        clock = (handle, nvml.NVML_CLOCK_SM)
        limit, default = ask("nvmlDeviceGetEnforcedPowerLimit", handle), ask("nvmlDeviceGetPowerManagementDefaultLimit", handle)
        cards.append({
            "index": index, "uuid": str(ask("nvmlDeviceGetUUID", handle)), "name": str(ask("nvmlDeviceGetName", handle)),
            "capability": ask("nvmlDeviceGetCudaComputeCapability", handle),
            "total_gib": memory.total / 2**30 if memory else None, "free_gib": memory.free / 2**30 if memory else None,
            "processes": [process.pid for process in ask("nvmlDeviceGetComputeRunningProcesses", handle) or ()],
            "watts": None if limit is None else limit / 1000, "default_watts": None if default is None else default / 1000,
            "clock_mhz": ask("nvmlDeviceGetApplicationsClock", *clock), "max_clock_mhz": ask("nvmlDeviceGetMaxClockInfo", *clock),
            "default_clock_mhz": ask("nvmlDeviceGetDefaultApplicationsClock", *clock),
            "slowdowns": [name for bit, name in SLOWDOWNS.items() if reasons & bit],
            "memory_errors": ask("nvmlDeviceGetTotalEccErrors", handle, *uncorrected) or 0,
            "split": bool((ask("nvmlDeviceGetMigMode", handle) or (0,))[0]),
        })  # fmt: skip
    tell({"cards": cards})


def torch_build(order: Mapping[str, Any], tell: Tell) -> None:
    """What torch was built for, and whether it can compute on each visible device."""
    import torch
    import torch.distributed as dist

    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None  # torch.cuda.get_arch_list says nothing without a driver
    tell({
        "version": torch.__version__, "cuda": torch.version.cuda or "", "built_for": (flags or "").split(),
        "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(),
    })  # fmt: skip
    if not torch.version.cuda or not order["cards"]:
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's
    except Exception as error:  # RuntimeError, and what a driver makes of it
        tell({"error": first_line(error)})
        return
    count = torch.cuda.device_count()
    tell({"devices": count, "claims_bf16": torch.cuda.is_bf16_supported()})
    broken = {}
    for index in range(count):
        for kind in ("fp32", "fp16"):
            try:
                square = torch.eye(64, device=f"cuda:{index}", dtype=getattr(torch, TYPES[kind])) * 2
                if float((square @ square).sum()) != 256.0:
                    broken[f"cuda:{index}"] = f"{kind}: 2I x 2I is not 4I"
            except Exception as error:
                broken[f"cuda:{index}"] = f"{kind}: {first_line(error)}"
    tell({"broken": broken})


def attention(order: Mapping[str, Any], tell: Tell) -> None:
    """Causal attention, forward and backward, by every kernel and type on the first device; "" for what ran, else why not."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if order["cards"] and torch.cuda.is_available() else "cpu"
    tell({"device": device})
    for kind in order["types"]:
        ran = {}
        for kernel, backend in KERNELS.items():
            q, k, v = (torch.randn(1, 2, 64, 64, device=device, dtype=getattr(torch, TYPES[kind]), requires_grad=True) for _ in range(3))
            with warnings.catch_warnings(record=True) as reasons:
                warnings.simplefilter("always")
                try:
                    with sdpa_kernel([getattr(SDPBackend, backend)]):
                        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]
                    assert q.grad is not None
                    ran[kernel] = "" if bool(torch.isfinite(q.grad).all()) else "the gradient is not finite"
                except Exception as error:  # torch tells why in warnings, and then that nothing is left
                    said = [str(warning.message).split(" (Triggered")[0] for warning in reasons]
                    ran[kernel] = said[-1] if said else first_line(error)
        tell({kind: ran})


def quantised(order: Mapping[str, Any], tell: Tell) -> None:
    """bitsandbytes' NF4 and int8 layers on the first device, forward and backward; "" for what worked, else why not."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes import functional

    device = "cuda" if order["cards"] and torch.cuda.is_available() else "cpu"
    tell({"version": bnb.__version__, "device": device})
    kind = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64, dtype=kind), torch.randn(8, 64, device=device, dtype=kind)
    wanted = x @ weight.to(device).t()

    def nf4() -> torch.Tensor:
        packed, state = functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        return bnb.matmul_4bit(x.requires_grad_(), packed.t(), quant_state=state)  # type: ignore[no-any-return]

    def int8() -> torch.Tensor:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight})
        return layer.to(device)(x.requires_grad_())  # type: ignore[no-any-return]

    # 4 bits leave an error of about a tenth in a product of normal numbers, 8 bits of about a hundredth; a broken kernel, of 1.
    for name, layer, limit in (("nf4", nf4, 0.2), ("int8", int8, 0.05)):
        try:
            x.grad = None
            made = layer()
            made.sum().backward()  # type: ignore[no-untyped-call]
            error = float((made - wanted).norm() / wanted.norm())
            trained = x.grad is not None and bool(torch.isfinite(x.grad).all()) and bool(x.grad.any())
            tell({name: f"its product is off by {error:.0%}" if error > limit else "" if trained else "it gives no gradient"})
        except Exception as error:
            tell({name: first_line(error)})


def deepspeed(order: Mapping[str, Any], tell: Tell) -> None:
    """Whether DeepSpeed can be imported, the accelerator it sees, and its compiled ops: built in, or could be built here."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    accelerator = get_accelerator()
    tell({"version": deepspeed.__version__, "accelerator": accelerator.device_name(), "backend": accelerator.communication_backend_name()})
    ops = {name: bool(yes) for name, yes in deepspeed.ops.__compatible_ops__.items() if name != "deepspeed_not_implemented"}
    tell({"built": [name for name, yes in installed_ops.items() if yes], "could_build": [name for name, yes in ops.items() if yes]})


PROBES = {"driver": driver, "torch": torch_build, "attention": attention, "quantised": quantised, "deepspeed": deepspeed}

if __name__ == "__main__":
    answer_to(PROBES[sys.argv[1]])
