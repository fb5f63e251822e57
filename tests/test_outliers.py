"""Gross errors in a linear-Gaussian process, against every pattern of errors enumerated."""

import itertools
import math

import pytest
import torch

from pyro_invman.density.normal_rows import NormalRows
from pyro_invman.density.outliers import GrossErrors, outlier_probabilities

M, L = 3, 2
ERRORS = GrossErrors(torch.tensor([0.1, 0.2, 0.05]).double(), torch.zeros(3).double(), torch.full((3,), 8.0).double())


def drawn(tasks: int, rows: int, seed: int, share: float = 0.1, latent: torch.Tensor | None = None):
    """Rows of tasks, their cells, which are seen, and which are gross errors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    task = torch.arange(tasks).repeat_interleave(rows)
    root = 0.4 * torch.eye(M, dtype=torch.float64) + 0.2 * noise(M, M)
    law = NormalRows(
        noise(len(task), M), noise(M, L).expand(len(task), -1, -1), (root @ root.mT).expand(len(task), -1, -1)
    )
    z = noise(tasks, L) if latent is None else latent.expand(tasks, -1)
    answers = law.mean + (law.directions @ z[task].unsqueeze(-1)).squeeze(-1) + noise(len(task), M) @ root.mT
    seen = torch.rand(answers.shape, generator=generator) > 0.2
    wrong = (torch.rand(answers.shape, generator=generator) < share) & seen
    answers = torch.where(wrong, 8 * noise(*answers.shape), answers)
    return law, torch.where(seen, answers, 0.0), seen, task, wrong


def before(tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.eye(L, dtype=torch.float64).repeat(tasks, 1, 1), torch.zeros(tasks, L, dtype=torch.float64)


def enumerated(law: NormalRows, answers: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Probabilities (K, M) for one task, from the joint normal of all its cells under each pattern of errors."""
    wide = law.directions.flatten(0, 1)
    covariance = torch.block_diag(*law.covariance) + wide @ wide.mT
    off, told = (answers - law.mean).flatten(), seen.flatten().nonzero()[:, 0]
    broad, chance = ERRORS.log_prob(answers).flatten(), ERRORS.chance.repeat(len(answers))
    scores, patterns = [], []
    for pattern in itertools.product((False, True), repeat=len(told)):
        wrong = torch.tensor(pattern)
        clean, lost = told[~wrong], told[wrong]
        score = (broad[lost] + chance[lost].log()).sum() + chance[clean].neg().log1p().sum()
        if len(clean):
            normal = torch.distributions.MultivariateNormal(off.new_zeros(len(clean)), covariance[clean][:, clean])
            score = score + normal.log_prob(off[clean])
        scores.append(score)
        patterns.append(wrong)
    found = torch.zeros_like(off)
    found[told] = torch.stack(scores).softmax(0) @ torch.stack(patterns).double()
    return found.reshape(answers.shape)


@pytest.mark.parametrize("seed", range(4))
def test_near_the_probabilities_of_every_pattern_enumerated(seed):
    law, answers, seen, task, _ = drawn(8, 3, seed)
    found = outlier_probabilities(law, answers, seen, task, before(8), ERRORS)
    exact = torch.cat(
        [enumerated(NormalRows(*(p[task == t] for p in law)), answers[task == t], seen[task == t]) for t in range(8)]
    )
    off = (found - exact).abs()[seen]
    assert float(off.mean()) < 0.01
    assert float((off > 0.2).double().mean()) < 0.03


def test_a_cell_alone_is_judged_by_bayes_rule():
    law = NormalRows(torch.zeros(1, 1).double(), torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double())
    errors = GrossErrors(*torch.tensor([[0.1], [0.0], [5.0]], dtype=torch.float64))
    prior = torch.ones(1, 1, 1).double(), torch.zeros(1, 1).double()
    found = outlier_probabilities(
        law, torch.tensor([[2.5]]).double(), torch.ones(1, 1).bool(), torch.zeros(1).long(), prior, errors
    )
    clean, wrong = (s * math.exp(-0.5 * (2.5 / d) ** 2) / d for s, d in ((0.9, 1.0), (0.1, 5.0)))
    assert float(found) == pytest.approx(wrong / (clean + wrong), rel=1e-9)


def test_probabilities_are_calibrated():
    errors = GrossErrors(torch.full((M,), 0.1).double(), *ERRORS[1:])
    law, answers, seen, task, wrong = drawn(300, 10, 7)
    found, hit = outlier_probabilities(law, answers, seen, task, before(300), errors)[seen], wrong[seen].double()
    for low, high in ((0.0, 0.1), (0.1, 0.9), (0.9, 1.0)):
        inside = (found >= low) & (found <= high)
        assert float(found[inside].mean()) == pytest.approx(float(hit[inside].mean()), abs=0.06)
    auroc = (found[hit > 0].unsqueeze(-1) > found[hit == 0]).double().mean()
    assert float(auroc) > 0.93


def test_a_task_far_out_is_not_made_of_outliers():
    law, answers, seen, task, _ = drawn(20, 10, 3, share=0.0, latent=torch.tensor([[5.0, -5.0]]).double())
    found = outlier_probabilities(law, answers, seen, task, before(20), ERRORS)
    assert float((found[seen] > 0.5).double().mean()) < 0.02


def test_tasks_are_judged_apart_and_in_any_order():
    law, answers, seen, task, _ = drawn(5, 4, 2)
    together = outlier_probabilities(law, answers, seen, task, before(5), ERRORS)
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(0))
    turned = outlier_probabilities(
        NormalRows(*(p[order] for p in law)), answers[order], seen[order], task[order], before(5), ERRORS
    )
    torch.testing.assert_close(turned, together[order])
    one = task == 2
    alone = outlier_probabilities(
        NormalRows(*(p[one] for p in law)), answers[one], seen[one], torch.zeros(4).long(), before(1), ERRORS
    )
    torch.testing.assert_close(alone, together[one], atol=2e-3, rtol=0)


def test_what_is_not_seen_or_cannot_be_wrong_is_no_outlier():
    law, answers, seen, task, _ = drawn(5, 4, 2)
    errors = GrossErrors(torch.tensor([0.1, 0.0, 0.1]).double(), *ERRORS[1:])
    found = outlier_probabilities(law, torch.where(seen, answers, 1e3), seen, task, before(5), errors)
    assert bool((found[~seen] == 0).all()) and bool((found[:, 1] == 0).all())
    none = outlier_probabilities(NormalRows(*(p[:0] for p in law)), answers[:0], seen[:0], task[:0], before(1), ERRORS)
    assert none.shape == (0, M)
