"""The bar that shows how far the prompt has been read: on a terminal only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click


class PrefillBar:
    """Call it with (tokens_done, total, density_so_far); it draws tokens done, tokens/s, time left and density on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._started = time.perf_counter()

    def if_shown(self) -> PrefillBar | None:
        """The bar itself, or None where nothing would be drawn: progress makes a GPU wait for the host after each chunk."""
        return self if self._shown else None

    def __enter__(self) -> PrefillBar:
        self._started = time.perf_counter()
        return self

    def __call__(self, tokens_done: int, total: int, density_so_far: float) -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = click.progressbar(
                length=total,
                label="Reading",
                file=sys.stderr,
                show_pos=True,
                show_percent=False,
                show_eta=False,  # click's own appears only after several updates; a prompt may have two chunks
                item_show_func=lambda item: item,
            )
            self._bar.__enter__()
        rate = tokens_done / max(time.perf_counter() - self._started, 1e-9)
        left = (total - tokens_done) / rate
        self._bar.update(tokens_done - self._bar.pos, f"{rate:,.0f} tokens/s, {left:.0f} s left, density {density_so_far:.2f}")
        if tokens_done >= total:
            self.close()

    def close(self) -> None:
        """End the bar's line. Safe to call more than once."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar, self._shown = None, False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class CountBar:
    """Call it with (done, total); it draws how many are done and the time left, on a terminal only."""

    def __init__(self, label: str, quiet: bool) -> None:
        self._label = label
        self._shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> CountBar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = click.progressbar(length=total, label=self._label, file=sys.stderr, show_pos=True, show_eta=True)
            self._bar.__enter__()
        self._bar.length = total
        self._bar.update(done - self._bar.pos)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
