"""What the CPU at hand can do."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import platform
from collections.abc import Iterator

_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from using VNNI.
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux names; empty where it cannot be told."""
    return frozenset(_cpu_fact("flags").split())


def cpu_name() -> str:
    """The processor as Linux names it, or its architecture."""
    return _cpu_fact("model name") or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on: as many threads as TensorFlow takes by default."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that can be had without swapping, within the container's limit; None where it cannot be told."""
    with contextlib.suppress(OSError, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
        if free is not None:
            with contextlib.suppress(OSError, ValueError):  # no container, or no limit: "max"
                limit, used = (int(pathlib.Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
                free = min(free, limit - used)
        return free
    return None


def _cpu_fact(key: str) -> str:
    """What Linux says of the first processor, or ""."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def has_vnni() -> bool | None:
    """Whether 8-bit products are summed without saturation here; None where it cannot be told."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_VNNI:
        return False
    flags = cpu_flags()
    return bool(flags & _VNNI) if flags else None


def machine_warnings(isa: str) -> Iterator[str]:
    """One line where weights of 8 bits may saturate on this machine."""
    if isa == "vnni" and has_vnni() is False:
        yield (
            "this machine has no VNNI: convolutions and MatMuls with 8-bit weights saturate here, and the figures above show it; "
            "for servers like it say --isa no_vnni (isa='no_vnni' in Python)"
        )
