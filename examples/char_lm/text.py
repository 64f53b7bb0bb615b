"""Text as numbers: an alphabet, and a training part and a held-out part, each cut into parallel streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusedrnn.bench import data

Codes = NDArray[np.int64]

_HELD_OUT = 0.05


@dataclass(frozen=True)
class Corpus:
    """A text in two parts. The last twentieth is held out."""

    name: str
    alphabet: str
    """Every character of the text once, sorted; the code of a character is its index."""
    train: Codes
    held_out: Codes

    @classmethod
    def of(cls, text: str, name: str) -> Corpus:
        """The corpus of a text."""
        alphabet, codes = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        cut = len(codes) - int(_HELD_OUT * len(codes))
        codes = codes.astype(np.int64)
        return cls(name, "".join(map(chr, alphabet)), codes[:cut], codes[cut:])

    def decode(self, codes: Codes) -> str:
        """The characters of these codes."""
        return "".join(self.alphabet[code] for code in codes)

    def check(self, batch: int, length: int) -> None:
        """Check that the text is long enough.

        Raises:
            ValueError: If it is too short; the message has the length of the text and the length that is needed.
        """
        needed = batch * (length + 1)
        if len(self.train) < needed or len(self.held_out) < 2:
            raise ValueError(
                f"{self.name} is too short: {len(self.train)} characters to learn from and {len(self.held_out)} held "
                f"out; --batch {batch} streams of --length {length} need {needed} and 2"
            )


def load(path: Path | None) -> Corpus:
    """The user's text in UTF-8, or by default the English help topics that ship with Python.

    Raises:
        ValueError: If the file is not text, or this Python has no help topics.
    """
    if path is None:
        try:
            return Corpus.of(data.text(), "Python's help")
        except RuntimeError:
            raise ValueError("this Python was installed without pydoc_data; give your own with --text") from None
    try:
        return Corpus.of(path.read_text(encoding="utf-8-sig"), path.name)
    except OSError as error:
        raise ValueError(f"--text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8: {error.reason} at byte {error.start}") from None


def streams(codes: Codes, batch: int) -> Codes:
    """``batch`` equal parts of the text, as columns: (len(codes) // batch, batch). A remainder is dropped."""
    rows = len(codes) // batch
    return np.ascontiguousarray(codes[: rows * batch].reshape(batch, rows).T)


def windows(columns: Codes, length: int) -> Iterator[tuple[Codes, Codes]]:
    """Consecutive windows of the streams: characters, and the characters that follow them, each (T, N).

    T is ``length``; the last window may be shorter.
    """
    last = len(columns) - 1
    for begin in range(0, last, length):
        end = min(begin + length, last)
        yield columns[begin:end], columns[begin + 1 : end + 1]
