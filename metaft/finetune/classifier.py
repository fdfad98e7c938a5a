"""A trained classifier as a plain module: pictures in, logits out, each picture by itself; and its file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaft.errors import CheckpointError, DataError, MetaftError, MetaftWarning, words_of
from metaft.finetune import heads
from metaft.inputs import Inputs, of_header
from metaft.inputs.base import Examples, at_most
from metaft.inputs.flaws import flaws_note, noted
from metaft.inputs.listing import unreadable
from metaft.models.architecture import build
from metaft.models.head import body_of
from metaft.models.stored import empty_stored
from metaft.runs import checkpoint
from metaft.runs.folder import RunFolder
from metaft.support.foreign import ran_out
from metaft.support.modes import in_usual_modes
from metaft.support.paths import local


class Predictor:
    """What labels files, given the logits of raw inputs: a `Classifier`, or a model that was exported from one."""

    inputs: Inputs
    class_names: tuple[str, ...]
    """Of the classes; none where it predicts numbers."""

    def logits(self, examples: Examples, at_once: int | None = None) -> Tensor:
        """Of raw examples [n, ...], [n, classes] on the CPU, `at_once` at a time (None: up to 256, fewer of large
        ones)."""
        raise NotImplementedError

    def read(self, path: Path | str) -> Tensor:
        """A file as the model takes it, raw [1, ...]. Raises DataError, naming the file.

        Warns (MetaftWarning) of what the file holds and the classifier does not take, such as greys beyond the range
        of the training images, and of flaws that it is read with.
        """
        return self.read_all([local(path)])

    def read_all(self, paths: Sequence[Path]) -> Tensor:
        """Several files likewise, raw [n, ...]."""
        with noted() as flaws:
            readings = [self.inputs.read(path) for path in paths]
        bad = {reading.file: reading.why for reading in readings if reading.raw is None}
        if bad:
            raise DataError(unreadable(bad, len(paths)))
        for note in (*self.inputs.notes(readings), *flaws_note(flaws)):
            warnings.warn(note, MetaftWarning, stacklevel=3)
        return torch.cat([reading.raw for reading in readings if reading.raw is not None])

    def numbers(self, examples: Examples, at_once: int | None = None) -> Tensor:
        """float64 [n] on the CPU: what a target of numbers is trained to predict. Raises MetaftError where it predicts
        classes."""
        if self.class_names:
            raise MetaftError("this classifier predicts classes, and no numbers; see `probabilities` and `names`")
        return self.logits(examples, at_once).squeeze(-1).double()

    @in_usual_modes
    def probabilities(self, examples: Examples, at_once: int | None = None) -> Tensor:
        """float32 [n, classes] on the CPU, as many at a time as for `logits`. Raises MetaftError where it predicts
        numbers."""
        if not self.class_names:
            raise MetaftError("this classifier predicts numbers, and no classes; see `numbers`")
        return self.logits(examples, at_once).softmax(-1).float()

    def names(self, examples: Examples) -> list[str]:
        """The most probable class of each example."""
        return [self.class_names[int(i)] for i in self.probabilities(examples).argmax(-1)]

    def label(self, paths: Iterable[Path | str]) -> list[str]:
        """The most probable class of each picture file. Raises DataError that names those that cannot be read; warns
        as `read` does."""
        if isinstance(paths, (str, Path)):
            raise MetaftError(f"label takes a list of paths, got {paths!r}")
        files = [local(path) for path in paths]
        if not files:
            raise MetaftError("label takes one path or more, got none")
        return self.names(self.read_all(files))


class Classifier(Predictor, nn.Module):
    """Inputs, backbone with stored normalisation moments, and head.

    `forward` takes raw inputs (of pictures uint8 [n, C, H, W] in the polarity that `inputs` names), and gives logits
    [n, classes]; it raises MetaftError for anything else. No layer looks at more than one input, so a prediction does
    not depend on its neighbours in the batch. Of a target of numbers it has no class names, and its one output is the
    number.
    """

    def __init__(self, body: nn.Module, head: nn.Module, inputs: Inputs, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.inputs = inputs
        self.class_names = class_names
        self.eval()

    def forward(self, raw: Tensor) -> Tensor:
        self.inputs.check(raw)
        return self.head(self.body(self.inputs(raw).to(next(self.parameters()).dtype)))

    @in_usual_modes
    @torch.no_grad()
    def logits(self, examples: Examples, at_once: int | None = None) -> Tensor:
        """What `forward` gives."""
        device = next(self.parameters()).device
        return in_batches(lambda raw: self(raw.to(device)).cpu(), examples, self.inputs, at_once)


def in_batches(of: Callable[[Tensor], Tensor], examples: Examples, inputs: Inputs, at_once: int | None) -> Tensor:
    """What a function makes of raw examples, `at_once` at a time (None: up to 256, fewer of large ones)."""
    at_once = at_once or at_most(inputs.shape, 256)
    return torch.cat([of(examples[rows]) for rows in torch.arange(len(examples)).split(at_once)])


def save(path: Path, classifier: Classifier, architecture: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a classifier as one file that holds all it needs; `architecture` is its run's. Raises CheckpointError."""
    tensors = {
        **{f"body/{k}": v for k, v in classifier.body.state_dict().items()},
        **{f"head/{k}": v for k, v in classifier.head.state_dict().items()},
    }
    header = {
        "classifier": heads.kind(classifier.head),
        "architecture": dict(architecture),
        "inputs": classifier.inputs.plain(),
        "class_names": list(classifier.class_names),
        **about,
    }
    checkpoint.save(path, tensors, header)


@in_usual_modes
def load(run: Path | str, *, module: nn.Module | None = None, device: str | torch.device = "cpu") -> Classifier:
    """The classifier of an adapt run (or its `classifier.safetensors` alone, or `adapter.safetensors` with the start
    that it names at hand), in eval mode.

    `module` brings the user's own architecture where the run was trained on one. Warns where the run is not finished.
    Raises CheckpointError where there is no classifier, or a damaged one, or not of this architecture.
    """
    path = local(run)
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no run {path}, and no classifier's file of this name")
    if os.path.isdir(path):
        folder = RunFolder.open(path)
        smaller = folder.compress.exists()
        maker = "metaft.compress" if smaller else "metaft.adapt"
        if not folder.classifier.exists():
            raise CheckpointError(
                f"run folder {path} holds no classifier; "
                + (
                    f"make one with: python -m metaft.adapt --init {path}"
                    if os.path.exists(folder.best)
                    else f"did {maker} finish there?"
                )
            )
        if not folder.result.exists():
            warnings.warn(
                f"run folder {path} has no result.json: its classifier is trained, but {maker} did not finish "
                f"there; go on with {f'metaft.compress RUN --out {path} --resume' if smaller else f'--resume {path}'}",
                stacklevel=2,
            )
        path = folder.classifier
    tensors, header = checkpoint.load(path)
    if "adapter" in header:
        from metaft.finetune.adapter import classifier_of  # which is made of this

        if module is not None:
            raise CheckpointError(f"checkpoint {path}: its start is {header['init']}, not a module of your own")
        return classifier_of(path, tensors, header).to(device)
    if "classifier" not in header:
        raise CheckpointError(f"checkpoint {path}: holds no classifier; metaft.adapt makes one")
    architecture = header["architecture"]
    if (architecture["name"] == "custom") != (module is not None):
        raise CheckpointError(
            f"checkpoint {path}: its module came from Python; hand it over (module=...)"
            if module is None
            else f"checkpoint {path}: its architecture is {architecture['name']}, not a module of your own"
        )
    whole, name = build(architecture, None, module=module)
    body = empty_stored(body_of(whole, name))
    try:
        body.load_state_dict(checkpoint.under(tensors, "body"))
        if header["classifier"] == "own":
            head = whole.get_submodule(name)
            head.load_state_dict(checkpoint.under(tensors, "head"))
        else:
            head = heads.filled(header["classifier"], checkpoint.under(tensors, "head"))
    except (RuntimeError, MetaftError) as error:
        if ran_out(error):
            raise
        raise CheckpointError(f"checkpoint {path}: not of this architecture: {words_of(error)}") from None
    inputs = of_header(header)
    assert inputs is not None, "every classifier is written with them"
    return Classifier(body, head, inputs, tuple(header["class_names"])).to(device)
