"""What MkDocs does beyond its configuration: pages from the root, links to sources, the source tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
TREE = "<!-- source tree -->"
# What must not be separated in a cell of a table: a number and its unit, a workload and its cell.
UNITS = re.compile(r"(?<=\d) (?=(?:s|ms|µs|%|GFLOP/s|GB/s)\b|%)|(?<=[a-z0-9]) (?=(?:LSTM|GRU|ReLU|tanh) \|)")
# Links to files that the site does not hold.
OUTSIDE = re.compile(r"\[`?([^\]`]+)`?\]\((?:\.\./)*(?:(?:src|tests|examples|docs|benchmarks/data)[^):]*|LICENSE)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are files of the repository's root."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](").replace('"docs/', '"')))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site, drop those to sources, and fill in the source tree."""
    up = "../" * page.file.src_uri.count("/")
    for target, source in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[^)]*)?\)", rf"]({up}{target}\1)", markdown)
    markdown = OUTSIDE.sub(r"`\1`", markdown)
    markdown = re.sub(r"^\|.*$", lambda line: UNITS.sub("\N{NO-BREAK SPACE}", line[0]), markdown, flags=re.MULTILINE)
    return markdown.replace(TREE, source_tree())


def source_tree() -> str:
    """One line for each folder and file of the package: its docstring's first line, as tables by folder."""
    package = ROOT / "src" / "fusedrnn"
    parts = []
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        name = f"{folder.relative_to(package.parent).as_posix()}/"
        lines = [f"\n## `{name}`\n\n{summary(folder / '__init__.py')}\n"]
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        if files:
            lines += ["| file | what it holds |", "|---|---|"]
            lines += [f"| `{path.name}` | {summary(path)} |" for path in files]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def summary(path: Path) -> str:
    """The first line of a module's docstring, with roles and double backticks as Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = text.partition("\n")[0].replace("``", "`").replace("|", r"\|")
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line)
