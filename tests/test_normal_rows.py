"""Rows given settings and latent, against the joint normal of all their cells."""

import torch
from torch.distributions import MultivariateNormal

from pyro_invman.density.normal_rows import NormalRows

F64 = torch.float64


def drawn(rows: int = 3, observations: int = 2, latent: int = 2):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    root = noise(rows, observations, observations)
    law = NormalRows(noise(rows, observations), noise(rows, observations, latent), root @ root.mT + torch.eye(2))
    loc, spread = noise(1, latent), noise(latent, latent)
    covariance = spread @ spread.mT + torch.eye(latent)
    precision = torch.linalg.inv(covariance).unsqueeze(0)
    before = precision, (precision @ loc.unsqueeze(-1)).squeeze(-1)
    return law, loc[0], covariance, before, noise(rows, observations)


def joint(law: NormalRows, loc: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = law.directions.flatten(0, 1)
    mean = law.mean.flatten() + wide @ loc
    return mean, torch.block_diag(*law.covariance) + wide @ covariance @ wide.mT


def test_evidence_and_belief_are_those_of_the_joint_normal():
    law, loc, covariance, before, answers = drawn()
    heard = torch.tensor([[True, True], [False, True], [True, False]])
    task, residual = torch.zeros(3, dtype=torch.long), torch.where(heard, answers - law.mean, 0.0)
    mean, together = joint(law, loc, covariance)
    told = heard.flatten()
    exact = MultivariateNormal(mean[told], together[told][:, told]).log_prob(answers.flatten()[told])
    torch.testing.assert_close(law.log_evidence(residual, heard, task, before)[0], exact)
    across = covariance @ law.directions.flatten(0, 1)[told].mT
    gain = across @ torch.linalg.inv(together[told][:, told])
    found = law.weighed(residual, heard, task, before)
    after = torch.linalg.inv(found.precision[0])
    torch.testing.assert_close(after, covariance - gain @ across.mT)
    torch.testing.assert_close(after @ found.shift[0], loc + gain @ (answers.flatten() - mean)[told])


def test_nothing_heard_says_nothing():
    law, _, _, before, answers = drawn()
    heard, task = torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(
        law.log_evidence(torch.zeros_like(answers), heard, task, before), torch.zeros(1, dtype=F64)
    )
    found = law.weighed(torch.zeros_like(answers), heard, task, before)
    torch.testing.assert_close((found.precision, found.shift), before)


def test_an_instrument_shows_a_linear_map_with_noise_of_its_own():
    law, loc, covariance, _, _ = drawn()
    generator = torch.Generator().manual_seed(1)
    bias, gain, noise = torch.randn(3, 3, 2, generator=generator, dtype=F64)
    mean, together = joint(law.through(bias, gain, noise), loc, covariance)
    of_process, by_process = joint(law, loc, covariance)
    turn = gain.flatten()
    torch.testing.assert_close(mean, bias.flatten() + turn * of_process)
    torch.testing.assert_close(together, turn.unsqueeze(-1) * turn * by_process + noise.square().flatten().diag())
