"""The published algorithms by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from metaft.algorithms.anil import anil
from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.algorithms.boil import boil
from metaft.algorithms.maml import fomaml, maml
from metaft.algorithms.meta_sgd import meta_sgd
from metaft.algorithms.proto_maml import proto_maml
from metaft.algorithms.protonet import protonet
from metaft.algorithms.query import query_loss
from metaft.errors import MetaftError, suggest
from metaft.models import Model

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "TaskGrad",
    "anil",
    "boil",
    "build",
    "fomaml",
    "hyper_parameters",
    "maml",
    "meta_sgd",
    "proto_maml",
    "protonet",
    "query_loss",
]

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "maml": maml,
    "fomaml": fomaml,
    "anil": anil,
    "boil": boil,
    "meta-sgd": meta_sgd,
    "proto-maml": proto_maml,
    "protonet": protonet,
}


def hyper_parameters(name: str) -> dict[str, object]:
    """What a member can be given besides the model, with its defaults.

    Raises MetaftError for an unknown name.
    """
    if name not in ALGORITHMS:
        raise MetaftError(f"algorithm: no {name!r}, known are {sorted(ALGORITHMS)}{suggest(name, ALGORITHMS)}")
    parameters = inspect.signature(ALGORITHMS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def build(name: str, model: Model, hyper: Mapping[str, object]) -> Algorithm:
    """The named algorithm over a model.

    Raises MetaftError for an unknown name, a hyper-parameter that this member does not have, or a value out of range.
    """
    known = hyper_parameters(name)
    for field, value in hyper.items():
        if field not in known:
            raise MetaftError(f"{field}: {name} has no such setting (given {value!r}); it has {sorted(known)}")
    return ALGORITHMS[name](model, **hyper)
