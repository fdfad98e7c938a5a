"""Pictures as inputs: from a file to pixels, and from pixels to what a model computes with."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from metaft.errors import DataError, MetaftError
from metaft.inputs.base import Reading
from metaft.inputs.depth import CONTAINER, bits_for, is_deep, maximum
from metaft.inputs.fitting import Fitting, Interpolation, is_grey, pixels_of
from metaft.inputs.listing import FOLDER, is_no_picture, list_images
from metaft.inputs.reading import Unreadable, open_image
from metaft.support.modes import in_usual_modes

Polarity = Literal["bright-on-black", "as-is"]


@dataclasses.dataclass(frozen=True)
class ImageInputs:
    """How a picture file becomes a model's input; it travels in the checkpoint so that new images get the same."""

    kind: ClassVar[str] = "image"

    channels: int
    height: int
    width: int
    polarity: Polarity = "as-is"
    """Grey pools are stored bright on black, whatever the files hold."""
    mean: tuple[float, ...] = (0.0,)
    """Per channel, in units of the pixel range 0..1; a single value serves every channel."""
    std: tuple[float, ...] = (1.0,)
    bits: int = 16
    """Greys of more than 8 bits are divided by 2^bits - 1: the fewest bits that hold those of the whole data set."""
    invert: bool = False
    """Whether the files have the other polarity and are turned around after reading."""
    resize: int | None = None
    """Of colour pictures: the shorter side before the square is cut out of the middle (None: the largest square)."""
    interpolation: Interpolation = "lanczos"

    @property
    def fitting(self) -> Fitting:
        return Fitting(self.height, self.resize, self.interpolation)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> ImageInputs:
        """The inverse of `plain`, by way of JSON."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def __call__(self, raw: Tensor) -> Tensor:
        """uint8 [..., C, H, W] to float32: (x / 255 - mean) / std."""
        scale, shift = _affine(self.mean, self.std, raw.device)
        return raw.float() * scale - shift

    def check(self, raw: Tensor) -> None:
        if raw.dtype != torch.uint8 or raw.dim() != 4 or raw.shape[1:] != self.shape:
            raise MetaftError(
                f"images: the classifier takes uint8 [n, {self.channels}, {self.height}, {self.width}], "
                f"got {str(raw.dtype).removeprefix('torch.')} {list(raw.shape)}"
            )

    def read(self, file: Path) -> Reading:
        """A picture file, or why it cannot be read; a folder is none."""
        try:
            if os.path.isdir(file):
                list_images(file)  # says why not
            image = open_image(file, deep=True)
        except DataError as error:
            kind, why = (error.kind, error.why) if isinstance(error, Unreadable) else (FOLDER, str(error))
            return Reading(file, None, str(error), why, kind, beside=is_no_picture(file))
        most = maximum(image) if is_deep(image) else None
        remarks = {"colour": self.channels == 1 and not is_grey(image), "most": most}
        return Reading(file, self.fitted(image), remarks=remarks)

    @in_usual_modes
    def fitted(self, image: Image.Image) -> Tensor:
        """A picture that `open_image` opened, deep or not, as uint8 [1, C, H, W] in this polarity."""
        pixels = torch.from_numpy(pixels_of(image, self.channels, self.fitting, self.bits).copy())
        return (255 - pixels if self.invert else pixels).unsqueeze(0)

    def notes(self, readings: Sequence[Reading]) -> Iterator[str]:
        colour = [reading.file for reading in readings if reading.remarks.get("colour")]
        if colour:
            yield (
                f"{len(colour)} of the {len(readings)} images are in colour, such as {colour[0]}, but the run takes "
                "grey ones; they were made grey"
            )
        deep = {r.file: r.remarks["most"] for r in readings if r.remarks.get("most") is not None}
        beyond = [file for file, most in deep.items() if most >= 2**self.bits]
        if beyond:
            has = "1 picture has" if len(beyond) == 1 else f"{len(beyond)} pictures have"
            yield (
                f"{has} greys beyond the {2**self.bits - 1} of the training images, cut off there, such as {beyond[0]}"
            )
        needed = bits_for(max(deep.values(), default=0))
        if deep and self.bits == CONTAINER > needed:
            yield (
                f"{len(deep)} 16-bit files, such as {next(iter(deep))}, hold no more than {needed} bits; they were "
                "read by the whole range of 16, since the training images name no other"
            )


@functools.lru_cache(maxsize=64)
@in_usual_modes  # whoever asks first must not decide for all
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift [C, 1, 1]. Kept, since a step that a GPU replays may not copy anything to it."""
    scale = 1.0 / (255.0 * torch.tensor(std, device=device))
    shift = torch.tensor(mean, device=device) / torch.tensor(std, device=device)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)
