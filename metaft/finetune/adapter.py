"""What low-rank adaptation trained as a file of its own, which with the start that it was added to is the classifier.

Of one backbone and many targets it is all that has to be kept of each: for a rank of 8 a twentieth of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaft.errors import CheckpointError, MetaftError, words_of
from metaft.finetune import heads
from metaft.finetune.classifier import Classifier
from metaft.finetune.strategies.lora import Product, added
from metaft.inputs import Inputs, of_header
from metaft.models.stored import empty_stored
from metaft.runs import checkpoint
from metaft.settings.finetuning import StartSettings
from metaft.starts.base import Start, body, digest_of
from metaft.starts.names import takes_size
from metaft.starts.open import open_start
from metaft.support.foreign import ran_out
from metaft.types import Params


def save(
    path: Path,
    classifier: Classifier,
    products: Mapping[str, Product],
    start: Start,
    given: StartSettings,
) -> None:
    """Of a start with values of its own: write products by the names of the weights that they are added to, the head,
    and what else the classifier has that is not the start's (moments that were stored after training). `given` says how
    the start is opened: size and normalisation are of published weights, and beside a run meant for what it is compared
    with. Raises CheckpointError."""
    assert given.init is not None, "a run's settings have nothing open"
    size, norm = (given.image_size, given.init_norm) if takes_size(given.init) else (None, None)
    begun = body(start, 0).state_dict()
    own = {k: v for k, v in classifier.body.state_dict().items() if k not in products and not _same(v, begun.get(k))}
    tensors = {f"body/{k}": v for k, v in own.items()}
    tensors |= {f"head/{k}": v for k, v in classifier.head.state_dict().items()}
    for name, product in products.items():
        tensors |= {f"product/{name}/A": product.a, f"product/{name}/B": product.b}
    header = {
        "adapter": heads.kind(classifier.head),
        "scale": {name: product.scale for name, product in products.items()},
        "inputs": classifier.inputs.plain(),
        "class_names": list(classifier.class_names),
        "init": given.init,
        "image_size": size,
        "init_norm": norm,
        "init_sha256": digest_of(start),
    }
    checkpoint.save(path, tensors, header)


def _same(value: Tensor, before: Tensor | None) -> bool:
    return before is not None and before.shape == value.shape and torch.equal(before, value.cpu())


def classifier_of(path: Path, tensors: Params, header: Mapping[str, Any]) -> Classifier:
    """The classifier of such a file, by the start that its header names.

    Raises CheckpointError where that is gone or another one, and for a damaged file.
    """
    inputs = of_header(header)
    assert inputs is not None, "every adapter is written with them"
    try:
        start = _start_of(header, inputs)
    except MetaftError as error:
        raise CheckpointError(f"checkpoint {path}: its start cannot be opened: {error}") from None
    if digest_of(start) != header["init_sha256"]:
        raise CheckpointError(f"checkpoint {path}: its start {header['init']} has other values now")
    begun, products = body(start, 0), checkpoint.under(tensors, "product")
    values = begun.state_dict()
    whole = empty_stored(begun)
    state = {**whole.state_dict(), **values, **checkpoint.under(tensors, "body")}
    try:
        for name, scale in header["scale"].items():
            state[name] = added(state[name], Product(products[f"{name}/A"], products[f"{name}/B"], scale))
        whole.load_state_dict(state)
        head: nn.Module = heads.filled(header["adapter"], checkpoint.under(tensors, "head"))
    except (KeyError, RuntimeError, MetaftError) as error:
        if ran_out(error):
            raise
        raise CheckpointError(f"checkpoint {path}: not of this start: {words_of(error)}") from None
    return Classifier(whole, head, inputs, tuple(header["class_names"]))


def _start_of(header: Mapping[str, Any], inputs: Inputs) -> Start:
    size, norm = header["image_size"], header["init_norm"]
    return open_start(header["init"], lambda: inputs, image_size=size, norm=norm)
