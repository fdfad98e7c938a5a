"""The pictures of a run folder. Each function draws one figure from plain data and writes it to `path`.

Drawn through matplotlib's objects, never through pyplot, so no window system, backend or global figure is involved and
any thread may draw. Import this package where a picture is made, not at the top: matplotlib takes a while to load.
"""

from __future__ import annotations

from metaft.support.drawing import quiet

with quiet():
    from metaft.plots.confusion import confusion
    from metaft.plots.grid import episode, mistakes
    from metaft.plots.lines import curves, learning, steps
    from metaft.plots.range_test import range_test
    from metaft.plots.regression import regression_episode
    from metaft.plots.reliability import calibration
    from metaft.plots.robust import robust
    from metaft.plots.scatter import scatter

__all__ = [
    "calibration", "confusion", "curves", "episode", "learning", "mistakes", "range_test", "regression_episode",
    "robust", "scatter", "steps",
]  # fmt: skip
