"""Omniglot in the MAML paper's protocol: `python examples/omniglot.py --data-root DATA [--settings 5w1s 20w1s]`.

Characters of 1,100 classes to train on, 423 to test on, a random quarter turn for each class of a task, as many queries
per class as shots, and for maml and fomaml its inner steps, rate and three steps at test; other members keep their own
(https://arxiv.org/abs/1703.03400, section 5.2). The paper's 60,000 meta-steps take a GPU or a night; a few thousand
come close.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from metaft import MetaftError, MetaTrainConfig, meta_train

SETTINGS = {
    # ways, shots, tasks per meta-step, inner steps, inner rate, the paper's accuracy in %
    "5w1s": (5, 1, 32, 1, 0.4, "98.7 ± 0.4"),
    "5w5s": (5, 5, 32, 1, 0.4, "99.9 ± 0.1"),
    "20w1s": (20, 1, 16, 5, 0.1, "95.8 ± 0.3"),
    "20w5s": (20, 5, 16, 5, 0.1, "98.9 ± 0.2"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="holds omniglot/ (auto: METAFT_DATA)")
    parser.add_argument("--download", action="store_true", help="fetch it to there first (17 MB)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["5w1s"])
    parser.add_argument("--algorithm", default="maml", help="any name of docs/algorithms.md")
    parser.add_argument("--iterations", type=int, default=4800)
    parser.add_argument("--episodes", type=int, default=600, help="to test on")
    parser.add_argument("--width", type=int, default=64, help="filters of a layer")
    parser.add_argument("--out", default="runs/omniglot")
    given = parser.parse_args()

    table = []
    for setting in given.settings:
        ways, shots, tasks, steps, rate, paper = SETTINGS[setting]
        loop: dict[str, Any] = {"inner_steps": steps, "inner_lr": rate, "test_inner_steps": max(3, steps)}
        try:
            config = MetaTrainConfig(
                dataset="omniglot", data_root=given.data_root, download=given.download,
                ways=ways, shots=shots, query_shots=5, meta_batch=tasks, width=given.width,
                algorithm=given.algorithm, iterations=given.iterations, test_query_shots=shots,
                eval_episodes=min(200, given.episodes), test_episodes=given.episodes,
                out=f"{given.out}-{given.algorithm}-{setting}",
                **(loop if given.algorithm in ("maml", "fomaml") else {}),
            )  # fmt: skip
            table.append((setting, meta_train.run(config)["test"], paper))
        except MetaftError as error:
            print(f"omniglot: {error}", file=sys.stderr)
            return error.status

    print(f"\n{given.algorithm} on Omniglot, accuracy in %, {given.episodes} test episodes")
    print(f"{'':<8}{'transductive':<16}{'inductive':<16}{'MAML paper (transductive)'}")
    for setting, test, paper in table:
        here = (f"{100 * test[mode]['accuracy']:.1f} ± {100 * test[mode]['ci95']:.1f}" for mode in MODES)
        print(f"{setting:<8}" + "".join(f"{figure:<16}" for figure in here) + paper)
    return 0


MODES = ("transductive", "inductive")

if __name__ == "__main__":
    sys.exit(main())
