"""Where the results come from: commit, date, device, time per stage, parameters that differ from the base."""

from typing import Any

from semdict.journal import FILE, latest, read_journal
from semdict.report import charts
from semdict.report.parts import Fold, Section, Table, cells, duration
from semdict.report.results import Results

BASE = "presets/base.yaml"


def provenance(results: Results) -> Section:
    """The journal of the stages, and the parameters that are not the defaults."""
    part = Section("provenance", "Provenance")
    entries = latest(read_journal(results.reports / FILE))
    if entries:
        devices = dict.fromkeys(entry.get("device", "") for entry in entries)
        commits = dict.fromkeys(commit_text(entry) for entry in entries)
        versions = dict.fromkeys(entry.get("semdict", "") for entry in entries)
        rows = [
            cells("commit", ", ".join(filter(None, commits)) or "no repository"),
            cells("semdict", ", ".join(versions)),
            cells("date", date_text([entry["started"] for entry in entries])),
            cells("device", "; ".join(filter(None, devices))),
            cells("time of all stages", duration(sum(entry["seconds"] for entry in entries))),
        ]
        part.tables.append(Table(["", ""], rows))
        part.chart(charts.times({short(entry["command"], results): entry["seconds"] for entry in entries}))
    changed = changed_parameters(results)
    if changed:
        table = Table(["parameter", "here", "base"], [cells(*row) for row in changed])
        part.folds.append(Fold(f"{len(changed)} parameters differ from {BASE}", table=table))
        if not entries:
            part.tables.append(Table(["", ""], [cells("parameters that differ from the base", str(len(changed)))]))
    return part


def commit_text(entry: dict[str, Any]) -> str:
    """The commit, and whether files were changed since."""
    return entry.get("commit", "") + (" with changes" if entry.get("changed") else "")


def date_text(starts: list[str]) -> str:
    """From the first to the last start, UTC, to the minute."""
    first, last = (time.replace("T", " ")[:16] for time in (min(starts), max(starts)))
    return f"{first} UTC" if first == last else f"{first} to {last if first[:10] != last[:10] else last[11:]} UTC"


def short(command: str, results: Results) -> str:
    """A command without its name and the folders of the preset."""
    for text in ("semdict ", f"{results.runs.as_posix()}/", f"runs/{results.preset}/", "--objective ", "--model "):
        command = command.replace(text, "")
    return command if len(command) <= 48 else command[:47] + "…"


def changed_parameters(results: Results) -> list[tuple[str, str, str]]:
    """(key, value, default) of every parameter of params.yaml that is not the default; [] for other presets."""
    from semdict.pipeline.config.yaml import read_yaml

    params, base = results.root / "params.yaml", results.root / BASE
    if not (params.exists() and base.exists()):
        return []
    own, defaults = flat(read_yaml(params)), flat(read_yaml(base))
    if own.get("preset") != results.preset:
        return []
    changed = {
        key for key in own if own[key] != defaults.get(key) and key != "preset" and not key.startswith("inputs.")
    }
    return [(key, text(own[key]), text(defaults.get(key))) for key in own if key in changed]


def flat(tree: Any, above: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested mappings."""
    if not isinstance(tree, dict) or not tree:
        return {above: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{above}.{key}" if above else str(key))
    return leaves


def text(value: Any) -> str:
    """A value as YAML writes it, near enough to read."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
