"""The package as the API pages show it: docstrings are Markdown, cached properties are attributes.

Of the docstrings, Sphinx roles become code and doctests become code blocks.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Attribute, Extension, Function, Object

ROLE = re.compile(r":\w+:`~?([^`]+)`")
DOCTEST = re.compile(r"(?:^Example:\n)?((?:^ *(?:>>>|\.\.\.).*\n?(?:^ *(?!>>>|\.\.\.)\S.*\n?)*)+)", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites each docstring after it has been read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(lambda found: f"\n```pycon\n{dedent(found[1]).rstrip()}\n```\n", text)

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        """Replace a property that is cached by the package's own decorator; griffe knows that of functools."""
        if func.parent and any(one.callable_path == "fusedrnn.lazy.cached_property" for one in func.decorators):
            attribute = Attribute(
                func.name, lineno=func.lineno, endlineno=func.endlineno, annotation=func.returns,
                docstring=func.docstring, parent=func.parent,
            )  # fmt: skip
            attribute.labels |= {"cached", "property"}
            func.parent.set_member(func.name, attribute)
