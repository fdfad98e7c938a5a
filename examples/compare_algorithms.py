"""Several algorithms on the very same test episodes, with paired intervals.

    python examples/compare_algorithms.py --algorithms maml anil protonet [--iterations 600] [--out runs/compare]

Some episodes are hard for everyone, so that differences within an episode spread less than the figures themselves: the
interval of the mean difference to the first algorithm tells more than two intervals side by side. Runs that are
in `--out` already are not trained again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from metaft import MetaftError, MetaTrainConfig, meta_train
from metaft.assemble import assemble, engine_for, fill, open_run
from metaft.metrics import mean_ci95
from metaft.testing import score_episodes
from metaft.types import NORMS


def scores(path: Path, episodes: int) -> Tensor:
    """[episodes, 2]: a run's accuracy on each test episode after its last inner step, transductive and inductive."""
    _, config, snapshot = open_run(path)
    parts = assemble(config)
    c, best = parts.config, fill(parts, snapshot)
    source = parts.dataset.source(
        ways=c.test_ways, shots=c.test_shots, query_shots=c.test_query_shots, rotate=c.rotate, splits=("test",)
    )
    with engine_for(parts) as engine:
        return score_episodes(
            engine, parts.algorithm, best.meta, best.state, source,
            split="test", seed=c.eval_seed, episodes=episodes, steps=c.test_inner_steps,
        )[..., -1]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--algorithms", nargs="+", default=["maml", "anil", "protonet"], help="the first is compared to"
    )
    parser.add_argument("--dataset", default="glyphs")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--width", type=int, default=64, help="filters of a layer")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()

    found: dict[str, Tensor] = {}
    try:
        for name in given.algorithms:
            path = given.out / name
            if not (path / "result.json").exists():
                meta_train.run(MetaTrainConfig(
                    dataset=given.dataset, algorithm=name, iterations=given.iterations, width=given.width,
                    eval_episodes=min(200, given.episodes), test_episodes=given.episodes, out=str(path),
                ))  # fmt: skip
            found[name] = 100 * scores(path, given.episodes)
    except MetaftError as error:
        print(f"compare_algorithms: {error}", file=sys.stderr)
        return error.status

    first = given.algorithms[0]
    print(f"\n{given.dataset}, accuracy in %, {given.episodes} episodes; in brackets the mean difference to {first}")
    print(f"{'':<14}" + "".join(f"{mode:<32}" for mode in NORMS))
    for name, own in found.items():
        mean, ci95 = mean_ci95(own)
        gain, apart = mean_ci95(own - found[first])
        cells = [f"{m:.1f} ± {c:.1f}  ({g:+.1f} ± {a:.1f})" for m, c, g, a in torch.stack([mean, ci95, gain, apart], 1)]
        print(f"{name:<14}" + "".join(f"{cell:<32}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
