"""A member of your own, in a few lines: MAML that steps by the gradient's sign, at rates that it learns.

    python examples/new_algorithm.py [--iterations 300] [--out runs/new]
    python -m metaft.meta_train --plugin examples/new_algorithm.py --algorithm sign-maml [OPTIONS]

The first trains it on the built-in letters and meta-tests it beside MAML on the same episodes; the second takes this
file as a plugin, which a run keeps for metaft.evaluate, metaft.adapt and --resume. `by_gradient` is all of MAML but
what a member has of its own; one that does not go down the support loss writes `init`, `adapt` and `predict` itself, as
metaft/algorithms/protonet.py does.
"""

from __future__ import annotations

import argparse

from metaft import Algorithm, MetaTrainConfig, Model, meta_train
from metaft.algorithms import ALGORITHMS, Hooks, by_gradient
from metaft.inner import Rates
from metaft.types import Loss, Norm, Params


def sign_maml(
    model: Model, *, loss: Loss, inner_lr: float = 0.01, inner_steps: int = 1, norm: Norm = "transductive"
) -> Algorithm:
    """fast = meta - rate * sign(gradient of the support loss), with one learned rate for each tensor.

    A sign has derivative 0, so that the first-order gradient is the exact one and no second derivative is taken.
    """

    def rates(meta: Params) -> Rates:
        return lambda gradients, step: {k: meta[f"{k}.rate"] * g.sign() for k, g in gradients.items()}

    return by_gradient(
        "sign-maml",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        first_order=True,
        norm=norm,
        adapted=list(model.params),
        learned=model.params | {f"{k}.rate": p.new_full((), inner_lr) for k, p in model.params.items()},
        hooks=Hooks(rates=rates),
    )


ALGORITHMS["sign-maml"] = sign_maml  # now --algorithm, its checks and its defaults know it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", default="runs/new")
    given = parser.parse_args()

    for name, plugin in (("sign-maml", __file__), ("maml", None)):
        config = MetaTrainConfig(
            algorithm=name, plugin=plugin, iterations=given.iterations, eval_episodes=min(200, given.episodes),
            test_episodes=given.episodes, out=f"{given.out}-{name}",
        )  # fmt: skip
        test = meta_train.run(config)["test"]["transductive"]
        print(f"\n{name}: {100 * test['accuracy']:.1f} ± {100 * test['ci95']:.1f} %\n")


if __name__ == "__main__":
    main()
