"""Docstrings as Markdown for the API pages: Sphinx roles become code, doctests become code blocks."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":\w+:`~?([^`]+)`")
DOCTEST = re.compile(r"(?:^Example:\n)?((?:^ *(?:>>>|\.\.\.).*\n?(?:^ *(?!>>>|\.\.\.)\S.*\n?)*)+)", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites each docstring after it has been read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(lambda found: f"\n```pycon\n{dedent(found[1]).rstrip()}\n```\n", text)
