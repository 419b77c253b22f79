"""One page about a run: what passed, what did not and why, and how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES = 58  # the page; a machine that is far away may show only the end of what is printed
WIDTH = 150


def summary(results: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> str:
    facts = [f"{name} {about[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if about.get(name)]
    lines = [f"{about['machine']} · {' · '.join(facts)}", f"commit {about['commit']} · seed {about['seed']} · {folder}"]
    if "dry_run" in about:
        lines.append(f"DRY RUN {about['dry_run']}")
    lines += [""] + [_line(result) for result in results] + [""]
    details = [list(_details(result)) for result in results]
    room = LINES - len(lines) - 1
    # Each part gets an equal share of the room, and what others do not need.
    shares = dict.fromkeys(range(len(details)), 0)
    while room > 0 and any(shares[i] < len(d) for i, d in enumerate(details)):
        for i, lines_of_part in enumerate(details):
            if room > 0 and shares[i] < len(lines_of_part):
                shares[i] += 1
                room -= 1
    for result, share, found in zip(results, shares.values(), details, strict=True):
        shown = (
            found
            if share >= len(found)
            else [*found[: share - 1], f"{result['part']}: … {len(found) - share + 1} more"]
        )
        lines += shown if share else []
    verdict = "passed" if all(r["status"] == "passed" for r in results) else "NOT all passed"
    return "\n".join([line[:WIDTH] for line in [*lines, f"make gpu: {verdict}"]])


def _line(result: dict[str, Any]) -> str:
    oks = [unit["ok"] for unit in result["units"].values()]
    counts = [(oks.count(True), "ok"), (oks.count(False), "failed"), (oks.count(None), "not there")]
    counts.append((len(result["left"]), "left for want of time"))
    text = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f"{result['part']:<12} {result['status']:<8} {result['seconds']:>6.1f} s  {text}"


def _details(result: dict[str, Any]) -> Iterator[str]:
    part = result["part"]
    if "error" in result:
        yield f"{part}: {_last_line(result['error'])}"
    for name, unit in result["units"].items():
        if unit["ok"] is False:
            yield f"{part}: {name}: {_last_line(unit.get('error', ''))}"
            yield from (f"{part}:   {line}" for line in unit.get("failures", ()))
        elif "note" in unit:
            yield f"{part}: {name}: {unit['note']}"
    reasons: dict[str, list[str]] = {}
    for name, unit in result["units"].items():
        if unit["ok"] is None:
            reasons.setdefault(_last_line(unit["reason"]), []).append(name)
    for reason, names in reasons.items():
        yield f"{part}: {', '.join(names) if len(names) < 4 else f'{len(names)} units'} not done: {reason}"
    if result["left"]:
        yield f"{part}: no time for {', '.join(result['left'])}"
    yield from _speeds(result)


def _speeds(result: dict[str, Any]) -> Iterator[str]:
    """Our fastest backend on each sample, against torch, the fastest peer and the floor."""
    rows = []
    for unit in result["units"].values():
        records = unit.get("records", ())
        ours = [r for r in records if r["contestant"] not in unit["peers"] and r["contestant"] != "reference"]
        peers = [r for r in records if r["contestant"] in unit["peers"]]
        if not ours:
            continue
        best = min(ours, key=lambda r: r["seconds"])
        other = min(peers, key=lambda r: r["seconds"], default=None)
        title = f"{best['op']} {best['sample']} {best['dtype']} {best['mode']}"
        speeds = [f"{best['contestant']} {best['seconds'] * 1e6:.0f} µs"]
        speeds.append("" if best["speedup"] is None else f"{best['speedup']:.2f} × torch")
        speeds.append("" if best["over_floor"] is None else f"{1 / best['over_floor']:.0%} of floor")
        speeds.append("" if other is None else f"{other['seconds'] / best['seconds']:.2f} × {other['contestant']}")
        rows.append((title, speeds))
    for title, speeds in rows:
        yield f"{title:<62} " + " ".join(f"{text:<18}" for text in speeds).rstrip()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
