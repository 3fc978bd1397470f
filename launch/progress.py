"""Progress bars: rate and ETA on a terminal, a line now and then elsewhere."""

import sys
from contextlib import AbstractContextManager

from tqdm import tqdm

from data.progress import Progress, ProgressBar

QUIET_INTERVAL_SEC = 20.0


def make_progress(name: str = "", row: int = 0, enabled: bool = True) -> ProgressBar:
    """Bars for one job; ``row`` is its line on the terminal where several jobs run at once."""
    on_terminal = sys.stderr.isatty()

    def bar(label: str, done: int, total: int, unit: str) -> AbstractContextManager[Progress]:
        return tqdm(
            desc=f"{name} {label}".strip(),
            initial=done,
            total=total,
            unit=unit,
            position=row if on_terminal else 0,
            leave=row == 0 or not on_terminal,
            disable=not enabled,
            dynamic_ncols=on_terminal,
            mininterval=0.1 if on_terminal else QUIET_INTERVAL_SEC,
        )

    return bar
