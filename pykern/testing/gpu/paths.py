"""Where things are in a checkout, which a run needs: an installed package has neither tests nor results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks/results"
