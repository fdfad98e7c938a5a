"""The published algorithms by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

from metaft.algorithms.anil import anil
from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.algorithms.baseline import baseline, baseline_plus_plus
from metaft.algorithms.boil import boil
from metaft.algorithms.cavia import cavia
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.algorithms.imaml import imaml
from metaft.algorithms.maml import fomaml, maml
from metaft.algorithms.maml_plus_plus import maml_plus_plus
from metaft.algorithms.matching_net import matching_net
from metaft.algorithms.meta_curvature import meta_curvature
from metaft.algorithms.meta_sgd import meta_sgd
from metaft.algorithms.proto_maml import proto_maml
from metaft.algorithms.protonet import protonet
from metaft.algorithms.query import query_loss
from metaft.algorithms.reptile import reptile
from metaft.algorithms.unicorn_maml import unicorn_maml
from metaft.errors import MetaftError, no_such
from metaft.models import Model
from metaft.spec import bind, convert, name_of, no_setting, parameters, parse, parts, takes

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Hooks",
    "TaskGrad",
    "anil",
    "baseline",
    "baseline_plus_plus",
    "boil",
    "build",
    "by_gradient",
    "cavia",
    "fomaml",
    "hyper_parameters",
    "imaml",
    "is_ours",
    "maml",
    "maml_plus_plus",
    "meta_curvature",
    "matching_net",
    "meta_sgd",
    "parse_hyper",
    "proto_maml",
    "protonet",
    "query_loss",
    "read",
    "reptile",
    "unicorn_maml",
]

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "maml": maml,
    "fomaml": fomaml,
    "anil": anil,
    "boil": boil,
    "meta-sgd": meta_sgd,
    "maml++": maml_plus_plus,
    "meta-curvature": meta_curvature,
    "reptile": reptile,
    "imaml": imaml,
    "cavia": cavia,
    "proto-maml": proto_maml,
    "unicorn-maml": unicorn_maml,
    "protonet": protonet,
    "matching-net": matching_net,
    "baseline": baseline,
    "baseline++": baseline_plus_plus,
}
_OURS = dict(ALGORITHMS)


def is_ours(name: str) -> bool:
    """Whether a registered member is the published one of that name, and not one of the user's own."""
    return ALGORITHMS[name] is _OURS.get(name)


def hyper_parameters(name: str) -> dict[str, object]:
    """What a member can be given besides the model, with its defaults.

    Raises MetaftError for an unknown name, or a member that cannot be given a loss and a mode, or not them alone.
    """
    if name not in ALGORITHMS:
        spelt = name.replace("_", "-").replace("-plus", "+")  # as the functions are called, or nearly
        raise no_such("algorithm", name, sorted(ALGORITHMS), near=spelt)
    defaults = {k: p.default for k, p in _keywords(name).items()}
    bare = [k for k, default in defaults.items() if default is inspect.Parameter.empty and k not in ("loss", "norm")]
    if bare or not {"loss", "norm"} <= defaults.keys():
        raise MetaftError(
            f"algorithm: {name!r} must be a function (model, *, loss, norm, ...) in which what follows has defaults"
            + (f"; {', '.join(bare)} has none" if bare else "")
        )
    return defaults


def _keywords(name: str) -> dict[str, inspect.Parameter]:
    """A member's parameters but for the model, with their types."""
    return {k: p for k, p in parameters(ALGORITHMS[name]).items() if p.kind is p.KEYWORD_ONLY}


OPTIONS = ("inner_lr", "inner_steps", "inner_optimizer", "inner_augment", "adapt_norm", "iterations")
"""Hyper-parameters that a config has by the same name."""

COMMON = frozenset({"loss", "norm", *OPTIONS})
"""Hyper-parameters that have an option of their own on the command line."""


def parse_hyper(name: str, assignments: Iterable[str]) -> dict[str, object]:
    """`NAME=VALUE` each, to what `build` takes: values have the type of the member's default.

    Raises MetaftError for anything else than NAME=VALUE, a name that the member has not, or has as an option of its
    own, a name given twice, or a value of another type.
    """
    names = hyper_parameters(name).keys() - COMMON
    known = {k: p for k, p in _keywords(name).items() if k in names}
    values: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise MetaftError(f"hyper: {assignment!r} is not NAME=VALUE")
        if key not in known:
            option = f"; --{key.replace('_', '-')} is an option by itself" if key in COMMON else ""
            raise no_setting("hyper", name, key, assignment, known, option)
        if key in values:
            raise MetaftError(f"hyper: {key!r} is given twice ({assignment!r})")
        try:
            values[key] = convert(text, known[key])
        except ValueError as error:
            raise MetaftError(f"hyper: {assignment!r} {error}") from None
    return values


def read(spec: str, hyper: Iterable[str] = ()) -> tuple[str, tuple[str, ...]]:
    """The member of `--algorithm NAME[:key=value,...]`, and its settings as `--hyper` has them, `hyper`'s own last.

    Raises MetaftError for an unknown member or setting, a value of another type, a setting that is an option of its
    own, one that is in both, and a colon with nothing behind it.
    """
    hyper = tuple(hyper)
    name = name_of(spec, ALGORITHMS)
    if name == spec:
        return name, hyper
    hyper_parameters(name)
    for key in (part.partition("=")[0] for part in parts(spec[len(name) + 1 :])):
        if key in COMMON:
            raise MetaftError(f"algorithm: --{key.replace('_', '-')} is an option by itself (given in {spec!r})")
    member = {name: ALGORITHMS[name]}
    table = {name: takes(member[name], reserved=COMMON)}
    if spec == f"{name}:":  # of the other members runs keep the text as it was given, and these were taken
        raise MetaftError(f"algorithm: write {table[name].shown(name)!r}, not {spec!r}")
    bind("algorithm", spec, member, reserved=COMMON)
    options = parse("algorithm", spec, table).options
    for key, _ in options:
        twice = [assignment for assignment in hyper if assignment.partition("=")[0] == key]
        if twice:
            raise MetaftError(f"algorithm: {key!r} is given in {spec!r} and as --hyper {twice[0]}; leave one away")
    return name, (*(f"{key}={value}" for key, value in options), *hyper)


def build(name: str, model: Model, hyper: Mapping[str, object]) -> Algorithm:
    """The named algorithm over a model.

    Raises MetaftError for an unknown name, a hyper-parameter that this member does not have, or a value out of range.
    """
    known = hyper_parameters(name)
    for field, value in hyper.items():
        if field not in known:
            of_test = "; --test-inner-steps is how many its head takes" if name.startswith("baseline") else ""
            raise MetaftError(
                f"{field}: {name} has no such setting (given {value!r}); it has {', '.join(sorted(known))}"
                + (of_test if field == "inner_steps" else "")
            )
    algorithm = ALGORITHMS[name](model, **hyper)
    if not isinstance(algorithm, Algorithm):
        raise MetaftError(f"algorithm: {name!r} must return an Algorithm, not {type(algorithm).__name__}")
    return algorithm
