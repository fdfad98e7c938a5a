"""A command keeps the memory that it freed, so that what is allocated again costs no page fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# By malloc itself: between PyTorch's blocks something small may lie, by which they are kept whatever glibc was told.
CODE = """
import ctypes, sys
from metaft.cli import guarded

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def kept(argv):
    before = resident()
    blocks = [libc.malloc(size) for size in map(int, argv)]
    for block, size in zip(blocks, map(int, argv)):
        for page in range(block, block + size, 65536):
            ctypes.memset(page, 1, 1)
    during = resident()
    for block in blocks:
        libc.free(block)
    print(during - before, resident() - before)

if sys.argv[1] == "command":
    assert guarded(kept, sys.argv[2:], smaller="less") == 0
else:
    kept(sys.argv[2:])
"""

MAPS = Path("/proc/self/maps")


def pages(*words: str) -> tuple[int, int]:
    """While there are blocks of so many bytes of which every sixteenth page was written to, and once they are freed."""
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True)
    during, after = map(int, done.stdout.split())
    return during, after


@pytest.mark.skipif(not MAPS.exists() or "libc.so.6" not in MAPS.read_text(), reason="no glibc here")
@pytest.mark.parametrize(
    "blocks", [pytest.param(["100000000"], id="one block"), pytest.param(["400000000"] * 4, id="beyond a GiB")]
)
def test_what_a_command_freed_stays(blocks: list[str]) -> None:
    during, after = pages("command", *blocks)
    assert during > 0.9 * sum(map(int, blocks)) / 65536
    assert after > 0.9 * during
    _, after = pages("library", *blocks)
    assert after < 0.1 * during  # importing metaft changes nothing
