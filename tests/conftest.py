import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the generated tests run: cpu or cuda")
    parser.addoption("--kind", default="smoke", help="which samples they take: smoke, full or what an op has besides")
