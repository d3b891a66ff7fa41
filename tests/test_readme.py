"""README keeps its word: its Python runs, its commands parse, its names exist."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ban_fast.losses import CWTMLoss, DKPPLoss, KDLoss
from ban_fast.recipes import penn_treebank

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_example_runs_in_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (b for b in blocks("python") if "training import run" in b)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert (scope["vote"]["average"], scope["vote"]["members"]) == ("probabilities", [1, 2, 3])
    assert re.fullmatch(r"\[(\d+\.\d+(, )?){4}\] \{'error': .*, 'nll': .*, 'ece': .*\}\n", printed), printed


def test_the_losses_example_runs() -> None:
    (example,) = (b for b in blocks("python") if "losses import" in b)
    torch.manual_seed(0)
    names = {
        "student_logits": torch.randn(4, 10, requires_grad=True),
        "teacher_logits": torch.randn(4, 10),
        "labels": torch.tensor([1, 2, 3, 4]),
        "step": 3,
        "ids": torch.arange(4),
    }
    for line in example.splitlines()[2:]:
        scope = {"KDLoss": KDLoss, "CWTMLoss": CWTMLoss, "DKPPLoss": DKPPLoss, **names}
        exec(line, scope)
        assert scope["loss"].isfinite()
        assert scope["loss"].requires_grad


def test_the_equivalence_holds() -> None:
    """The formula in the text, at logits where the textbook form is good enough to compare with."""
    from torch.nn import functional as F

    torch.manual_seed(0)
    s, t, y = torch.randn(64, 10), torch.randn(64, 10), torch.randint(0, 10, (64,))
    expected = 0.7 * 9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")
    expected = expected + 0.3 * F.cross_entropy(s, y)
    torch.testing.assert_close(KDLoss(3.0, kd_weight=0.7, label_weight=0.3)(s, t, y), expected)


def test_the_commands_parse() -> None:
    """Every `ban-fast` line names a command and flags that exist."""
    from ban_fast.cli.app import command

    group = command()
    lines = [line.split("#")[0].strip() for b in blocks("sh") for line in b.splitlines()]
    calls = [shlex.split(part) for line in lines for part in line.split("&&") if part.strip().startswith("ban-fast")]
    assert len(calls) >= 7
    for call in calls:
        flags = {flag for p in group.commands[call[1]].params for flag in p.opts}
        assert {word for word in call[2:] if word.startswith("--")} <= flags, call


def perplexity(
    data: str, epochs: int, objective: str, generation: int, split: str = "test", kd_weight: float | None = None
) -> float:
    """Of the one record in benchmarks/results/language_models of such a run."""
    wanted = (data, epochs, objective, kd_weight)
    found = []
    for path in (ROOT / "benchmarks/results/language_models").glob("*.json"):
        record = json.loads(path.read_text())
        config, learns = record["config"], record["config"]["objective"]
        if (config["data"]["name"], config["epochs"], learns["name"], learns["kd_weight"]) == wanted:
            found.append(record)
    (one,) = found
    return float(one["generations"][generation][split]["perplexity"])


def test_the_language_models_figures_are_those_on_record() -> None:
    """README's and the recipe's, with as many decimals as they have there."""
    cut = [
        f"{perplexity('ptb4000', 20, objective, generation):.1f}"
        for objective, generation in (("ban+l", 1), ("ban+l", 0), ("label", 1))
    ]
    summed, halves, teacher = (
        [f"{perplexity('ptb', 2, 'ban+l', generation, split, weight):.0f}" for split in ("test", "valid")]
        for generation, weight in ((1, None), (1, 0.5), (0, None))
    )
    later = [f"{perplexity('ptb', 6, 'ban+l', generation):.1f}" for generation in (1, 0)]
    text = " ".join(README.split())
    assert (
        f"comes to a test perplexity of {cut[0]}, where its teacher has {cut[1]} and a student of labels alone "
        f"{cut[2]}. On all of it, two epochs, students are behind yet: {summed[0]} and {halves[0]} (half of each term) "
        f"to the teacher's {teacher[0]}; after six they are level, {later[0]} to {later[1]}."
    ) in text
    recipe = " ".join((penn_treebank.__doc__ or "").split())
    assert f"teacher {cut[1]} student of labels alone {cut[2]} student of the sum {cut[0]}" in recipe
    assert (
        f"validation perplexity is {teacher[1]} for the teacher, {halves[1]} with halves, {summed[1]} with the sum."
    ) in recipe


def test_ci_finds_the_test_command() -> None:
    """.ci/run takes the second command from README by its beginning."""
    assert any(line.startswith("pip install -e '.[test]' && pytest") for line in README.splitlines())
