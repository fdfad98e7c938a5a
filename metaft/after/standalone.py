"""Label pictures with the model that lies beside this file.

    python predict.py IMAGE|FOLDER...

It needs numpy, pillow and, for model.onnx, onnxruntime; for model.pt2 it is torch. For each picture comes a line: the
file, and the most probable classes with their probabilities (or the number that the model predicts), with tabs between.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metaft.inputs.depth import CONTAINER, scales_itself
from metaft.inputs.fitting import REFUSED, Fitting, pixels_of, plain, shallow, upright

AT_ONCE = 64


def picture_of(path: Path, inputs: dict[str, Any]) -> np.ndarray:
    """A file as the model takes it: uint8 [1, channels, height, width]. Raises OSError or ValueError."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=[name for name in Image.ID if name not in REFUSED]) as file:
            whole_range = scales_itself(file)
            file.load()
            image = plain(upright(file))
    if whole_range:
        image = shallow(image, CONTAINER)
    fitting = Fitting(inputs["height"], inputs["resize"], inputs["interpolation"])
    pixels = pixels_of(image, inputs["channels"], fitting, inputs["bits"])
    return np.ascontiguousarray(255 - pixels if inputs["invert"] else pixels)[None]


def _picture_or_why(path: Path, inputs: dict[str, Any]) -> np.ndarray | str:
    try:
        return picture_of(path, inputs)
    except Exception as error:  # a broken file makes a decoder raise anything
        return " ".join(str(error).split()) or type(error).__name__


def model_of(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """(pictures [n, ...] to outputs [n, classes], what the file says of itself)."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["metaft"])
        return lambda pictures: np.asarray(session.run(["logits"], {"pictures": pictures})[0]), about
    import torch

    extra = {"metaft": ""}
    module = torch.export.load(path, extra_files=extra).module()

    def run(pictures: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(pictures)).numpy()

    return run, json.loads(extra["metaft"])


def files_of(names: Sequence[str]) -> list[Path]:
    """Files as they are named, and of folders all pictures inside that are not hidden, by name; each once."""
    Image.init()
    endings = {end for end, name in Image.registered_extensions().items() if name not in REFUSED}
    files: list[Path] = []
    for path in map(Path, names):
        below = (file for file in path.rglob("*") if file.suffix.lower() in endings and not file.is_dir())
        shown = (file for file in below if not any(part[0] == "." for part in file.relative_to(path).parts))
        files += sorted(shown) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def lines_of(outputs: np.ndarray, class_names: Sequence[str], top: int) -> Iterator[str]:
    """What is said of each picture."""
    if not class_names:
        yield from (f"{number:.6g}" for number in outputs[:, 0].astype(np.float64))
        return
    chances = np.exp(outputs - outputs.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    for row in chances:
        yield "\t".join(f"{class_names[i]}\t{row[i]:.4f}" for i in np.argsort(-row, kind="stable")[:top])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 where a file cannot be read or an option is wrong."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="how many classes to name (default: 1)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="another file than the one beside this script")
    args = parser.parse_args(argv)
    path = args.model or next((here / name for name in ("model.onnx", "model.pt2") if (here / name).exists()), None)
    if path is None:
        parser.error(f"no model.onnx or model.pt2 beside it in {here}; name one with --model")
    try:
        run, about = model_of(path)
    except Exception as error:  # of onnxruntime or torch, which may not be installed
        parser.error(f"{path} cannot be opened ({' '.join(str(error).split())[:200]})")
    most = max(1, len(about["class_names"]))
    if not 1 <= args.top <= most:
        parser.error(f"--top must be 1 to {most}, got {args.top}")
    files, bad = files_of(args.images), 0
    for first in range(0, len(files), AT_ONCE):
        read: list[tuple[Path, np.ndarray]] = []
        for file in files[first : first + AT_ONCE]:
            pixels = _picture_or_why(file, about["inputs"])
            if isinstance(pixels, str):
                print(f"unreadable: {file} ({pixels})", file=sys.stderr)
                bad += 1
            else:
                read.append((file, pixels))
        if read:
            outputs = run(np.concatenate([pixels for _, pixels in read]))
            for (file, _), line in zip(read, lines_of(outputs, about["class_names"], args.top), strict=True):
                print(f"{file}\t{line}")
    if not files:
        print("no pictures there", file=sys.stderr)
    return 2 if bad or not files else 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except BrokenPipeError:  # who reads has enough
        sys.stdout = None
