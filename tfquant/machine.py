"""What the CPU at hand can do."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator

_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from using VNNI.
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux names; empty where it cannot be told."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


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
