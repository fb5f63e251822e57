"""What rows say beyond the latent: beside the Gaussian process that it is."""

import pytest
import torch

from pyro_invman.density.random_functions import RandomFunctions
from pyro_invman.density.remainder import Remainder, drawn


@pytest.fixture(scope="module")
def tasks():
    generator = torch.Generator().manual_seed(0)
    s = 4 * torch.rand(300, 1, generator=generator, dtype=torch.float64) - 2
    task = torch.arange(300) // 15
    phase, size = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    bent = torch.sin(2 * s[:, 0] + phase[task]) * (1 + 0.3 * size[task])
    y = torch.stack([bent, 0.5 * bent + 0.3 * s[:, 0]], -1)
    return s, y + 0.1 * torch.randn(y.shape, generator=generator, dtype=torch.float64), task


@pytest.fixture(scope="module")
def functions(tasks):
    return RandomFunctions.fitted(*tasks, latent_dim=1)


def _told(x):
    return torch.ones_like(x, dtype=torch.bool)


def _joint(functions, s):
    """Covariance (M, N, N) of rows of a task given its latent."""
    rows = functions.features(s, _told(s))
    left = functions.left_over(rows, rows)
    return rows, left + torch.diag_embed(rows.scale.square() - left.diagonal(dim1=-2, dim2=-1))


def test_it_is_the_conditional_of_a_gaussian_process(functions, tasks):
    s, y, _ = tasks
    known, new = slice(0, 10), slice(10, 15)
    remainder = Remainder(functions, s[known], _told(s[known]), y[known], _told(y[known]))
    found = remainder.anchor(s[new], _told(s[new]))
    rows, covariance = _joint(functions, s[:15])
    gain = torch.linalg.solve(covariance[:, known, known], covariance[:, known, new]).mT
    mean = rows.mean[:, new] + (gain @ (y.mT[:, known] - rows.mean[:, known]).unsqueeze(-1)).squeeze(-1)
    spread = covariance[:, new, new] - gain @ covariance[:, known, new]
    directions = rows.directions[:, new] - gain @ rows.directions[:, known]
    torch.testing.assert_close(found.mean, mean.mT)
    torch.testing.assert_close(found.scale.square(), spread.diagonal(dim1=-2, dim2=-1).mT)
    torch.testing.assert_close(found.directions, directions.transpose(0, 1))
    assert (found.scale < functions.anchor(s[new], _told(s[new])).scale).all()


def test_a_sequence_multiplies_to_the_joint_density(functions, tasks):
    s, y, _ = (part[:12] for part in tasks)
    seen = _told(y)
    seen[3, 0] = seen[7] = False
    latent = torch.tensor([0.7], dtype=torch.float64)
    anchor = Remainder(functions, s, _told(s), y, seen).sequence()
    each = torch.distributions.Normal(anchor.mean + (anchor.directions @ latent), anchor.scale).log_prob(y)
    rows, covariance = _joint(functions, s)
    for q in range(2):
        here = seen[:, q]
        whole = torch.distributions.MultivariateNormal(
            (rows.mean[q] + rows.directions[q] @ latent)[here], covariance[q][here][:, here]
        )
        torch.testing.assert_close(each[here, q].sum(), whole.log_prob(y[here, q]))


def test_tasks_together_are_tasks_one_by_one(functions, tasks):
    s, y = tasks[0][:30].reshape(2, 15, 1), tasks[1][:30].reshape(2, 15, 2)
    known, new = (slice(None), slice(0, 10)), (slice(None), slice(10, 15))
    found = Remainder(functions, s[known], _told(s[known]), y[known], _told(y[known])).anchor(s[new], _told(s[new]))
    for t, (a, b) in enumerate(zip(s, y, strict=True)):
        one = Remainder(functions, a[:10], _told(a[:10]), b[:10], _told(b[:10]))
        for left, right in zip(found, one.anchor(a[10:], _told(a[10:])), strict=True):
            torch.testing.assert_close(left[t], right)
        alone = one.anchor(a[10], _told(a[10]))
        torch.testing.assert_close(alone.mean, found.mean[t, 0])


def test_an_unseen_or_unreadable_row_says_nothing(functions, tasks):
    s, y, _ = tasks
    nothing = Remainder(functions, s[:5], _told(s[:5]), y[:5], ~_told(y[:5]))
    lacking = Remainder(functions, s[:5], ~_told(s[:5]), y[:5], _told(y[:5]))
    for remainder in (nothing, lacking):
        for left, right in zip(
            remainder.anchor(s[5:9], _told(s[5:9])), functions.anchor(s[5:9], _told(s[5:9])), strict=True
        ):
            torch.testing.assert_close(left, right)


def test_draws_have_the_covariance_of_rows(functions, tasks):
    s = tasks[0][:6]
    anchor = drawn(functions, s, _told(s), (40_000, 6), torch.Generator().manual_seed(0))
    rows, covariance = _joint(functions, s)
    for q in range(2):
        values = anchor.mean[..., q] + anchor.scale[..., q] * torch.randn(40_000, 6, dtype=torch.float64)
        torch.testing.assert_close(values.mean(0), rows.mean[q], atol=0.02, rtol=0)
        torch.testing.assert_close(torch.cov(values.mT), covariance[q], atol=0.02, rtol=0.05)


def test_it_is_differentiable_in_the_settings(functions, tasks):
    s, y, _ = (part[:6] for part in tasks)
    remainder = Remainder(functions, s, _told(s), y, _told(y))
    at = torch.tensor([[0.3], [1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: remainder.anchor(t, _told(t)), (at,))
