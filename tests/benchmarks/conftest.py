"""The benchmarks are a package at the repository's root, which an installed ban_fast does not bring along."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
