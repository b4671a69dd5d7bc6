"""Progress of a run on standard error: a bar on a terminal, elsewhere lines at intervals."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from zo2ext._format import seconds_text

EVERY = 30.0  # least number of seconds between lines


class Progress:
    """Shows the progress of a run.

    Args:
        total: Number of steps of the run.
        done: Number of steps done before.
        silent: Whether to show nothing, as on all ranks but one.
    """

    def __init__(self, total: int, *, done: int = 0, silent: bool = False) -> None:
        self._total, self._first, self._done, self._silent = total, done, done, silent
        self._start = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and not silent:
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def update(self, status: str, done: int) -> None:
        """Show `done`, the number of steps of the run that are done, and a status such as rates."""
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._bar is None and not self._silent and (now - self._shown >= EVERY):
            self._shown = now
            left = (now - self._start) / (done - self._first) * (self._total - done)
            line = f"step {done} of {self._total}: {status}, {seconds_text(left)} left"
            print(line, file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print `line` on standard output, above the bar."""
        if not self._silent:
            tqdm.write(line)
            sys.stdout.flush()

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
