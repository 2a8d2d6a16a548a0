"""Writing a file, and what belongs to it, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stillnorm.errors import FileFormatError
from stillnorm.state.files import StrPath

_WRITERS = {".onnx": "sn.export_onnx", ".pt2": "sn.export.export_program"}


def target_of(path: StrPath, suffix: str) -> Path:
    """Return where a file will be, with symbolic links followed.

    Raises:
        FileFormatError: It has another ending, is a folder, or its folder is missing: said now,
            not after the work.
    """
    given = Path(path)
    if given.suffix.lower() != suffix:
        name = f"{given.stem or 'model'}{suffix}"
        other = _WRITERS.get(given.suffix.lower())
        raise FileFormatError(
            f"{given} does not end in {suffix}",
            help=f"name it {name}: readers go by the ending"
            + (f"; {other} writes {given.suffix}" if other else ""),
        )
    try:
        target = Path(os.path.realpath(given))
        target.exists()
    except (OSError, ValueError) as error:  # too long a name, a null character
        raise FileFormatError(
            f"{str(given)!r} cannot be written: {getattr(error, 'strerror', None) or error}",
            help="give it another name",
        ) from error
    if target.is_dir():
        raise FileFormatError(f"{given} is a folder", help="name a file in it")
    if not target.parent.is_dir():
        raise FileFormatError(
            f"{given} cannot be written: there is no folder {target.parent}", help="make it first"
        )
    return target


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a path to write to, of the same name; when the block ends, that takes the place.

    What else the block writes beside it (tensors of more than 2 GB) comes along. If the block
    raises, or the files cannot be put in place, what was there is still there.

    Raises:
        FileFormatError: The folder cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield folder / target.name
        try:
            _put(folder, target)
        except OSError as error:
            raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, target: Path) -> None:
    """Move the files of a folder beside the target, the target itself last."""
    if target.exists():
        shutil.copymode(target, folder / target.name)
    new = sorted((p for p in folder.iterdir()), key=lambda p: p.name == target.name)
    for path in new:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = Path(tempfile.mkdtemp(dir=folder))
    done: list[tuple[Path, Path | None]] = []
    try:
        for path in new[:-1]:
            place = target.parent / path.name
            kept = old / path.name if place.exists() else None
            if kept is not None:
                os.replace(place, kept)
            done.append((place, kept))
            os.replace(path, place)
        os.replace(folder / target.name, target)
    except BaseException:
        for place, kept in done:
            if kept is not None:
                os.replace(kept, place)
            else:
                place.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Make the new names survive a power cut, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> FileFormatError:
    return FileFormatError(
        f"{path} cannot be written: {error.strerror}", help="nothing was changed"
    )
