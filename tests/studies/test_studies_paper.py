"""The paper's tables as studies: which runs they are, and that each has the paper's figures beside it."""

import pytest

from ban_fast import models, recipes
from ban_fast.config import Config
from ban_fast.errors import UserError
from ban_fast.report import paper as printed
from ban_fast.studies import paper

WIDE = ["wrn-28-1", "wrn-28-2", "wrn-28-5", "wrn-28-10"]
DENSE = ["densenet-112-33", "densenet-90-60", "densenet-80-80", "densenet-80-120"]


@pytest.mark.parametrize(("number", "recipe", "names"), [(1, "cifar10", WIDE + DENSE), (3, "cifar100", WIDE)])
def test_a_teacher_and_one_student_for_each_network(number: int, recipe: str, names: list[str]) -> None:
    study = paper.table(number, seeds=[0, 4])
    assert [(run.config.model.name, run.config.seed) for run in study.runs] == [(n, s) for s in (0, 4) for n in names]
    for run in study.runs:
        expected = recipes.get(recipe)
        expected.model.name, expected.generations, expected.seed = run.config.model.name, 1, run.config.seed
        assert run.config == expected


def test_table_2_has_sequences_and_treatments_of_one_teacher_each() -> None:
    study = paper.table(2)
    found = {
        (r.config.model.name, r.config.objective.name): r.config.generations for r in study.runs if not r.is_helper
    }
    assert found == {
        (model, objective): (2 if model == "densenet-80-120" else 3) if objective == "ban" else 1
        for model in DENSE
        for objective in ("ban", "ban+l", "cwtm", "dkpp")
    }
    assert sum(run.is_helper for run in study.runs) == 4
    assert all(
        run.teacher == f"teacher,model={run.config.model.name},seed=0" for run in study.runs if not run.is_helper
    )


def test_table_6_is_both_language_models() -> None:
    assert [run.config for run in paper.table(6).runs] == [recipes.get("ptb-lstm"), recipes.get("ptb-cnn-lstm")]


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_every_run_has_a_row_in_the_paper_and_a_network_here(number: int) -> None:
    for run in paper.table(number).runs:
        values = run.config.to_dict()
        assert printed.row(values) or printed.text_row(values), run.name
        if number != 6:
            assert run.config.model.name in models.names() or run.config.model.name in WIDE


def test_each_can_be_adjusted() -> None:
    def smaller(config: Config) -> Config:
        config.epochs = 2
        return config

    assert {run.config.epochs for run in paper.table(2, adjusted=smaller).runs} == {2}


@pytest.mark.parametrize("number", [0, 4, 5, 7])
def test_tables_of_other_architectures(number: int) -> None:
    with pytest.raises(UserError, match=rf"table {number} can't be made of runs here.*choose one of 1, 2, 3, 6"):
        paper.table(number)
