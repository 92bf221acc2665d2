"""What a section of the page is made of: tables of cells, charts, pictures; and how numbers are written."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """Text; `sort` orders its column (None: by the text), `best` marks the best value of the column."""

    text: str
    sort: float | None = None
    best: bool = False


@dataclass
class Table:
    """Rows of cells; the first column names the rows. `sortable`: a click on a heading sorts."""

    head: list[str]
    rows: list[list[Cell]]
    title: str = ""
    sortable: bool = False


@dataclass
class Chart:
    """A Plotly figure (`data` and `layout`) under a title; `wide` takes the full width of the page."""

    title: str
    figure: dict[str, Any]
    note: str = ""
    wide: bool = False

    @property
    def json(self) -> str:
        """The figure for a script element: no `<`, which could end the element."""
        return json.dumps(self.figure, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")


@dataclass
class Picture:
    """A data URI with its caption; kind is picture (half the width), whole (full width) or word (a gallery's tile)."""

    uri: str
    caption: str
    kind: str = "picture"


@dataclass
class Tile:
    """One figure of the head line: a value, what it is, and a remark."""

    label: str
    value: str
    remark: str = ""


@dataclass
class Fold:
    """Content that unfolds on a click: text, a table or pictures."""

    summary: str
    text: str = ""
    table: Table | None = None
    pictures: list[Picture] = field(default_factory=list)


@dataclass
class Section:
    """A heading and its content, in the order of the fields."""

    anchor: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    words: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    dumps: list[Fold] = field(default_factory=list)  # whole result files

    def __bool__(self) -> bool:
        return bool(self.tables or self.charts or self.pictures or self.folds)

    def chart(self, chart: Chart | None) -> None:
        """Add a chart if there is one."""
        if chart is not None:
            self.charts.append(chart)

    def picture(self, picture: Picture | None) -> None:
        """Add a picture if there is one."""
        if picture is not None:
            self.pictures.append(picture)

    def dump(self, name: str | Path, content: dict[str, Any] | None) -> None:
        """Add a whole result file, folded, if it exists."""
        if content is not None:
            self.dumps.append(Fold(str(name), json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)))


def scalars(table: dict[str, Any]) -> dict[str, Any]:
    """The entries that are one number or text."""
    return {key: value for key, value in table.items() if isinstance(value, str | int | float)}


def number(value: Any) -> str:
    """A number with separators and four digits, text as it is, a dash for None."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def cells(*texts: str) -> list[Cell]:
    """A row of plain text."""
    return [Cell(text) for text in texts]


def two_columns(title: str, values: dict[str, Any]) -> Table:
    """A table of names and values."""
    return Table(["", ""], [cells(key.replace("_", " "), number(value)) for key, value in values.items()], title)


def markdown_tables(text: str) -> list[Table]:
    """The tables of a Markdown text, each titled by the heading before it."""
    tables: list[Table] = []
    title, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            title = line.lstrip("# ")
        if line.startswith("|"):
            rows.append(cells(*(cell.strip() for cell in line.strip("|").split("|"))))
        elif rows:
            tables.append(Table([cell.text for cell in rows[0]], rows[2:], title))
            rows = []
    return tables
