"""`pykern ledger`: what every kernel costs, compiled with no GPU, against what is written down.

A ledger is a JSON file with one line a kernel: benchmarks/ledger/FAMILY.json for pykern's ops (a family is the ops
whose launchers share a file), FILE.ledger.json beside any other file.

Against it, a kernel fails that spills or uses more local memory, loads or stores narrower, has lost tensor-core
instructions, does not compile, asks for more shared memory than there is, or is not in the ledger; so does an entry
without a kernel. Registers and code size are reported. `--update` writes down whatever is, prints what it has made
worse, and still fails on what can never run; the diff of the file is what a reviewer reads.

Triton kernels are compiled anew where source or configuration have changed, and a few others, which change from day to
day; all of them for `--all`, and to update the ledger of another compiler. CUDA kernels are read from what the build
made. Under another compiler than the ledger's, registers and counts say nothing: only spills where there were none, a
narrower widest access, tensor-core instructions that are gone and the limit on shared memory fail.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional, UseAppendAction

import pykern
from pykern.ops._backends import resolved
from pykern.ops._spec import OpSpec
from pykern.testing import ledger_cuda, ledger_triton
from pykern.testing.commands import forward_ops, resolve
from pykern.testing.sass import Cost, shared_limit
from pykern.toolchain import DEFAULT_CUDA_ARCHS

FOLDER = Path(pykern.__file__).resolve().parents[1] / "benchmarks" / "ledger"
SAMPLE = 16  # unchanged Triton kernels of a family that are compiled all the same
_BINARIES = (".cu", ".cubin", ".o", ".so")


@dataclass
class Entry:
    """One kernel, in one specialization, configuration and architecture."""

    cost: Cost
    hash: str = ""  # of source and configuration; CUDA kernels, which are never skipped, have none
    of: str = ""  # a sample that starts it


@dataclass
class Book:
    """The kernels of one family and compiler, by architecture, name and configuration."""

    compiler: str
    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass
class Family:
    """What shares one ledger."""

    name: str
    path: Path
    specs: list[OpSpec] = field(default_factory=list)
    binaries: list[Path] = field(default_factory=list)


@dataclass
class Findings:
    """What a comparison comes to, as (kernel, text) pairs: what is worse, new or gone, and what may be of interest."""

    faults: list[tuple[str, str]] = field(default_factory=list)
    moves: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    fatal: bool = False  # something that --update does not write down


def ledger(
    targets: Positional[tuple[str, ...]] = (),
    update: bool = False,
    arch: UseAppendAction[tuple[str, ...]] = (),
    backend: Literal["triton", "cuda"] | None = None,
    all: bool = False,
) -> int:
    """Compiles every kernel for GPUs that are not here and compares it with the ledger; 1 if one has become worse.

    Args:
        targets: ops by name, Python files outside the package that declare some, and .cu files, libraries, object
            files or cubins; all of pykern's own by default.
        update: write down what is, better or worse.
        arch: architectures, as --arch 80 --arch 90a, which is the default.
        backend: triton or cuda alone.
        all: compile the unchanged kernels too.
    """
    for name in arch:
        if not name.rstrip("af").isdigit():
            sys.exit(f"error: arch: expected an architecture such as 80 or 90a, got {name!r}")
    code = 0
    for family in families(targets):
        recorded, books, findings = read(family.path), {}, Findings()
        for part in ("triton", "cuda") if backend is None else (backend,):
            try:
                book, counts = _measure(
                    family, part, recorded.get(part), arch or DEFAULT_CUDA_ARCHS, all, update, findings
                )
            except (RuntimeError, ImportError, OSError) as error:
                findings.faults.append((part, f"not checked: {error}"))
                findings.fatal = True
                continue
            if book is not None:
                books[part] = book
                print(f"{family.name}: {counts}")
        if books or findings.fatal:
            _print(findings, update)
            if update:
                write(family.path, {**recorded, **books})
                print(f"{family.path} written")
            code |= findings.fatal if update else bool(findings.faults or findings.moves)
        elif targets:
            sys.exit(f"error: {family.name} has no Triton or CUDA kernel")
    return int(code)


def families(targets: Sequence[str] = ()) -> list[Family]:
    """A name stands for its whole family, so that what no sample starts any more is seen."""
    files = [Path(t) for t in targets if t.endswith(_BINARIES)]
    for file in files:
        if not file.is_file():
            sys.exit(f"error: there is no file {file}")
    found: dict[Path, Family] = {}
    names = resolve([t for t in targets if not t.endswith(_BINARIES)]) if len(files) < len(targets) or not files else []
    wanted = {_home(forward_ops()[name]) for name in names}
    for spec in forward_ops().values():
        home = _home(spec)
        if home in wanted:
            family = found.setdefault(home, Family(home.name.split(".")[0], home))
            family.specs.append(spec)
            family.binaries += [source for source in _sources(spec) if source not in family.binaries]
    for file in files:
        home = file.with_suffix(".ledger.json")
        found.setdefault(home, Family(file.stem, home)).binaries.append(file)
    for built in ledger_cuda.built_objects():
        owners = [f for f in {_home(s) for s in forward_ops().values()} if _belongs(built.stem, f.stem)]
        home = max(owners, key=lambda f: len(f.stem), default=FOLDER / f"{built.stem}.json")
        if home.parent == FOLDER and (home in found or not targets):
            found.setdefault(home, Family(home.stem, home)).binaries.append(built)
    return list(found.values())


def _sources(spec: OpSpec) -> list[Path]:
    """The .cu files of an op's own `pykern.extension.Library`."""
    kernels = (s.backends.get("cuda") for s in (spec, spec.gradient.op))
    return [source for kernel in kernels if hasattr(kernel, "library") for source in kernel.library.sources]


def _belongs(source: str, family: str) -> bool:
    return source == family or source.startswith(f"{family}_")


def _home(spec: OpSpec) -> Path:
    """The ledger of an op: that of the file its Triton launcher is in, else of the file with its samples."""
    owner: Any = spec.samples
    if "triton" in spec.backends and ledger_triton.installed():
        owner = resolved(spec.backends["triton"], "cuda")
    module = getattr(owner, "__module__", None) or type(owner).__module__
    if spec.namespace == "pykern":
        return FOLDER / f"{module.rpartition('.')[2]}.json"
    return Path(getattr(sys.modules[module], "__file__", None) or module).with_suffix(".ledger.json")


def _measure(
    family: Family,
    part: str,
    recorded: Book | None,
    archs: Sequence[str],
    everything: bool,
    update: bool,
    findings: Findings,
) -> tuple[Book | None, str]:
    """What there is now, after comparison with what was; and a line on how it was found."""
    if part == "cuda":
        current, skipped = _measure_cuda(family, archs), {}
        if not (current and current.entries) and recorded is None:
            return None, ""
        if current is None:
            raise RuntimeError("the build has left no object file of this family's kernels: run make where nvcc is")
    else:
        wanted = [s for s in family.specs if set(s.backends) - {"cpu", "cuda"}]
        if not wanted and recorded is None:
            return None, ""
        if update and recorded is not None and recorded.compiler != ledger_triton.compiler():
            everything = True  # costs under two compilers do not go into one book
        current, skipped = _measure_triton(wanted, recorded, archs, everything, findings)
        if not current.entries and not skipped and recorded is None:
            return None, ""
    before = recorded or Book(current.compiler)
    compare(before, current, findings)
    present = {*current.entries, *skipped}
    ours = tuple(f"sm_{arch} " for arch in archs)
    for key, entry in before.entries.items():
        if key.startswith(ours) and key not in present:
            findings.moves.append((_title(key, entry), "is in the ledger, but nothing starts it any more"))
    same = before.compiler == current.compiler
    others = {key: entry for key, entry in before.entries.items() if same and not key.startswith(ours)}
    measured = len(current.entries)
    current.entries |= skipped | others
    spilling = sum(entry.cost.spills > 0 for key, entry in current.entries.items() if key in present)
    counts = f"{len(present)} {'Triton' if part == 'triton' else 'CUDA'} kernels"
    counts += f", {measured} compiled, {len(skipped)} unchanged" if part == "triton" else ""
    counts += f", {spilling} with spills" if spilling else ""
    if recorded is not None and recorded.compiler != current.compiler:
        counts += f"; the ledger is of {part} {recorded.compiler}, this is {current.compiler}: limits only"
    return current, counts


def _measure_cuda(family: Family, archs: Sequence[str]) -> Book | None:
    book = None
    for path in family.binaries:
        compiler, costs = ledger_cuda.cuda_kernels(path, archs)
        book = book or Book(compiler)
        book.entries |= {key: Entry(cost) for key, cost in costs.items()}
    return book


def _measure_triton(
    specs: Sequence[OpSpec], recorded: Book | None, archs: Sequence[str], everything: bool, findings: Findings
) -> tuple[Book, dict[str, Entry]]:
    book, skipped = Book(ledger_triton.compiler()), {}
    launches, problems = ledger_triton.launches(specs, archs)
    for problem in problems:
        findings.faults.append((problem.partition(":")[0], problem.partition(": ")[2]))
    sources = {launch.kernel: ledger_triton.source_hash(launch.kernel) for launch in launches}
    hashes = {
        launch.key: hashlib.sha256(f"{sources[launch.kernel]} {launch.key}".encode()).hexdigest()[:16]
        for launch in launches
    }
    old = recorded.entries if recorded else {}
    today = datetime.date.today().isoformat()
    unchanged = [launch.key for launch in launches if launch.key in old and old[launch.key].hash == hashes[launch.key]]
    unchanged.sort(key=lambda key: hashlib.sha256(f"{today} {key}".encode()).digest())
    skipped = {} if everything else {key: old[key] for key in unchanged[SAMPLE:]}
    due = [launch for launch in launches if launch.key not in skipped]
    for launch, cost in zip(due, ledger_triton.compile_all(due), strict=True):
        entry = Entry(Cost(0, 0, 0, 0) if isinstance(cost, Exception) else cost, hashes[launch.key], launch.of)
        if isinstance(cost, Exception):
            findings.faults.append((_title(launch.key, entry), f"does not compile: {type(cost).__name__}: {cost}"))
            findings.fatal = True
        else:
            book.entries[launch.key] = entry
    return book, skipped


def compare(before: Book, now: Book, findings: Findings) -> None:
    """Holds what was measured against what was written down; takes out of `now` what can never run."""
    exact = before.compiler == now.compiler
    by_sample = {(*key.split()[:2], entry.of): entry.cost for key, entry in before.entries.items() if entry.of}
    stale = 0
    for key, entry in list(now.entries.items()):
        title, cost = _title(key, entry), entry.cost
        known = before.entries.get(key)
        old = known.cost if known else by_sample.get((*key.split()[:2], entry.of))
        limit = shared_limit(key.split()[0].removeprefix("sm_"))
        if cost.shared > limit:
            findings.faults.append((title, f"{cost.shared} bytes of shared memory, a block can have {limit}"))
            findings.fatal = True
            del now.entries[key]
        worse = regressions(old, cost, exact)
        findings.faults += [(title, text) for text in worse]
        if known is None:
            findings.moves.append((title, f"is not in the ledger: {key}"))
        elif exact and not worse and cost != known.cost:
            findings.remarks.append((title, _changes(known.cost, cost)))
        stale += known is not None and known.hash != entry.hash and cost == known.cost and exact
    if stale:
        findings.remarks.append((f"{stale} kernels", "have another source and the same cost; --update notes that"))


def regressions(old: Cost | None, new: Cost, exact: bool = True) -> list[str]:
    """What has become worse; for a kernel that has no predecessor, what is bad in itself."""
    found = []
    base = old or Cost(0, 0, 0, 0)
    if new.spills > base.spills if exact else new.spills and not base.spills:
        found.append(f"spills: {base.spills} → {new.spills} loads and stores of local memory")
    if exact and new.stack > base.stack:
        found.append(f"local memory: {base.stack} → {new.stack} bytes a thread")
    for name in ("loads", "stores"):
        was, now = getattr(base, name), getattr(new, name)
        if was and now and (max(now) < max(was) or (exact and _mean(now) < _mean(was))):
            found.append(f"narrower {name}: {_widths(was)} → {_widths(now)}")
    for name, before in (*base.tensor.items(), ("bulk copies", base.bulk)):
        after = new.bulk if name == "bulk copies" else new.tensor.get(name, 0)
        if after < before and (exact or not after):
            found.append(f"lost {name}: {before} → {after}")
    return found


def _mean(widths: dict[int, int]) -> float:
    return sum(bits * count for bits, count in widths.items()) / sum(widths.values())


def _widths(widths: dict[int, int]) -> str:
    return ", ".join(f"{count} of {bits} bits" for bits, count in sorted(widths.items(), reverse=True))


def _changes(old: Cost, new: Cost) -> str:
    names = [name for name in vars(old) if getattr(old, name) != getattr(new, name)]
    return ", ".join(f"{name} {getattr(old, name)} → {getattr(new, name)}" for name in names)


def _title(key: str, entry: Entry) -> str:
    return f"{' '.join(key.split()[:2])} · {entry.of}" if entry.of else key


def _print(findings: Findings, update: bool) -> None:
    """A line each and no table: names are long, and one searches in them."""
    for kernel, text in findings.faults:
        print(f"{'RECORDED' if update and not findings.fatal else 'WRONG'}  {kernel}: {text}")
    if update:
        print(f"{len(findings.moves)} kernels are new or gone")
    else:
        for kernel, text in findings.moves:
            print(f"WRONG  {kernel}: {text}")
    for kernel, text in findings.remarks[:20]:
        print(f"{kernel}: {text}")
    if len(findings.remarks) > 20:
        print(f"and {len(findings.remarks) - 20} more whose cost differs without harm")


def read(path: Path) -> dict[str, Book]:
    """The ledger in a file, by part; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        books = {}
        for part, book in json.loads(path.read_text()).items():
            entries = {
                key: Entry(Cost.from_json(values["cost"]), values.get("hash", ""), values.get("of", ""))
                for key, values in book["kernels"].items()
            }
            books[part] = Book(book["compiler"], entries)
        return books
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {path} is not a ledger: {type(error).__name__}: {error}")


def write(path: Path, books: dict[str, Book]) -> None:
    """One line a kernel, in order, so that a diff shows what has changed."""
    parts = []
    for part, book in sorted(books.items()):
        lines = []
        for key, entry in sorted(book.entries.items()):
            values: dict[str, Any] = {"cost": entry.cost.to_json(), "hash": entry.hash, "of": entry.of}
            values = {name: value for name, value in values.items() if value}
            lines.append(f"{json.dumps(key)}: {json.dumps(values)}")
        kernels = ",\n".join(lines)
        parts.append(f'{json.dumps(part)}: {{"compiler": {json.dumps(book.compiler)}, "kernels": {{\n{kernels}\n}}}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("{" + ",\n".join(parts) + "}\n")
    os.replace(fresh, path)
