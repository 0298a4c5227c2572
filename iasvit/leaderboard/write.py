"""Writes the leaderboard's files; the same bytes from the same input."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from iasvit.benchmark.results import Row, read_rows, warn
from iasvit.errors import IasvitError
from iasvit.leaderboard.aggregate import measured_documents
from iasvit.leaderboard.markdown import MADE, Document, escape
from iasvit.leaderboard.page import page
from iasvit.leaderboard.published import published_documents, read_published
from iasvit.leaderboard.views import page_values, plots

# What a reader of the CSV files cannot guess.
_COLUMNS = (
    "In the CSV files, `gap_` columns are value - full precision, and `gap_published_` columns are value - published. "
    "`other_version` names the version of method or task that measured a value, if it is not the present one."
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_leaderboard(
    runs: Path, published: Path, out: Path, readme: Path | None = None, report: Callable[[str], None] = warn
) -> list[Path]:
    """Write <task>-<dataset>-<bits>.md and .csv for all that is measured or published, plots, and index.html.

    Args:
        runs: folder of result files, read with all folders in it; of rows with equal keys the latest counts.
        published: CSV file of published values, columns PUBLISHED_COLUMNS.
        out: folder for tables and plots. Tables and plots of earlier calls that have no rows any more are removed; any
            other SVG file in its folder plots is shown with the leaderboard's own.
        readme: file whose text between `<!-- table:NAME -->` and `<!-- /table -->` is replaced by the short form of
            that table, with a link to the whole one; None for no such file.
        report: called with a sentence about each line or marker that cannot be used.

    Returns:
        The files written.

    Raises:
        IasvitError: a file cannot be read or written, or the published values have a wrong or repeated line.
    """
    rows: list[Row] = []
    for path in sorted(runs.rglob("*.csv")):
        found, problems = read_rows(path)
        rows += found
        for problem in problems:
            report(problem)
    values = read_published(published)
    documents = [*measured_documents(rows, values), *published_documents(values)]
    own = {f"plots/{name}": _marked(svg) for name, svg in plots(documents).items()}
    try:
        others = [f"plots/{path.name}" for path in sorted((out / "plots").glob("*.svg")) if not _is_own(path)]
    except OSError as error:
        raise IasvitError(f"{error.filename or out} cannot be read: {error.strerror or error}") from error
    shown = list(dict.fromkeys([*own, *others]))
    texts = {"leaderboard.md": _index(documents, shown), "index.html": page(page_values(documents)), **own}
    for document in documents:
        texts[f"{document.name}.md"] = document.markdown()
        texts[f"{document.name}.csv"] = _csv(document.frame)
    replaced = None if readme is None else _fill(readme, out, documents, report)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.glob("*.md"):
            if path.name not in texts and _is_own(path):
                path.unlink()
                path.with_suffix(".csv").unlink(missing_ok=True)
        for path in (out / "plots").glob("*.svg"):
            if f"plots/{path.name}" not in texts and _is_own(path):
                path.unlink()
        for name, text in texts.items():
            (out / name).parent.mkdir(exist_ok=True)
            _replace(out / name, text)
        if readme is not None and replaced is not None:
            _replace(readme, replaced)
    except OSError as error:
        raise IasvitError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
    return [out / name for name in texts] + ([readme] if readme is not None and replaced is not None else [])


def _marked(svg: str) -> str:
    """The SVG with MADE behind its first line, the XML declaration."""
    first, _, rest = svg.partition("\n")
    return f"{first}\n{MADE}\n{rest}"


def _is_own(path: Path) -> bool:
    """Whether an earlier call made the file, which is what a marker in its first lines says."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return MADE in file.read(200)


def _csv(frame: pd.DataFrame) -> str:
    """The table as CSV; a text that a spreadsheet would take for a formula gets a leading "'"."""

    def safe(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

    return frame.map(safe).to_csv(index=False, lineterminator="\n")


def _index(documents: Iterable[Document], images: Iterable[str]) -> str:
    lines = [f"- [{escape(document.title)}]({document.name}.md) ([CSV]({document.name}.csv))" for document in documents]
    shown = [f"![{escape(Path(name).stem)}]({quote(name)})" for name in images]
    tables = "\n".join(lines)
    link = "[All tables on one page](index.html): open it in a browser"
    return "\n\n".join([MADE, "# Leaderboard", link, tables, _COLUMNS, *shown]) + "\n"


def _fill(readme: Path, out: Path, documents: Sequence[Document], report: Callable[[str], None]) -> str | None:
    """README's text with its tables replaced; None if it has no marker or nothing changes."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise IasvitError(f"{readme} cannot be read: {error.strerror or error}") from error
    by_name = {document.name: document for document in documents}

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in by_name:
            report(f"{readme} has a marker for table {name!r}, which has no rows; left as it is")
            return match[0]
        table = by_name[name].brief.replace("<!--", "&lt;!--")  # in the name of a method, say
        link = quote(Path(os.path.relpath(out / f"{name}.md", readme.parent)).as_posix())
        return f"<!-- table:{name} -->\n{table} [Seeds, settings, costs, commands]({link})\n<!-- /table -->"

    starts, ends = text.count("<!-- table:"), text.count("<!-- /table -->")
    if starts != ends:
        raise IasvitError(f"{readme} has {starts} table markers, but {ends} <!-- /table --> markers; give each its end")
    pattern = r"<!-- table:(?P<name>[\w-]+) -->(?:(?!<!-- table:).)*?<!-- /table -->"
    new = re.sub(pattern, replace, text, flags=re.DOTALL)
    return new if new != text else None


def _replace(path: Path, text: str) -> None:
    """Write a temporary file and rename it; one that holds this text already stays untouched."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
