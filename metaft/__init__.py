"""metaft: meta-learn an initialisation on many small tasks, then fine-tune it to one.

    pool = metaft.tasks.glyphs()                                      # images by class
    source = pool.source(ways=5, shots=1, query_shots=5)              # episodes from them
    model = metaft.models.build("conv4", ways=5, shape=source.shape, width=64, seed=0)
    maml = metaft.algorithms.maml(model, inner_lr=0.4)                # pure functions for one task
    with metaft.engine() as engine:                                   # maps them over tasks
        metaft.meta_gradient(engine, maml, meta, state, source.episodes(0, "train", range(32)))

The commands are `metaft.meta_train`, `metaft.evaluate`, `metaft.adapt` and `metaft.predict`; `metaft.load(RUN)` gives
the classifier of an adapt run. Importing metaft imports nothing heavy: each name below is fetched
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metaft._version import __version__

if TYPE_CHECKING:
    from metaft import (
        adapt,
        algorithms,
        evaluate,
        finetune,
        inner,
        meta_train,
        metrics,
        models,
        plots,
        predict,
        tasks,
    )
    from metaft.algorithms import Algorithm
    from metaft.config import AdaptConfig, EvaluateConfig, MetaTrainConfig
    from metaft.engines import Engine, engine
    from metaft.errors import CheckpointError, DataError, MetaftError, MetaftWarning, NonFiniteError
    from metaft.finetune.classifier import Classifier, load
    from metaft.models import Model, functional
    from metaft.objective import Objective
    from metaft.outer import MetaGradient, meta_gradient
    from metaft.runs import checkpoint
    from metaft.testing import meta_test
    from metaft.types import Episode, Fast

_MODULES = {
    "adapt": "adapt",
    "algorithms": "algorithms",
    "checkpoint": "runs.checkpoint",
    "evaluate": "evaluate",
    "finetune": "finetune",
    "inner": "inner",
    "meta_train": "meta_train",
    "metrics": "metrics",
    "models": "models",
    "plots": "plots",
    "predict": "predict",
    "tasks": "tasks",
}
_NAMES = {
    "AdaptConfig": "metaft.config",
    "Algorithm": "metaft.algorithms",
    "CheckpointError": "metaft.errors",
    "Classifier": "metaft.finetune.classifier",
    "DataError": "metaft.errors",
    "Engine": "metaft.engines",
    "Episode": "metaft.types",
    "EvaluateConfig": "metaft.config",
    "Fast": "metaft.types",
    "MetaGradient": "metaft.outer",
    "MetaTrainConfig": "metaft.config",
    "MetaftError": "metaft.errors",
    "MetaftWarning": "metaft.errors",
    "Model": "metaft.models",
    "NonFiniteError": "metaft.errors",
    "Objective": "metaft.objective",
    "engine": "metaft.engines",
    "functional": "metaft.models",
    "load": "metaft.finetune.classifier",
    "meta_gradient": "metaft.outer",
    "meta_test": "metaft.testing",
}

__all__ = [
    "AdaptConfig",
    "Algorithm",
    "CheckpointError",
    "Classifier",
    "DataError",
    "Engine",
    "Episode",
    "EvaluateConfig",
    "Fast",
    "MetaGradient",
    "MetaTrainConfig",
    "MetaftError",
    "MetaftWarning",
    "Model",
    "NonFiniteError",
    "Objective",
    "__version__",
    "adapt",
    "algorithms",
    "checkpoint",
    "engine",
    "evaluate",
    "finetune",
    "functional",
    "inner",
    "load",
    "meta_gradient",
    "meta_test",
    "meta_train",
    "metrics",
    "models",
    "plots",
    "predict",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"metaft.{_MODULES[name]}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'metaft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
