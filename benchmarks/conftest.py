"""`pytest benchmarks/ --benchmark-only`: a test for each (case, setting, provider), replaying the harness's rounds."""

import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from benchmarks import run as runs
from benchmarks import tables
from benchmarks.figures import Figures
from benchmarks.harness import TIME_OVER
from benchmarks.providers import providers
from benchmarks.run import Run

RUN = pytest.StashKey[Run]()
GIVEN_UP = pytest.StashKey[list[str]]()
"""Tests that the run's time was over for, other than the harness's own."""
ORDER = ("test_losses.py", "test_loaders.py", "test_step.py", "test_densenet.py")
"""What decides first: a run's time may be over before the last."""
GRACE = 5.0  # seconds in which the harness gives up by itself, and says more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every case and torch.compile's max-autotune")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install -e '.[bench]'")
    full = config.getoption("--full")
    config.stash[RUN] = Run(runs.device(), full=full, minutes=None if full else runs.MINUTES)
    config.stash[GIVEN_UP] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "setting", "provider"} <= set(metafunc.fixturenames):
        run = metafunc.config.stash[RUN]
        found = [
            pytest.param(case, setting, provider.name, id=f"{case.id}-{setting}-{provider.name}")
            for case in run.cases
            for setting in run.settings(case)
            for provider in providers(case.objective, case.dtype, run.device, autotune=run.autotuned(case))
        ]
        metafunc.parametrize(("case", "setting", "provider"), found)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER))


def pytest_runtest_setup(item: pytest.Item) -> None:
    left = item.config.stash[RUN].seconds_left()
    if left is not None and left <= 0:
        _give_up(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that still runs when the run's time is over is given up, whatever it does."""
    left = item.config.stash[RUN].seconds_left()
    if left is None:
        return (yield)
    before = signal.signal(signal.SIGALRM, lambda *_: _give_up(item))
    signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3) + GRACE)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _give_up(item: pytest.Item) -> None:
    item.config.stash[GIVEN_UP].append(item.nodeid)
    pytest.skip(TIME_OVER)


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Run]:
    """The session's run; its processes end with the session."""
    with pytestconfig.stash[RUN] as run:
        yield run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run, given_up = config.stash[RUN], config.stash[GIVEN_UP]
    if not run.records and not given_up:
        return
    figures = Figures(run.records)
    terminalreporter.section("forward + backward, from logits to d loss / d logits")
    for case in figures.cases():
        terminalreporter.write_line(f"\n{tables.case_table(figures, case)}")
    terminalreporter.write_line(f"\n{tables.summary(figures, figures.cases())}")
    terminalreporter.write_line(f"\n{tables.target_table({'device': run.device, 'records': run.records})}")
    terminalreporter.write_line(f"\nMost memory that the measuring processes held: {run.peak_bytes / 1e9:.1f} GB")
    left_out = run.left_out() + [f"{test}: for want of time" for test in given_up]
    terminalreporter.write_line("\nLeft out, but for --full:" if left_out else "\nNothing was left out.")
    for line in left_out:
        terminalreporter.write_line(f"  {line}")
