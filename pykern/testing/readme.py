"""Fills in the README's tables, from the catalogue and the committed results: `python -m pykern.testing.readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pykern.testing.commands import backend_table, forward_ops

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def speed_table(path: Path) -> str:
    """One line an op, dtype, mode and sample: the backend that torch is compared with, as ratios."""
    result = json.loads(path.read_text())
    lines = ["| op | sample | dtype | | × torch (95 %) | × floor | host µs (torch) |", "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in result["records"]:
        key = (record["op"], record["sample"], record["dtype"], record["mode"])
        groups.setdefault(key, {})[record["contestant"]] = record
    for (op, sample, dtype, mode), group in groups.items():
        ours = next(group[name] for name in forward_ops()[op].backends if name in group)
        speed = f"{ours['speedup']:.2f} ({ours['low']:.2f}–{ours['high']:.2f})"
        host = f"{ours['host_seconds'] * 1e6:.0f} ({group['torch']['host_seconds'] * 1e6:.0f})"
        lines.append(f"| `{op}` | {sample} | {dtype} | {mode} | {speed} | {ours['over_floor']:.2f} | {host} |")
    return "\n".join([*lines, "", about(result)])


def training_table(path: Path) -> str:
    result = json.loads(path.read_text())
    lines = ["| text | | validation loss | seconds |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['text']} | {row['trainer']} | {row['val_loss']:.4f} | {row['seconds']:.0f} |")
    return "\n".join([*lines, "", about(result)])


def demo_table(path: Path) -> str:
    result = json.loads(path.read_text())
    return "\n".join(
        [
            "| pass@1 before | after | validation loss | seconds |",
            "|---|---|---|---|",
            f"| {result['pass_at_1_before']:.3f} | {result['pass_at_1_after']:.3f} "
            f"| {result['val_loss']:.4f} | {result['seconds']:.0f} |",
            "",
            about(result),
        ]
    )


def about(result: dict[str, Any]) -> str:
    facts = result["about"]
    versions = ", ".join(f"{key} {facts[key]}" for key in ("threads", "torch", "python", "pykern") if key in facts)
    return f"{facts['machine']}, {versions}: `{facts['command']}`"


def render(text: str) -> str:
    """The README with every generated section made anew."""
    sections = {
        "backends": backend_table,
        "speed": lambda: speed_table(RESULTS / "cpu-norms.json"),
        "training": lambda: training_table(RESULTS / "cpu-training.json"),
        "demo": lambda: demo_table(RESULTS / "cpu-demo.json"),
    }

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- {name} -->\n{sections[name]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
