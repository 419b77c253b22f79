"""The tests that every declaration implies, on every backend this process can run."""

import pytest

from pykern.testing.cases import Case, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, kind = metafunc.config.getoption("--device"), metafunc.config.getoption("--kind")
    metafunc.parametrize("case", list(cases(device=device, kind=kind)), ids=str)


def test_op(case: Case) -> None:
    case.run()
