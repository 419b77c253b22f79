"""The README says what is so: its tables are the ones that the results give, its example runs, its commands exist."""

import re
from pathlib import Path

import pytest

from pykern.cli import COMMANDS
from pykern.testing.readme import ROOT, render

README = (ROOT / "README.md").read_text()


def test_tables_are_generated_from_the_catalogue_and_the_committed_results() -> None:
    assert render(README) == README, "run python -m pykern.testing.readme"
    assert README.count("\n|---|") >= 4


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_commands_exist() -> None:
    blocks = README.split("```")[1::2]
    named = set(re.findall(r"^pykern (\w+)", "\n".join(blocks), flags=re.MULTILINE))
    assert named and named <= set(COMMANDS)


def test_author_guide_declares_an_op_that_passes() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-an-op.md").read_text(), flags=re.DOTALL)
    scope: dict = {}
    exec(compile(blocks[0] + blocks[1], "docs/adding-an-op.md", "exec"), scope)
    from pykern.testing.cases import cases

    ran = 0
    for case in cases(["mypkg::sine"]):
        case.run()
        ran += 1
    assert ran > 10
