"""A trial in the place of a command, without torch: `trial_stub.py COMMAND --config TOML --out FOLDER --auto-resume`.

Its work is STEPS steps, a line of `work` each, with which it goes on where it was stopped; then it leaves what an adapt
run leaves. It is right by a peak at lr 0.01. `epochs` says what befalls it: 2 it fails, 3 no figure, 4 killed once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from metaft.runs.lock import held
from metaft.trials.worker import watch

STEPS = 3


def main(argv: list[str]) -> int:
    watch()
    _, _, config, _, out, _ = argv
    lines = (line.partition(" = ") for line in Path(config).read_text().splitlines())
    settings, folder = {name: float(value) for name, _, value in lines if name in ("lr", "epochs")}, Path(out)
    folder.mkdir(exist_ok=True)
    with held(folder / ".metaft.lock", "out"):
        print(f"test accuracy 12.34 % of {folder.name}")
        if settings["epochs"] == 2:
            print("metaft: error: epochs: two are too few\nand more", file=sys.stderr)
            return 2
        work = folder / "work"
        done = len(work.read_text().splitlines()) if work.exists() else 0
        for step in range(done, STEPS):
            time.sleep(0.02)
            with open(work, "a") as file:
                file.write(f"{step}\n")
            if settings["epochs"] == 4 and step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        accuracy = round(1 - abs(settings["lr"] - 0.01), 2)
        rows = [
            {"draw": draw, "start": "x", "epoch": epoch, "loss": 1.0, "val_loss": epoch, "val_accuracy": accuracy - bad}
            for draw in (0, 1)
            for epoch, bad in ((1.0, draw / 10), (2.0, 0.5))
            if settings["epochs"] != 3
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "timing.jsonl").write_text('{"fit": 0, "seconds": 1.5}\n')
        mean = {"accuracy": 0.25 + settings["lr"], "ci95": 0.125, "draws": 2}
        (folder / "result.json").write_text(json.dumps({"command": "adapt", "starts": [{"mean": mean}]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
