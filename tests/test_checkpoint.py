"""A checkpoint is whole or refused: no bit of it may be wrong, no write may be half done, no code may run."""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import file_size_limit

from metaft.errors import CheckpointError
from metaft.runs import checkpoint

TENSORS = {"w": torch.tensor([1.5, -2.0, 0.25]), "n": torch.tensor(7)}
HEADER = {"step": 3, "names": ["a", "ü"], "best": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, TENSORS, HEADER)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Write the file anew with other contents and the digest it had."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype):
    values = torch.tensor([[0.0, 1.0, 3.0], [7.0, -0.0, 1e-30]]).to(dtype)
    tensors = {"a": values, "turned": values.T, "scalar": values[0, 1], "empty": values[:0], "view": values[1]}
    checkpoint.save(tmp_path / "c", tensors, {})
    loaded, header = checkpoint.load(tmp_path / "c")
    assert header == {"format": checkpoint.FORMAT}
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == value.shape
        assert (
            loaded[name].numpy(force=True).tobytes() == value.contiguous().numpy().tobytes()
            if (dtype != torch.bfloat16)
            else torch.equal(loaded[name], value)
        )


def test_not_a_number_and_gradients_do_not_disturb_it(tmp_path: Path):
    checkpoint.save(tmp_path / "c", {"p": torch.tensor([float("nan"), float("inf")], requires_grad=True)}, {})
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert loaded["p"].tolist()[1] == float("inf")
    assert loaded["p"].isnan()[0]
    assert not loaded["p"].requires_grad


def test_the_bytes_depend_on_the_contents_alone(tmp_path: Path, saved: Path):
    for _ in range(20):
        checkpoint.save(tmp_path / "other", dict(reversed(TENSORS.items())), dict(reversed(HEADER.items())))
        assert (tmp_path / "other").read_bytes() == saved.read_bytes()


def test_header_comes_back(saved: Path):
    assert checkpoint.load(saved)[1] == {"format": checkpoint.FORMAT, **HEADER}


def test_truncated_at_any_length_it_is_refused(saved: Path):
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        refused(saved)


def test_with_more_behind_it_is_refused(saved: Path):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved)


def test_with_a_bit_flipped_in_any_byte_it_is_refused(saved: Path):
    data = saved.read_bytes()
    for place in range(len(data)):
        for bit in {place % 8, 7 * place // 8 % 8}:
            saved.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            refused(saved)
    saved.write_bytes(data)
    checkpoint.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t, m: t.update(w=t["w"] + 1), id="value"),
        pytest.param(lambda t, m: t.update(w=t["w"].view(torch.int32)), id="type"),
        pytest.param(lambda t, m: t.update(w=t["w"].view(3, 1)), id="shape"),
        pytest.param(lambda t, m: t.update(v=t.pop("w")), id="name"),
        pytest.param(lambda t, m: t.pop("n"), id="fewer"),
        pytest.param(lambda t, m: t.update(more=torch.zeros(1)), id="more"),
        pytest.param(lambda t, m: m.update(metaft=m["metaft"].replace('"step": 3', '"step": 4')), id="header"),
    ],
)
def test_an_edited_file_is_refused(saved: Path, change: Any):
    edit(saved, change)
    assert "damaged or edited" in refused(saved)


def test_files_of_others_are_refused(saved: Path):
    saved.write_bytes(safetensors.torch.save(TENSORS))
    assert "not a metaft checkpoint" in refused(saved)
    saved.write_bytes(b"")
    refused(saved)
    saved.unlink()
    assert "No such file" in refused(saved)
    saved.mkdir()
    refused(saved)


def test_another_format_is_named(tmp_path: Path):
    checkpoint.save(tmp_path / "c", TENSORS, {"format": 99})
    assert "format 99, this version reads 1" in refused(tmp_path / "c")


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("write", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, write: Any):
    mark = tmp_path / "executed"
    path = tmp_path / "best.safetensors"
    write({"w": torch.ones(3), "x": Payload(mark)}, path)
    refused(path)
    assert not mark.exists()


class Full:
    """A file on a full disk: it takes some bytes and no more."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])
def test_a_full_disk_is_a_clear_error_and_the_former_file_stays(
    saved: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    before = saved.read_bytes()
    if where == "open":
        monkeypatch.setattr(checkpoint, "open", no_space, raising=False)
    elif where == "write":
        monkeypatch.setattr(checkpoint, "open", lambda *a: Full(builtins.open(*a)), raising=False)  # noqa: SIM115
    else:
        monkeypatch.setattr(os, where, no_space)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: cannot be written \(No space left on device\)"):
        checkpoint.save(saved, {"w": torch.zeros(3)}, {})
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_real_limit_on_file_size_likewise(saved: Path):
    before = saved.read_bytes()
    message = r"last\.safetensors: cannot be written \(File too large\)"
    with pytest.raises(CheckpointError, match=message), file_size_limit(2000):
        checkpoint.save(saved, {"w": torch.zeros(3000)}, {})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_missing_folder_is_a_clear_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "none" / "c", TENSORS, {})


def test_the_new_file_is_synced_before_it_gets_its_name_and_the_name_after(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(number: int) -> None:
        order.append("sync folder" if os.path.isdir(f"/proc/self/fd/{number}") else "sync file")
        fsync(number)

    def spy_replace(a: Any, b: Any) -> None:
        order.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    checkpoint.save(saved, TENSORS, HEADER)
    assert order == ["sync file", "rename", "sync folder"]


def test_random_bytes_never_cause_another_error(saved: Path):
    rng = random.Random(0)
    for _ in range(300):
        saved.write_bytes(rng.randbytes(rng.randrange(200)))
        refused(saved)
        # A well-formed length in front, so that the rest is read as JSON.
        body = rng.choice([b"null", b"[]", b"{}", b'{"__metadata__": {}}', b'{"__metadata__": 3}', b"[" * 2000])
        saved.write_bytes(len(body).to_bytes(8, "little") + body)
        refused(saved)
