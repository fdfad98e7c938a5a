"""Head, all, head then all, and weights between these, on test images under noise and blur.

    python benchmarks/shifted.py --data folder:PATH --draws 10 -- --image-size 96

Kumar et al. 2022 (https://arxiv.org/abs/2202.10054) claim that training the head before the rest loses less than
training all from the first step where test images are not as the training images are; Wortsman et al. 2022
(https://arxiv.org/abs/2109.01903, eq. 1, WiSE-FT) that weights between the start's, with a head trained on it, and the
fine-tuned ones lose less yet. Each draw is a run of `metaft.adapt` of its own for each strategy, in `--runs`, which
goes on where it was stopped; its classifiers then see the draw's test images as they are and changed. Rows name the
share of the way from the run of `head` to that of `lp-ft`. Further words go to every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import metaft

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.adapted import apart, finished
from benchmarks.members import interval
from metaft import targets
from metaft.finetune.classifier import Classifier
from metaft.metrics import mean_t95
from metaft.support.tables import markdown
from metaft.support.vision import transforms

STRATEGIES = {"head": "head", "full": "full", "lp-ft": "lp-ft:rise=0.2"}
SHARES = (0.25, 0.5, 0.75)

SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "as they are": lambda raw, _: raw,
    "noise 0.1": lambda raw, generator: noisy(raw, 0.1, generator),
    "noise 0.2": lambda raw, generator: noisy(raw, 0.2, generator),
    "blur 1": lambda raw, _: blurred(raw, 1.0),
    "blur 2": lambda raw, _: blurred(raw, 2.0),
}
"""Of uint8 pictures [n, C, H, W]: the standard deviation of Gaussian noise, of pixel values 0..1, or of a Gaussian blur
in pixels of the picture as the model takes it."""


def noisy(raw: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(raw.shape, generator=generator) * deviation * 255
    return (raw + noise).round().clamp(0, 255).to(torch.uint8)


def blurred(raw: Tensor, deviation: float) -> Tensor:
    size = 2 * round(3 * deviation) + 1
    return transforms.functional.gaussian_blur(raw, [size, size], [deviation, deviation])


def main() -> int:
    own, rest = apart(sys.argv[1:])
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--shots", type=int, default=20, help="images per class")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--init", default="efficientnet-lite0")
    parser.add_argument("--runs", type=Path, default=Path("runs/shifted"))
    args = parser.parse_args(own)
    draws = [of_draw(seed, args, rest) for seed in range(args.draws)]
    print(markdown(table(draws)))
    return 0


def of_draw(seed: int, args: argparse.Namespace, rest: Sequence[str]) -> dict[str, dict[str, float]]:
    """Row -> shift -> accuracy. Computed once, and kept beside the runs."""
    file = args.runs / f"{seed}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    at = {name: metaft.load(run(name, seed, args, rest)) for name in STRATEGIES}
    target = targets.load(args.data, at["head"].inputs)
    rows = torch.from_numpy(target.rows(shots_per_class=args.shots, seed=seed, validate=False).test)
    raw, labels = target.examples[rows], target.labels[rows]
    models = [*at.items(), *((f"{share:g} of the way", between(at["head"], at["lp-ft"], share)) for share in SHARES)]
    found: dict[str, dict[str, float]] = {name: {} for name, _ in models}
    for shift, change in SHIFTS.items():
        changed = change(raw, torch.Generator().manual_seed(seed))
        for name, model in models:
            found[name][shift] = float((model.logits(changed).argmax(-1) == labels).double().mean())
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def run(name: str, seed: int, args: argparse.Namespace, rest: Sequence[str]) -> Path:
    """The folder of a finished run. Raises SystemExit where it fails."""
    argv = ["--init", args.init, "--data", args.data, "--shots-per-class", str(args.shots), "--seed", str(seed)]
    argv += ["--strategy", STRATEGIES[name], *rest, "--no-random", "--no-report"]
    return finished(args.runs / f"{name}-{seed}", argv)


def between(start: Classifier, tuned: Classifier, share: float) -> Classifier:
    """(1 - share) start + share tuned, in every number; both have one architecture."""
    ends = tuned.state_dict()
    mixed = {
        name: torch.lerp(value, ends[name], share) if value.is_floating_point() else value
        for name, value in start.state_dict().items()
    }
    classifier = copy.deepcopy(start)
    classifier.load_state_dict(mixed)
    return classifier


def table(draws: Sequence[dict[str, dict[str, float]]]) -> list[list[str]]:
    """Mean accuracies, and in a second block what each is above `full`, paired over the draws."""
    lines = [["", *SHIFTS]]
    for name in draws[0]:
        of_row = ([draw[name][shift] for draw in draws] for shift in SHIFTS)
        lines.append([name, *(interval(*mean_t95(each)) for each in of_row)])
    for name in draws[0]:
        if name != "full":
            pairs = ([draw[name][shift] - draw["full"][shift] for draw in draws] for shift in SHIFTS)
            lines.append([f"{name}, above `full`", *(interval(*mean_t95(each), "+") for each in pairs)])
    return lines


if __name__ == "__main__":
    sys.exit(main())
