"""Meta-train a network of your own: `python examples/custom_model.py [--iterations 300] [--out runs/custom]`.

Any module will do whose last layer is an nn.Linear with as many outputs as tasks have classes. Its batch normalisation
layers become episode normalisation, which keeps no running statistics.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, nn

from metaft import EvaluateConfig, MetaTrainConfig, evaluate, meta_train


class SmallResNet(nn.Module):
    """Two residual blocks, for 28x28 grey images."""

    def __init__(self, ways: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(width * 7 * 7, ways)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", default="runs/custom")
    given = parser.parse_args()

    config = MetaTrainConfig(
        ways=5,
        shots=1,
        inner_lr=0.1,
        iterations=given.iterations,
        eval_episodes=min(200, given.episodes),
        test_episodes=given.episodes,
        out=given.out,
    )
    module = SmallResNet(ways=5)
    meta_train.run(config, module=module)
    # A checkpoint holds parameters, not code: whoever evaluates the run brings the module again.
    evaluate.run(Path(given.out), EvaluateConfig(shots=5, episodes=given.episodes), module=module)


if __name__ == "__main__":
    main()
