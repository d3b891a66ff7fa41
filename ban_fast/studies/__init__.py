"""Many runs as one list: what is varied, which runs share a teacher, where they are executed, and what they came to."""

from .schedule import StudyObserver, finished, run_study
from .study import STUDY, Study, StudyRun
from .table import Row, Spread, summary, table
from .worker import Outcome

__all__ = [
    "STUDY",
    "Outcome",
    "Row",
    "Spread",
    "Study",
    "StudyObserver",
    "StudyRun",
    "finished",
    "run_study",
    "summary",
    "table",
]
