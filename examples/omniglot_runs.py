"""Omniglot's official one-shot runs (20-way, within an alphabet) as a file for `metaft.evaluate --episodes-file`.

    python examples/omniglot_runs.py FOLDER > runs.jsonl
    python -m metaft.evaluate RUN --episodes-file runs.jsonl

FOLDER holds run01 to run20 of the release's `all_runs.zip` (https://github.com/brendenlake/omniglot, python/one-shot-
classification); each run's class_labels.txt pairs a test image with the training image of its class. Paths are written
in full, so the file may lie anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def episode(run: Path) -> dict[str, list[list[str]]]:
    """Of one run's folder: the training image is its class's name. Raises ValueError for a line of another form."""
    pairs = []
    for number, line in enumerate((run / "class_labels.txt").read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"{run / 'class_labels.txt'}, line {number}: {line!r} is not two paths")
        pairs.append([str(run.parent.resolve() / word) for word in words])
    classes = sorted({train for _, train in pairs})
    return {"support": [[train, Path(train).stem] for train in classes], "query": [[q, Path(t).stem] for q, t in pairs]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    runs = sorted(path.parent for path in folder.glob("run*/class_labels.txt"))
    if not runs:
        print(f"error: {folder} holds no run01/class_labels.txt and its like", file=sys.stderr)
        return 2
    try:
        for run in runs:
            print(json.dumps(episode(run)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
