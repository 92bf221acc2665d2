"""Results of a campaign on disk, a line per finished case so that a campaign goes on where it stopped; the counts."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.case import FAULTS, Case, Verdict

WHOLE = {"kills": 1000, "flips": 1000, "inputs": 5000}  # least counts of a whole campaign


def append(path: Path, case: Case, verdict: Verdict) -> None:
    """Add a finished case; a line that a kill cut short is ignored by `read`."""
    row = {"case": case.name, "at": time.time(), **{name: value for name, value in vars(verdict).items() if value}}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Case name -> its newest result, of every result file in the folder."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("results-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["at"] >= rows.get(row["case"], row)["at"]:
                rows[row["case"]] = row
    return rows


def waiting(cases: Iterable[Case], results: dict[str, dict[str, Any]]) -> list[Case]:
    """Cases without a result, and those that ended in a fault: it may be mended by now."""
    return [case for case in cases if case.name not in results or results[case.name].get("fault")]


def summary(cases: list[Case], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts of the campaign: per group, per kind, and of every fault."""
    rows = [(case, results[case.name]) for case in cases if case.name in results]
    groups = {group: counts([row for case, row in rows if case.group == group]) for group in WHOLE}
    kinds = {
        kind: counts([row for case, row in rows if case.kind == kind]) for kind in dict.fromkeys(c.kind for c in cases)
    }
    return {
        "whole": all(groups[group]["cases"] >= count for group, count in WHOLE.items()),
        "groups": groups,
        "kinds": kinds,
        "faults": {fault: sum(group["faults"].get(fault, 0) for group in groups.values()) for fault in FAULTS},
        "peak_megabytes": round(max((row.get("peak", 0) for _, row in rows), default=0) / 1e6),
        "longest_seconds": round(max((row.get("seconds", 0) for _, row in rows), default=0), 1),
    }


def counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """cases: files tried, kills and flips done; outcomes and faults by name. Kills that did not happen do not count."""
    rows = [row for row in rows if row["kind"] != "not reached"]
    outcomes, faults = Counter[str](), Counter[str]()
    for row in rows:
        outcomes[row["kind"]] += row.get("inputs", 1)
        if row.get("fault"):
            faults[row["fault"]] += 1
    return {"cases": sum(outcomes.values()), "outcomes": dict(sorted(outcomes.items())), "faults": dict(faults)}


def faults(cases: list[Case], results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line per case that ended in a fault."""
    for case in cases:
        row = results.get(case.name, {})
        if row.get("fault"):
            yield f"{case.name}: {row['fault']}: {row.get('text', '')}"
