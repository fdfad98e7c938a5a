"""benchmarks/gpu.py runs from end to end where there is no GPU, at toy sizes, and says what it did not measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from metaft.tasks.pool import ClassPool, Preprocessing
from metaft.types import SPLITS


def toy_omniglot() -> ClassPool:
    return ClassPool(
        name="omniglot",
        images=torch.from_numpy(np.random.default_rng(0).integers(0, 256, (18 * 20, 1, 28, 28), dtype=np.uint8)),
        class_names=tuple(f"a/{c}" for c in range(18)),
        starts=np.arange(18) * 20,
        counts=np.full(18, 20),
        splits={name: np.arange(6 * i, 6 * i + 6) for i, name in enumerate(SPLITS)},
        preprocessing=Preprocessing(1, 28, 28, polarity="bright-on-black"),
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_script_runs_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = toy_omniglot()
    monkeypatch.setattr("metaft.tasks.load", lambda name: pool)
    packed = tmp_path / "omniglot.npz"
    gpu.pack(packed)
    again = gpu.unpack(packed)
    assert torch.equal(again.images, pool.images) and again.split_hash == pool.split_hash
    assert again.preprocessing == pool.preprocessing
    monkeypatch.delenv("METAFT_PEERS", raising=False)
    words = ["--tiny", "--device", "cpu", "--seconds", "300", "--out", str(tmp_path / "out"), "--omniglot", str(packed)]
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {k: v["skipped"] for k, v in found.items() if "skipped" in v} == {
        "checks": "no GPU",
        "memory": "counts a GPU's memory; tests/test_precision.py has the CPU's",
        "peers": "METAFT_PEERS names no folder of libraries",
    }
    assert not [v for v in found.values() if "failed" in v]
    assert found["throughput"]["tiny graph bf16"]["ms"] > 0
    assert found["omniglot"]["accuracy"] > 0
    assert found["ceilings"]["copy_gb_s"] > 0


def test_a_section_that_fails_or_has_no_time_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "checks", lambda bench: 1 / 0)
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    sections = ("checks", "ceilings", "throughput", "omniglot", "memory", "peers")
    assert all("0 s were left, it needs" in found[name]["skipped"] for name in sections)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--seconds", "0.001", "--out", str(tmp_path)])
    for name in sections[1:]:
        monkeypatch.setattr(gpu, name, lambda bench: {})
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["checks"] == {"failed": "ZeroDivisionError: division by zero"} and found["peers"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "there is no GPU here" in capsys.readouterr().err
