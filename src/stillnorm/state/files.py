"""Reading checkpoints without running what is in them; writing files whole or not at all.

Pickle-based checkpoints are read by torch's restricted unpickler (``weights_only=True``), always:
what it refuses is refused here, with the line that converts the file. There is no fallback.

Source: CVE-2025-32434 and CVE-2026-24747 are what came of unpickling; safetensors writes through a
temporary file beside the target for the same reason as here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from stillnorm.errors import FileFormatError, StillnormWarning
from stillnorm.state.keys import clean_keys

StrPath = str | os.PathLike[str]

_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_NESTED = ("state_dict", "model", "model_state_dict", "ema", "state_dict_ema", "module")
_DEPTH = 3  # {"state_dict": {"model": {...}}}


def read_state(path: StrPath) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, on the CPU, without wrapper components in its keys.

    Args:
        path: A ``.safetensors`` file, or a ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` of
            `torch.save`; in that one the state dict may be under ``state_dict``, ``model``,
            ``model_state_dict``, ``ema``, ``state_dict_ema`` or ``module``, searched in that order.

    Returns:
        The tensors by key. Values that are not tensors are left out.

    Raises:
        FileFormatError: The file cannot be read as that: missing, a folder, empty, damaged, not a
            checkpoint, or with more than tensors in it. Nothing of it was run.

    Warns:
        StillnormWarning: A pickled file, read by a torch older than 2.10, whose restricted
            unpickler has a known hole (CVE-2026-24747).

    Cost:
        Nothing is copied where torch can map the file (safetensors, zip archives).
    """
    path = Path(path)
    _must_be_file(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_PICKLED):
        raise FileFormatError(
            f"{path} is not a checkpoint: its name ends in {suffix or 'nothing'}",
            help=f"it should be .safetensors, {', '.join(_PICKLED)}",
        )
    state = read_tensors(path)[0] if suffix == ".safetensors" else _read_pickled(path)
    return clean_keys(state)


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        FileFormatError: It is missing or is not a safetensors file.
    """
    path = Path(path)
    _must_be_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file ({_first_sentence(error)})", help=_DAMAGED
        ) from error


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        FileFormatError: The file cannot be written; what was there is still there.
    """
    copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    write_whole(path, safetensors.torch.save(copies, dict(metadata)))


def write_whole(path: StrPath, data: bytes) -> None:
    """Write a file, whole or not at all: to a temporary one beside it that then takes its place.

    A symbolic link is followed, and the permissions of a file that was there are kept.

    Raises:
        FileFormatError: The file cannot be written; what was there is still there.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise FileFormatError(
            f"{path} cannot be written: {error.strerror}", help="nothing was changed"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------- what can be wrong with one

_DAMAGED = "it may be damaged or cut short: copy or save it again"


def _must_be_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FileFormatError(
            f"{path} cannot be read: {error.strerror}", help="check the path"
        ) from error
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", *_PICKLED))
        raise FileFormatError(
            f"{path} is a folder",
            help=f"name a file in it: {', '.join(inside[:3])}" if inside else "name a file",
        )
    if size == 0:
        raise FileFormatError(f"{path} is empty", help=_DAMAGED)


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the state dict out of a file of `torch.save`."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        warnings.warn(
            f"torch {torch.__version__} reads {path} with an unpickler that has a known hole "
            "(CVE-2026-24747)\n  help: read only files you trust, or update torch to 2.10",
            StillnormWarning,
            stacklevel=3,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:
        raise _unreadable(path, error) from error
    state = _state_dict_in(checkpoint)
    if state is None:
        keys = ", ".join(map(repr, checkpoint)) if isinstance(checkpoint, Mapping) else ""
        what = f"its keys are {keys}" if keys else f"it holds a {type(checkpoint).__name__}"
        raise FileFormatError(
            f"{path} has no state dict in it: {what[:200]}",
            help=f"save model.state_dict(), alone or under one of {', '.join(_NESTED)}",
        )
    return state


def _state_dict_in(checkpoint: object, depth: int = _DEPTH) -> dict[str, Tensor] | None:
    """Return the first state dict found under the known keys, or the mapping itself as one."""
    if not isinstance(checkpoint, Mapping) or depth == 0:
        return None
    for key in _NESTED:
        if (nested := _state_dict_in(checkpoint.get(key), depth - 1)) is not None:
            return nested
    tensors = {
        key: value.detach()
        for key, value in checkpoint.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    return tensors or None


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    """Say why torch did not read the file."""
    said = str(error)
    if "TorchScript" in said:
        return FileFormatError(
            f"{path} is a TorchScript archive: a program, not a checkpoint",
            help=f"if you trust its source: {_conversion(path, 'torch.jit.load', '.state_dict()')}",
        )
    refused = re.search(r"GLOBAL ([\w.]+)", said)
    if refused is None or not _may_exist(refused[1]):
        return FileFormatError(
            f"{path} is not a whole file of torch.save ({_first_sentence(error)})", help=_DAMAGED
        )
    fact = f"{path} holds more than tensors ({refused[1]}): unpickling it can run code; not read"
    if "is blocked" in said:
        return FileFormatError(fact, help="no checkpoint needs that: do not load it by other means")
    whole_module = refused[1].startswith("torch.nn.")
    line = _conversion(path, "torch.load", ".state_dict()" if whole_module else '["state_dict"]')
    return FileFormatError(
        fact, help=f"if you trust its source, convert it once, by the key it has: {line}"
    )


def _may_exist(name: str) -> bool:
    """Tell whether a whole file can name this global; one cut short names half a word."""
    module, _, attribute = name.rpartition(".")
    known = sys.modules.get(module)
    return attribute != "" and (known is None or attribute in vars(known))


def _conversion(path: Path, load: str, state: str) -> str:
    """Return the shell line that turns a trusted file into a safetensors file."""
    old, new = json.dumps(str(path)), json.dumps(str(path.with_suffix(".safetensors")))
    trust = ", weights_only=False" if load == "torch.load" else ""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'save_file({load}({old}, map_location="cpu"{trust}){state}, {new})'
    )
    return f"python -c {shlex.quote(code)}"


def _first_sentence(error: Exception) -> str:
    """Return what an error says, short; torch's advice to trust the file is not passed on."""
    said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    sentence = said.splitlines()[0].split(". ")[0][:100] if said else ""
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
