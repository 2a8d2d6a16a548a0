"""Running a function in two processes of a gloo group, as data-parallel training does."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _run(rank: int, function: Callable[..., Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def in_processes(function: Callable[[int], Any], size: int = 2) -> list[Any]:
    """Return what `function(rank)` returns on each rank; it must be importable by name."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_run, (function, size, folder), nprocs=size)
        except Exception as error:
            traces = "\n".join(p.read_text() for p in Path(folder).glob("*.txt"))
            raise AssertionError(f"a process failed:\n{traces}") from error
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
