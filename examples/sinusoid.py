"""Regression to sine waves: one gradient step from a learned initialisation fits a curve from a few points.

    python examples/sinusoid.py [--shots 10] [--iterations 3000] [--out runs/curve.png]

The first experiment of the MAML paper (https://arxiv.org/abs/1703.03400, section 5.1), as a loop of one's own over
metaft's parts. A picture shows the points of one task and the learned curve before and after adapting to them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import metaft
from metaft.plots import regression_episode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=10, help="points of a curve to adapt to")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/curve.png"))
    given = parser.parse_args()

    curves = metaft.tasks.Sinusoid()
    train = curves.source(shots=given.shots, query_shots=given.shots, splits=("train",))
    test = curves.source(shots=given.shots, query_shots=100, splits=("test",))
    model = metaft.models.build("mlp", ways=1, shape=train.shape, width=40, seed=0)
    maml = metaft.algorithms.maml(model, loss="mse", inner_lr=0.01)
    meta, state = maml.init(0)
    adam = torch.optim.Adam(meta.values(), lr=1e-3)

    with metaft.engine("vmap") as engine:
        for step in range(given.iterations):
            tasks = train.episodes(seed=0, split="train", indices=range(25 * step, 25 * step + 25))
            result = metaft.meta_gradient(engine, maml, meta, state, tasks, step=step)
            for name, p in meta.items():
                p.grad = result.grads[name]
            adam.step()
            if step % 500 == 0:
                print(f"step {step}: query mse {result.metrics['mse']:.3f}")
        scores = metaft.meta_test(
            engine, maml, meta, state, test, split="test", seed=1234, episodes=given.episodes, steps=10
        )["transductive"]
    print(f"test mse of {given.episodes} curves, each from {given.shots} points:")
    for step, (mse, ci95) in enumerate(zip(scores["mse_per_step"], scores["ci95_per_step"], strict=True)):
        print(f"  after {step:>2} steps {mse:.3f} ± {ci95:.3f}")

    task = metaft.Episode(*(t[0] for t in test.episodes(seed=1234, split="test", indices=[0])))
    order = task.query_x.flatten().argsort()
    lines = {}
    for steps in (0, 1, 10):
        fast = maml.adapt(meta, state, task.support_x, task.support_y, task.key, ways=1, steps=steps)
        lines[f"after {steps} steps"] = maml.predict(fast, task.query_x, "transductive").detach().flatten()[order]
    points, curve = (task.support_x.flatten(), task.support_y.flatten()), (task.query_x[order], task.query_y[order])
    regression_episode(given.out, *points, curve[0].flatten(), curve[1].flatten(), lines)
    print(f"picture: {given.out}")


if __name__ == "__main__":
    main()
