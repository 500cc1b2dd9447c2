"""A live line with task, phase, step, loss and time left: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable

from tqdm import tqdm

from clbench.patience import patience
from clbench.terminal import printable, tell


class Progress:
    """Progress of one phase, from step `start` on. `mode`: auto | bar | lines | quiet."""

    SECONDS = 10.0  # between lines

    def __init__(self, title: str, steps: int, mode: str = "auto", start: int = 0) -> None:
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self.title, self.steps, self.mode = title, steps, mode
        self.start = self.last = time.monotonic()
        self.first = self.done = start
        self._bar = None
        if mode == "bar":
            self._bar = tqdm(total=steps, initial=start, desc=printable(title), unit="step", leave=False)

    def update(self, step: int, loss: float | None) -> None:
        """Report that `step` steps are done."""
        text = "" if loss is None else f"loss {loss:.4f}"
        if self._bar is not None:
            self._bar.update(step - self.done)
            self._bar.set_postfix_str(text, refresh=False)
        self.done = step
        now = time.monotonic()
        if self.mode == "lines" and now - self.last >= self.SECONDS:
            self.last = now
            left = (now - self.start) / max(step - self.first, 1) * (self.steps - step)
            tell(
                f"{self.title}: step {step}/{self.steps} {text} ({left:.0f} s left)",
            )

    def each[T](self, items: Iterable[T], start: int) -> Generator[tuple[int, T]]:
        """Number `items` from `start` on, like enumerate; reports when one, or the work on it, takes long."""
        if self.mode == "quiet":
            yield from enumerate(items, start)
            return
        bar, numbered = self._bar, enumerate(items, start)
        with patience(self.title, say=tell if bar is None else lambda _: bar.refresh()) as patient:
            while True:
                patient.now(f"{self.title}: reading data")
                try:
                    step, item = next(numbered)
                except StopIteration:
                    return
                patient.now(f"{self.title}: step {step + 1}")
                yield step, item

    def close(self, loss: float | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.mode != "quiet":
            seconds = time.monotonic() - self.start
            text = "" if loss is None else f", loss {loss:.4f}"
            tell(f"{self.title}: {self.done - self.first} steps in {seconds:.1f} s{text}")
