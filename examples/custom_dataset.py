"""Meta-train on a data set of your own: `python examples/custom_dataset.py [--iterations 300] [--out runs/digits]`.

Anything will do that has a length and gives (image, label), as torchvision's data sets do; here it is scikit-learn's
handwritten digits, 1,797 pictures of 8x8. Six digits are trained on; the two of the test were never seen. Folders of
pictures need no Python at all: python -m metaft.meta_train --dataset folder:PATH.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from metaft import EvaluateConfig, MetaTrainConfig, evaluate, meta_train
from metaft.tasks.learn2learn import pool


class Digits:
    """Pictures as [H, W] floats in 0..1, with their labels 0..9."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self) -> None:
        pixels, self.labels = load_digits(return_X_y=True)
        self.images = np.reshape(pixels, (-1, 8, 8)) / 16.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", default="runs/digits")
    given = parser.parse_args()

    # One data set is split by a hash of the classes' names; pool(train, val, test) takes splits of your own.
    digits = pool(Digits(), name="digits")
    for split, classes in digits.splits.items():
        print(f"{split}: {', '.join(digits.class_names[c] for c in classes)}")
    config = MetaTrainConfig(
        ways=2, shots=1, width=32, iterations=given.iterations,
        eval_episodes=min(200, given.episodes), test_episodes=given.episodes, out=given.out,
    )  # fmt: skip
    meta_train.run(config, dataset=digits)
    # A checkpoint holds parameters, not data: whoever evaluates the run brings the data set again.
    evaluate.run(Path(given.out), EvaluateConfig(shots=5, episodes=given.episodes), dataset=digits)


if __name__ == "__main__":
    main()
