"""Tests that need Triton's interpreter run in a process of their own: it has to be on before Triton is imported."""

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def in_child(test: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a file's tests, or those that `file::name` names, where Triton is interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
