"""Several algorithms on the very same test episodes, with paired intervals.

    python examples/compare_algorithms.py --algorithms maml anil protonet [--iterations 600] [--out runs/compare]

Intervals of the mean difference by episode tell more than two side by side. Runs that are in `--out` are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from metaft import MetaftError, MetaTrainConfig, meta_train
from metaft.metrics import mean_ci95
from metaft.runs.assemble import assemble, fill
from metaft.runs.compute import engine_for
from metaft.runs.opened import open_run
from metaft.support import places
from metaft.testing import score_episodes
from metaft.types import NORMS

TEST = ("test_ways", "test_shots", "test_query_shots", "rotate", "split", "image_size", "channels", "eval_seed")


def scores(path: Path, episodes: int, asked: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Accuracies, or squared errors, after a run's last step: [episodes, 2], transductive and inductive; and by which
    settings its episodes were made. Raises MetaftError for a run with other settings than those `asked`."""
    _, config, snapshot = open_run(path)
    kept = snapshot.header["config"]
    for field, value in asked.items():
        if (has := places.shown(kept[field]) if field == "dataset" else kept.get(field)) != value:
            raise MetaftError(f"{field}: {path} has {has!r}, not {value!r}; take another --out")
    c, best = (parts := assemble(config)).config, fill(parts, snapshot)
    sizes = {"ways": c.test.test_ways, "shots": c.test.test_shots, "query_shots": c.test.test_query_shots}
    source = parts.dataset.source(**sizes, rotate=c.data.rotate, splits=("test",))
    with engine_for(parts) as engine:
        own = score_episodes(engine, parts.algorithm, best.meta, best.state, source, split="test",
                             seed=c.test.eval_seed, episodes=episodes, steps=c.test.test_inner_steps)  # fmt: skip
    return own[..., -1], {field: kept.get(field) for field in TEST}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["maml", "anil", "protonet"], help="the first is the base")
    parser.add_argument("--dataset", default="glyphs")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--width", type=int, default=64, help="filters of a layer")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    found: dict[str, Tensor] = {}
    shared: dict[str, Any] = {"dataset": given.dataset, "iterations": given.iterations, "width": given.width}
    try:
        for name in given.algorithms:
            path, asked = given.out / name, {**shared, "algorithm": name}
            if not (path / "result.json").exists():
                meta_train.run(MetaTrainConfig(**asked, test_episodes=given.episodes, out=str(path)))
            found[name], test = scores(path, given.episodes, asked)
            shared |= test
    except MetaftError as error:
        print(f"compare_algorithms: {error}", file=sys.stderr)
        return error.status
    first, regression = given.algorithms[0], given.dataset == "sinusoid"
    figure, factor, digits = ("mse (less is better)", 1, 3) if regression else ("accuracy in %", 100, 1)
    print(f"\n{given.dataset}, {figure}, {given.episodes} episodes; in brackets the mean difference to {first}")
    print(" " * 16 + "".join(f"{mode:<36}" for mode in NORMS))
    for name, own in found.items():
        rows = zip(*mean_ci95(factor * own), *mean_ci95(factor * (own - found[first])), strict=True)
        cells = [f"{m:.{digits}f} ± {c:.{digits}f}  ({g:+.{digits}f} ± {a:.{digits}f})" for m, c, g, a in rows]
        print(f"{name:<16}" + "".join(f"{cell:<36}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
