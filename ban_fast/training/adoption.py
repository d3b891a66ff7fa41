"""A teacher that another run has trained, taken over instead of trained again."""

import dataclasses
from pathlib import Path

from ..config import Config
from ..errors import UserError
from .environment import differences
from .lineage import Lineage
from .run_store import RunStore, config_differences


def teacher_settings(config: Config) -> Config:
    """What a run's teacher is made by: two runs of the same settings have the same generation 0, to the bit.

    The rest, what students learn from and how many there are, has its defaults.
    """
    plain = Config()
    return dataclasses.replace(
        config, recipe=plain.recipe, objective=plain.objective, teacher=plain.teacher, students=(), generations=0
    )


def adopt_teacher(lineage: Lineage, path: Path) -> None:
    """Copy generation 0 of the run in `path`, which may be read by several at once, into a run that has none yet.

    UserError where there is no finished one, where it is damaged, or would not be what `lineage` would train.
    """
    store = RunStore(path, lineage.task.ranks)
    config = store.look()
    for field, theirs, ours in config_differences(teacher_settings(config), teacher_settings(lineage.config)):
        raise UserError(f"the teacher in {path} is another one: {field} is {theirs!r} there, and {ours!r} here")
    if not store.results["generations"]:
        raise UserError(f"the teacher in {path} is not trained yet: finish that run first, with --resume")
    store.identify(config, lineage.task.shape, lineage.task.structure)
    if lineage.store is not None:
        assert lineage.store.environment is not None
        assert store.environment is not None
        if changed := differences(store.environment, lineage.store.environment):
            lineage.observer.message(
                f"the teacher in {path} was trained on another footing ({'; '.join(changed)}): its weights differ from "
                "those that it would have here"
            )
    lineage.adopt_teacher(Lineage(config, lineage.task, store, lineage.evaluator, lineage.observer))
