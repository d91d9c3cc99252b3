"""What of a machine the recorded start of an engine depends on; no torch until it is asked for."""

import importlib
import platform
import re
from pathlib import Path


def cpu_environment() -> dict[str, str]:
    """Return the properties of an engine's surroundings that computes on the CPU."""
    import torch  # the engine has it; whoever imports this module may not

    return {"device": _cpu_name(), "torch": torch.__version__}


def gpu_environment() -> dict[str, str]:
    """Return the properties of an engine's surroundings that computes on a GPU."""
    import torch
    from cuda.bindings import driver  # only where there is one

    properties = torch.cuda.get_device_properties(0)
    error, version = driver.cuDriverGetVersion()
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "device memory": f"{properties.total_memory >> 30} GiB",
        "driver": f"CUDA {version // 1000}.{version % 1000 // 10}" if not error else "",
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
