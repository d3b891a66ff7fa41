"""One harness, two ways in: `pytest benchmarks/ --benchmark-only` and `python -m benchmarks.report`."""
