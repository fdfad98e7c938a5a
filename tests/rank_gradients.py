"""The meta-gradient of a rank, of members that differ in what ranks have to add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import scenarios
import torch
import toys

from metaft import algorithms, engines, outer
from metaft.algorithms import Algorithm
from metaft.dist.group import join
from metaft.dist.ranks import Ranks

MEMBERS: dict[str, Callable[[Any], Algorithm]] = {
    "maml": lambda model: algorithms.maml(model, inner_lr=0.1, inner_steps=2),
    "maml++ with step statistics": lambda model: algorithms.maml_plus_plus(
        model, inner_steps=2, norm="inductive", step_statistics=True, iterations=50
    ),
    "meta-sgd": lambda model: algorithms.meta_sgd(model, inner_lr=0.1, inner_steps=1),
    "protonet": lambda model: algorithms.protonet(model),
    "reptile with state": lambda model: algorithms.reptile(model, inner_steps=3, keep_moments=True),
    "annealed multi-step": lambda model: toys.multi_step(model, "inductive"),
}

TASKS = 5


def meta_gradient(member: str, dtype: torch.dtype, ranks: Ranks, model: str = "mlp") -> outer.MetaGradient:
    """Of this rank's share of five tasks, summed over ranks."""
    algorithm = MEMBERS[member](scenarios.model(model, dtype=dtype))
    meta, state = algorithm.init(0)
    data = scenarios.episodes(tasks=TASKS, dtype=dtype)
    share = ranks.share(range(TASKS))
    mine = type(data)(*(t[share.start : share.stop] for t in data))
    with engines.engine("threads", threads=1, chunk=1) as engine:
        return outer.meta_gradient(engine, algorithm, meta, state, mine, step=3, ranks=ranks)


def main(argv: Sequence[str]) -> int:
    """`OUT MODEL MEMBER...`: writes this rank's meta-gradients in float64 to OUT/RANK.pt."""
    out, model, *members = argv
    here = join()
    found = {member: meta_gradient(member, torch.float64, here, model)._asdict() for member in members}
    torch.save(found, f"{out}/{here.rank}.pt")
    here.close()
    return 0
