"""Many runs as one list: what is varied, which runs share a teacher, where they are executed, and what they came to.

study = Study.vary(recipes.get("demo"), {"objective.name": ["ban", "ban+l"]}, seeds=range(3))
failed = run_study(study, "runs/objectives", workers=2)
for row in summary("runs/objectives"):
    print(row.group, row.name, row.figures["error"])
"""

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
