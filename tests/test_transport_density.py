"""Densities of what a map makes: the flow between two Gaussians, whose density and volume are closed forms, followed
with the exact divergence and with the stochastic one."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_invman as pim
from pyro_invman.density.velocity import Solver, VelocityField

F64 = torch.float64
S0 = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.8, -0.2], [0.0, -0.2, 0.6]], dtype=F64)
S1 = torch.tensor([[0.3, -0.2, 0.1], [-0.2, 1.5, 0.4], [0.1, 0.4, 2.0]], dtype=F64)
LENGTH = torch.tensor([2.0, 0.5, 1.0], dtype=F64)
NONE = torch.zeros(0, dtype=F64)
EXACT, STOCHASTIC = Solver(tolerance=1e-7), Solver(tolerance=1e-7, divergence="stochastic")


class Between(VelocityField):
    """What flow matching learns from independent draws of N(0, S0) and N(0, S1):
    v = (t S1 − (1 − t) S0) ((1 − t)² S0 + t² S1)⁻¹ x, whose flow takes the one law to the other."""

    def __init__(self) -> None:
        super().__init__(3, 0, width=4)

    def forward(self, t: Tensor, x: Tensor, c: Tensor) -> Tensor:
        slope = (t * S1 - (1 - t) * S0) @ torch.linalg.inv((1 - t) ** 2 * S0 + t**2 * S1)
        return x @ slope.mT


@pytest.fixture
def transport() -> pim.ConditionalTransport:
    """From N(0, S0) to N(0, S1) in units of LENGTH."""
    found = pim.ConditionalTransport(3, 0, engine="batch").double()
    found.length.copy_(LENGTH)
    found.fields[0] = Between()
    return found


def normal(covariance: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(torch.zeros(3, dtype=F64), covariance * torch.outer(LENGTH, LENGTH))


def pushed(transport: pim.ConditionalTransport, solver: Solver) -> dist.TransformedDistribution:
    return dist.TransformedDistribution(normal(S0), [transport.condition(NONE, solver)])


POINTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def test_the_exact_density_is_the_gaussians(transport: pim.ConditionalTransport) -> None:
    torch.testing.assert_close(
        pushed(transport, EXACT).log_prob(POINTS), normal(S1).log_prob(POINTS), atol=1e-5, rtol=0
    )
    go = transport.condition(NONE, EXACT)
    volume = (S1.logdet() - S0.logdet()) / 2  # the map is linear, and takes one covariance to the other
    torch.testing.assert_close(go.log_abs_det_jacobian(POINTS, POINTS), volume.expand(4), atol=1e-5, rtol=0)


def test_the_stochastic_density_is_unbiased(transport: pim.ConditionalTransport) -> None:
    """The mean over 3,000 probes lies within 4.5 of its standard errors, of density and volume, there and back."""
    rough, number = pushed(transport, STOCHASTIC), 3000
    for point in POINTS[:2]:
        many = point.expand(number, 3)
        scores = rough.log_prob(many)
        assert scores.std() > 0.1  # the probes do differ: a field that turns and shears
        assert abs(scores.mean() - normal(S1).log_prob(point)) < 4.5 * scores.std() / number**0.5
        go = transport.condition(NONE, STOCHASTIC)
        for each, sign in ((go, 1), (go.inv, -1)):
            volume = each.log_abs_det_jacobian(many, each(many))
            exact = sign * (S1.logdet() - S0.logdet()) / 2
            assert abs(volume.mean() - exact) < 4.5 * volume.std() / number**0.5
    # where points go has nothing to do with the probes
    torch.testing.assert_close(go(POINTS), transport.condition(NONE, EXACT)(POINTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["optimal", "base", "batch"])
def test_the_stochastic_volume_of_a_bent_map_is_unbiased(engine: str) -> None:
    found = pim.ConditionalTransport(3, 1, engine=engine, width=16).double()
    torch.manual_seed(2)
    for parameter in found.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    c, x, number = torch.tensor([0.4], dtype=F64), POINTS[0], 3000
    fixed = Solver("midpoint", 20)
    exact = found.condition(c, fixed).log_abs_det_jacobian(x, x)
    volume = found.condition(c, fixed._replace(divergence="stochastic")).log_abs_det_jacobian(x.expand(number, 3), x)
    assert volume.std() > 1e-3
    assert abs(volume.mean() - exact) < 4.5 * volume.std() / number**0.5
    volume.mean().backward()
    gradients = [p.grad for field in found.fields for p in field.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_rows_that_are_lost_do_not_disturb_the_others() -> None:
    found = pim.ConditionalTransport(2, 0, engine="batch", width=16)
    rows = torch.tensor([[0.3, -0.2], [torch.nan, 0.0], [torch.inf, 1.0], [0.5, 1.0]])
    go = found.condition(torch.zeros(4, 0))
    for values in (go(rows), go.inv(rows), go.log_abs_det_jacobian(rows, rows)):
        assert values.isnan().reshape(4, -1).any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(4, 1), (4, 3), ()])
def test_points_of_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    go = pim.ConditionalTransport(2, 0, engine="batch", width=16).condition(torch.zeros(0))
    for name, way in (("x", go), ("y", go.inv)):
        with pytest.raises(pim.DataError, match=f"{name}: shape .*expected 2 in the last dimension"):
            way(torch.zeros(shape))
