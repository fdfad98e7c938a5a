"""Pages of `metaft.look` in a real browser, at the width of a phone and of a desk; skipped where there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from helpers import finished, meta_trained, one_thread, words, write_folder, write_target

from metaft import look
from metaft.config import LookConfig

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="needs Chromium"), pytest.mark.slow]

MEASURE = (Path(__file__).parent / "fixtures/measure.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    base = tmp_path_factory.mktemp("browser")
    classes = ("<b>bold", "a long name of a class that goes on and on", "😀 שלום", *"abcdefgh")
    with one_thread():
        run = meta_trained(base / "run", write_folder(base / "squares"))
        target = write_target(base / "target", {"train": 5, "test": 4}, classes=classes, noise=250)
        fine = finished(words(run, target, base / "fine", epochs=2))
        yield {
            of: look.run(word, LookConfig(out=str(base / f"{of}.html")))
            for of, word in {"run": run, "fine": fine, "start": "none"}.items()
        }


def browsed(page: Path, width: int, folder: Path, *words: str) -> tuple[str, str]:
    """(the page's elements after it ran, what the browser said)."""
    assert BROWSER is not None
    line = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, 600)},900", *words, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("of", ["run", "fine", "start"])
def test_nothing_overlaps_is_empty_or_wider_than_the_screen(
    of: str, width: int, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = Path(shutil.copy(pages[of], tmp_path / "page.html"))
    around = tmp_path / "around.html"
    frame = f'<iframe src="{page.name}" style="border:0;width:{width}px;height:900px"></iframe>'
    around.write_text(f"<!DOCTYPE html><body>{frame}<script>{MEASURE}</script>", encoding="utf-8")
    html, said = browsed(around, width, tmp_path, "--virtual-time-budget=20000", "--dump-dom")
    (text,) = re.findall(r'<pre id="report">(.*?)</pre>', html, re.DOTALL)
    report: dict[str, Any] = json.loads(unescape(text))
    assert report["inner"] == width and report["wide"] <= width
    assert report["overlaps"] == []
    assert report["drawn"] == []
    assert report["small"] == 0
    assert all(report["sorted"]) and (report["sorted"] or of == "start")
    assert all(complete and natural and shown >= 30 for complete, natural, shown in report["images"])
    assert bool(report["images"]) == (of != "start")
    assert "CONSOLE" not in said


def test_a_screen_shot_and_a_print_can_be_made(pages: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    shot, printed = tmp_path / "shot.png", tmp_path / "page.pdf"
    browsed(pages["fine"], 1400, tmp_path, f"--screenshot={shot}")
    assert len(Image.open(shot).convert("RGB").getcolors(1 << 20) or ()) > 50, "charts have colours"
    browsed(pages["fine"], 1400, tmp_path, f"--print-to-pdf={printed}")
    assert printed.read_bytes().startswith(b"%PDF") and printed.stat().st_size > 20_000
