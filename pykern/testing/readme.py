"""Fills in the README's tables, from the catalogue and the committed results: `python -m pykern.testing.readme`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykern.ops.attention_decode_samples import decode_features
from pykern.ops.attention_samples import dense_features
from pykern.ops.attention_varlen_samples import varlen_features
from pykern.testing.commands import backend_table, forward_ops
from pykern.testing.feature_tables import (
    experts_table,
    feature_table,
    lora_table,
    moe_layers_table,
    routers_table,
    weight_formats_table,
)
from pykern.testing.sass import Cost

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


def rivals_table(path: Path, beside_torch: bool = False) -> str:
    """One line an op, dtype, mode and sample: the time of each peer over ours, if asked of torch's own ops too."""
    result = json.loads(path.read_text())
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in result["records"]:
        key = (record["op"], record["sample"], record["dtype"], record["mode"])
        groups.setdefault(key, {})[record["contestant"]] = record
    chosen = {
        key: next(group[name] for name in forward_ops()[key[0]].backends if name in group)
        for key, group in groups.items()
    }
    if beside_torch:
        for ours in chosen.values():
            ours["over"] = {"torch": (ours["speedup"], ours["low"], ours["high"]), **ours["over"]}
    peers = list(dict.fromkeys(peer for ours in chosen.values() for peer in ours["over"]))
    lines = ["| op | sample | dtype | | ms | " + " | ".join(f"× {peer} (95 %)" for peer in peers) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(peers))
    for (op, sample, dtype, mode), ours in chosen.items():
        cells = ["{:.2f} ({:.2f}–{:.2f})".format(*ours["over"][p]) if p in ours["over"] else "" for p in peers]
        lines.append(f"| `{op}` | {sample} | {dtype} | {mode} | {ours['seconds'] * 1e3:.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", about(result)])


def traffic_table(path: Path) -> str:
    """One line an op and sample: what each backend moves over what it must."""
    result = json.loads(path.read_text())
    backends = list(dict.fromkeys(record["backend"] for record in result["records"]))
    flops = any(record["flops"] for record in result["records"])
    columns = [*backends, *(f"{b}, flops" for b in backends if flops)]
    lines = ["| op | sample | must move | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in result["records"]:
        groups.setdefault((record["op"], record["sample"]), {})[record["backend"]] = record
    for (op, sample), group in groups.items():
        over = [f"{group[b]['moved'] / group[b]['cost_bytes']:.2f} ×" if b in group else "" for b in backends]
        if flops:
            over += [f"{group[b]['flops'] / group[b]['cost_flops']:.2f} ×" if b in group else "" for b in backends]
        must = next(iter(group.values()))["cost_bytes"] / 2**20
        lines.append(f"| `{op}` | {sample} | {must:.1f} MiB | " + " | ".join(over) + " |")
    return "\n".join([*lines, "", about(result)])


def ledger_table(paths: Sequence[Path]) -> str:
    """One line a family, backend and architecture: kernels, registers, spills, wide accesses, tensor cores."""
    lines = ["| | | kernels | most registers | with spills | most spilled | with 16-byte accesses | on tensor cores |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for path in paths:
        for part, book in json.loads(path.read_text()).items():
            for arch in sorted({key.split()[0] for key in book["kernels"]}):
                costs = [Cost.from_json(v["cost"]) for key, v in book["kernels"].items() if key.split()[0] == arch]
                spilling = [cost.spills for cost in costs if cost.spills]
                wide = sum(128 in (*cost.loads, *cost.stores) or cost.bulk > 0 for cost in costs)
                names = Counter(name for cost in costs for name in {n.split(".")[0] for n in cost.tensor})
                tensor = ", ".join(f"{n} {name}" for name, n in sorted(names.items()))
                row = (len(costs), max(c.registers for c in costs), len(spilling), max(spilling, default=0))
                row = (f"{part} {book['compiler']}, {arch}", *row, wide, tensor)
                lines.append(f"| {path.stem} | " + " | ".join(map(str, row)) + " |")
    return "\n".join([*lines, "", "`pykern ledger --update`, benchmarks/ledger"])


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
        "attention": lambda: feature_table("attention", dense_features),
        "attention_varlen": lambda: feature_table("attention_varlen", varlen_features),
        "attention_decode": lambda: feature_table("attention_decode", decode_features),
        "weight_formats": weight_formats_table,
        "lora": lora_table,
        "routers": routers_table,
        "experts": experts_table,
        "moe_layers": moe_layers_table,
        "weight_speed": lambda: rivals_table(RESULTS / "cpu-4bit.json"),
        "lora_speed": lambda: rivals_table(RESULTS / "cpu-lora.json", beside_torch=True),
        "moe_speed": lambda: rivals_table(RESULTS / "cpu-moe.json", beside_torch=True),
        "speed": lambda: speed_table(RESULTS / "cpu-norms.json"),
        "attention_speed": lambda: speed_table(RESULTS / "cpu-attention.json"),
        "attention_packed_speed": lambda: speed_table(RESULTS / "cpu-attention-packed.json"),
        "traffic": lambda: traffic_table(RESULTS / "traffic-norms.json"),
        "attention_traffic": lambda: traffic_table(RESULTS / "traffic-attention.json"),
        "weight_traffic": lambda: traffic_table(RESULTS / "traffic-4bit.json"),
        "ledger": lambda: ledger_table(sorted((ROOT / "benchmarks" / "ledger").glob("*.json"))),
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
