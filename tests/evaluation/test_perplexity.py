"""Perplexity by its definition, and a vote of language models from one number a token and member."""

import math

import pytest
import torch

from ban_fast.evaluation import joint_log_probabilities, perplexity_metrics


def test_by_the_definition() -> None:
    assert perplexity_metrics(torch.log(torch.tensor([0.5, 0.125]))) == pytest.approx(
        {"perplexity": 4.0, "nll": math.log(4)}
    )
    certain = perplexity_metrics(torch.zeros(3, dtype=torch.float64))
    assert certain == {"perplexity": 1.0, "nll": 0.0}


def test_a_joint_distribution_is_the_mean_of_distributions() -> None:
    """Also where members all but rule a token out, whose probabilities are no float's."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (50,), generator=generator)
    members = [torch.randn(50, 9, generator=generator, dtype=torch.float64).softmax(1) for _ in range(3)]
    own = [member.gather(1, tokens[:, None])[:, 0].log() for member in members]
    mean = torch.stack(members).mean(0).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(joint_log_probabilities(own).exp(), mean)
    far = [torch.tensor([-2000.0]), torch.tensor([-2001.0])]
    expected = -2000 + math.log1p(math.exp(-1)) - math.log(2)
    assert joint_log_probabilities(far).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "values", [torch.zeros(0), torch.zeros(2, 2), torch.full((3,), -701.0), torch.tensor([math.nan])]
)
def test_what_has_no_perplexity(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \[N\]|has no perplexity"):
        perplexity_metrics(values)
