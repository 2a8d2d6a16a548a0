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
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor

from stillnorm.errors import FileFormatError, StillnormWarning
from stillnorm.state.keys import clean_keys

StrPath = str | os.PathLike[str]

_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
CHECKPOINTS = (".safetensors", *_PICKLED)
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
    return read_checkpoint(path, stacklevel=3).state


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state dict that was read from a checkpoint, and what else there was to read.

    Args:
        state: The tensors by key, without wrapper components.
        key: Where it was, ``"state_dict"`` or ``"ema.module"``; empty for the file itself.
        others: Where further state dicts are, which were not read.
    """

    state: dict[str, Tensor]
    key: str
    others: tuple[str, ...]


def read_checkpoint(path: StrPath, *, stacklevel: int = 2) -> Checkpoint:
    """Read the state dict of a checkpoint as `read_state` does, and say which one it was.

    Raises:
        FileFormatError: As `read_state`.

    Warns:
        StillnormWarning: As `read_state`.
    """
    path = Path(path)
    must_be_file(path)
    suffix = path.suffix.lower()
    if suffix not in CHECKPOINTS:
        raise FileFormatError(
            f"{path} is not a checkpoint: its name ends in {suffix or 'nothing'}",
            help=f"it should be .safetensors, {', '.join(_PICKLED)}",
        )
    if suffix == ".safetensors":
        return Checkpoint(clean_keys(read_tensors(path)[0]), "", ())
    found = list(_state_dicts_in(checkpoint := read_pickled(path, stacklevel=stacklevel + 1)))
    if not found:
        keys = ", ".join(map(repr, checkpoint)) if isinstance(checkpoint, Mapping) else ""
        what = f"its keys are {keys}" if keys else f"it holds a {type(checkpoint).__name__}"
        raise FileFormatError(
            f"{path} has no state dict in it: {what[:200]}",
            help=f"save model.state_dict(), alone or under one of {', '.join(_NESTED)}",
        )
    (key, state), *others = found
    # Tensors beside the state dict (an epoch, a learning rate) are no state dict of their own.
    rest = (name for name, _ in others if not f"{key}.".startswith(f"{name}." if name else ""))
    return Checkpoint(clean_keys(state), key, tuple(rest))


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        FileFormatError: It is missing or is not a safetensors file.
    """
    path = Path(path)
    must_be_file(path)
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

    A symbolic link is followed, and the permissions of a file that was there are kept. A device or
    a pipe takes the bytes as they come; nothing takes its place.

    Raises:
        FileFormatError: The file cannot be written; what was there is still there.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if _is_stream(path):
            _stream(path, data)
            return
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


def _is_stream(path: StrPath) -> bool:
    """Tell whether there is something that is no file, or the very file that stdout goes to."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    return not stat.S_ISREG(there.st_mode) or _is_stdout(there)


def _stream(path: StrPath, data: bytes) -> None:
    to_stdout = _is_stdout(os.stat(path))
    with open(os.dup(1) if to_stdout else path, "wb") as stream:  # its place there is kept
        stream.write(data)


def _is_stdout(there: os.stat_result) -> bool:
    try:
        return os.path.samestat(there, os.fstat(1))
    except OSError:
        return False  # a process without one


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


def must_be_file(path: Path) -> None:
    """Raise unless there is something in the file.

    Raises:
        FileFormatError: It is missing, a folder or empty.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FileFormatError(
            f"{path} cannot be read: {error.strerror}", help="check the path"
        ) from error
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in CHECKPOINTS)
        raise FileFormatError(
            f"{path} is a folder",
            help=f"name a file in it: {', '.join(inside[:3])}" if inside else "name a file",
        )
    if size == 0:
        raise FileFormatError(f"{path} is empty", help=_DAMAGED)


def read_pickled(path: Path, data: IO[bytes] | None = None, *, stacklevel: int = 2) -> object:
    """Return what a file of `torch.save` holds, if it is tensors in plain containers.

    Args:
        path: The file.
        data: Where its bytes are, if not in the file itself: one member of an archive.
        stacklevel: Whose line a warning names.

    Raises:
        FileFormatError: It is damaged, or holds more than that; nothing of it was run.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        warnings.warn(
            f"torch {torch.__version__} reads {path} with an unpickler that has a known hole "
            "(CVE-2026-24747)\n  help: read only files you trust, or update torch to 2.10",
            StillnormWarning,
            stacklevel=stacklevel,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(
                path if data is None else data,
                map_location="cpu",
                weights_only=True,
                mmap=data is None and zipfile.is_zipfile(path),
            )
    except Exception as error:
        raise _unreadable(path, error) from error


def _state_dicts_in(
    checkpoint: object, key: str = "", depth: int = _DEPTH
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts under the known keys, the mapping itself last, each with its place."""
    if not isinstance(checkpoint, Mapping) or depth == 0:
        return
    for name in _NESTED:
        inside = f"{key}.{name}" if key else name
        yield from _state_dicts_in(checkpoint.get(name), inside, depth - 1)
    tensors = {
        name: value.detach()
        for name, value in checkpoint.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield key, tensors


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
    if _is_whole_model(path):
        line = _conversion(path, "torch.load", ".state_dict()")
        return FileFormatError(
            f"{path} is a pickled model ({refused[1]}), not a state dict: unpickling it can run "
            "code; not read",
            help="save model.state_dict() instead; if you trust its source, convert it once: "
            f"{line}",
        )
    line = _conversion(path, "torch.load", '["state_dict"]')
    return FileFormatError(
        fact, help=f"if you trust its source, convert it once, by the key it has: {line}"
    )


def _may_exist(name: str) -> bool:
    """Tell whether a whole file can name this global; one cut short names half a word."""
    module, _, attribute = name.rpartition(".")
    known = None if module == "__main__" else sys.modules.get(module)  # another program's
    return attribute != "" and (known is None or attribute in vars(known))


def _is_whole_model(path: Path) -> bool:
    """Tell whether what was saved is one `nn.Module`; its pickle is read as text, never run."""
    try:
        begin = _beginning(path)
    except Exception:  # zipfile's, of which a damaged archive raises many
        return False
    return _MODULE.search(begin) is not None and b"_modules" in begin


def _beginning(path: Path) -> bytes:
    """Return the first bytes of a pickle, in an archive or alone."""
    with contextlib.ExitStack() as opened:
        if zipfile.is_zipfile(path):
            archive = opened.enter_context(zipfile.ZipFile(path))
            names = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
            return opened.enter_context(archive.open(names[0])).read(_BEGIN) if names else b""
        return opened.enter_context(open(path, "rb")).read(_BEGIN)


_BEGIN = 4096
# After its protocol a pickle names the class of the object that it is: the first of a zip archive,
# the fourth of a file before them, where torch also keeps the source of a module.
_MODULE = re.compile(rb"\A\x80.c|\.\x80.\(X\x06\x00\x00\x00moduleq\x00c", re.DOTALL)


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
