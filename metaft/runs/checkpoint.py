"""Checkpoints: named tensors and plain data in one file, written atomically, refused when a bit is wrong.

The container is safetensors, which holds no code. Its metadata carries one entry, since safetensors writes several in
random order and equal contents must give equal bytes: a SHA-256, a space, and the plain data as JSON. The SHA-256 is
over that JSON and every tensor's name, type, shape and bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metaft.errors import CheckpointError
from metaft.support.paths import stream_at, to_replace

FORMAT = 1


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, sync: bool = True) -> None:
    """Write a checkpoint: to a temporary file, synced, then renamed, so that `path` is always a whole one. Without
    `sync` it is written right there, and is whole if nothing ends the process: for what nobody goes on with.

    Raises CheckpointError where the file cannot be written; a checkpoint that was there stays.
    """
    tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in sorted(tensors.items())}
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True)
    data = safetensors.torch.save(tensors, metadata={"metaft": f"{digest(text, tensors)} {text}"})
    if sync:
        write_atomically(path, data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and header of a checkpoint. No code is executed.

    Raises CheckpointError, naming the file, where it is missing, truncated, edited or of another format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        sha256, _, text = metadata["metaft"].partition(" ")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: damaged or not a metaft checkpoint ({error})") from None
    if digest(text, tensors) != sha256:
        raise CheckpointError(f"checkpoint {path}: damaged or edited, its SHA-256 does not match its contents")
    header = json.loads(text)
    if header.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {header.get('format')!r}, this version reads {FORMAT}")
    return tensors, header


def under(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names begin with "part/", without that."""
    return {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{part}/")}


def write_atomically(path: Path, data: bytes) -> None:
    """Put a file with these bytes in the place of `path`, or of what it links to, or leave that as it was.

    A device or a pipe is written to, as it is by a shell's `>`. Raises CheckpointError.
    """
    try:
        target = to_replace(path)
        if target is None:
            _write_into(path, data)
        else:
            _replace(target, data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _write_into(path: Path, data: bytes) -> None:
    number = stream_at(path)
    if number is not None:
        print(end="", file=sys.stdout if number == 1 else sys.stderr, flush=True)  # what came before
    # Opened anew, a file behind /dev/stdout would lose what was printed into it.
    with open(path if number is None else os.dup(number), "wb") as file:
        file.write(data)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors with their names, types and shapes."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name}\t{t.dtype}\t{list(t.shape)}\n".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
