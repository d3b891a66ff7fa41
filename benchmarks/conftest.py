"""`pytest benchmarks/ --benchmark-only`: a test for each (case, setting, provider), replaying the harness's rounds."""

from collections.abc import Iterator

import pytest

from benchmarks import run as runs
from benchmarks import tables
from benchmarks.figures import Figures
from benchmarks.providers import providers
from benchmarks.run import Run

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every case and torch.compile's max-autotune")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install -e '.[bench]'")
    full = config.getoption("--full")
    config.stash[RUN] = Run(runs.device(), full=full, minutes=None if full else runs.MINUTES)


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


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Run]:
    """The session's run; its processes end with the session."""
    with pytestconfig.stash[RUN] as run:
        yield run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if not run.records:
        return
    figures = Figures(run.records)
    terminalreporter.section("forward + backward, from logits to d loss / d logits")
    for case in figures.cases():
        terminalreporter.write_line(f"\n{tables.case_table(figures, case)}")
    terminalreporter.write_line(f"\n{tables.summary(figures, figures.cases())}")
    terminalreporter.write_line(f"\n{tables.target_table({'device': run.device, 'records': run.records})}")
    left_out = run.left_out()
    terminalreporter.write_line("\nLeft out, but for --full:" if left_out else "\nNothing was left out.")
    for line in left_out:
        terminalreporter.write_line(f"  {line}")
