"""Where a model is, and how much memory there is left."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

_UNKNOWN = 2**30  # what can be had on any machine


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU where it has none."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def free_bytes(device: torch.device) -> int:
    """Return the number of bytes that can be allocated on a device, about.

    On the CPU that is what the kernel takes to be available, or what is left to the container that
    the process runs in; where neither is told (other systems than Linux), a quarter of all memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(reserved)
    return min([*_available(), *_left_to_container()], default=_quarter())


def _available() -> list[int]:
    text = _read("/proc/meminfo")
    lines = (line.split() for line in text.splitlines())
    return [int(words[1]) * 1024 for words in lines if words and words[0] == "MemAvailable:"]


def _left_to_container() -> list[int]:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        most, now = _read(limit).strip(), _read(used).strip()
        if most.isdigit() and now.isdigit():
            return [max(0, int(most) - int(now))]
    return []


def _quarter() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return _UNKNOWN
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
