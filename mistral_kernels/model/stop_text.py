"""Stop strings: where text that arrives in pieces ends.

A text ends at the first character that completes a stop string, however it is cut into pieces; of
several stop strings that this character completes, the one that starts first counts. What is given
out lies before that start:

>>> text = StopText(["\\n\\n", "END"])
>>> [text.push(piece) for piece in ("to the E", "AST\\n", "of E", "N", "Ding")], text.stopped
(['to the ', 'EAST', '\\nof ', '', ''], True)
"""

from __future__ import annotations

from collections.abc import Sequence


def stop_strings(stop: str | Sequence[str] | None, name: str) -> tuple[str, ...]:
    """The stop strings that an argument holds: one, a list of them, or None for none.

    Args:
        stop: the argument.
        name: what an error calls it.

    Raises:
        TypeError: it holds something else than strings.
        ValueError: a string is empty, which every text would contain.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(each, str) for each in stops):
        raise TypeError(f"{name} must be a string or a list of strings, got {stop!r}")
    if "" in stops:
        raise ValueError(f"{name} must not hold an empty string, got {stop!r}")
    return tuple(stops)


class StopText:
    """Passes text on up to the first stop string, and holds back what may be the start of one.

    Work a piece grows with the piece and the stop strings, not with the text so far.

    Args:
        stops: a stop string or a list of them; None or none at all: text passes as it comes.

    Attributes:
        stopped: whether a stop string is complete; from then on nothing is given out.

    Raises:
        TypeError, ValueError: see `stop_strings`.
    """

    def __init__(self, stops: str | Sequence[str] | None):
        self._stops = stop_strings(stops, "StopText: stops")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return what now certainly lies before a stop string, which may be nothing."""
        if self.stopped:
            return ""
        # A stop string that is complete now starts in what was held back, or after it.
        text = self._held + text
        found = [(text.find(stop) + len(stop), len(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            end = min(found)[0]
            return text[: end - max(length for at, length in found if at == end)]
        held_from = min((_beginning(stop, text) for stop in self._stops), default=len(text))
        self._held = text[held_from:]
        return text[:held_from]

    def finish(self) -> str:
        """Return what is held back: the text has ended, so it begins no stop string."""
        text, self._held = self._held, ""
        return text


def _beginning(stop: str, text: str) -> int:
    """Where the longest end of `text` that begins `stop` starts; len(text) where none does."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return start if start >= 0 else len(text)
