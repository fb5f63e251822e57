"""Flows against closed forms: linear fields, Gaussians; solvers by their orders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_invman.density.velocity import (
    Solver,
    VelocityField,
    exact_divergence,
    flow,
    matching_loss,
    stochastic_divergence,
    stratified,
)
from pyro_invman.variables import DataError

MATRIX = torch.tensor([[0.3, -1.1], [0.8, -0.5]], dtype=torch.double)


def linear(t: Tensor, x: Tensor) -> Tensor:
    return x @ MATRIX.mT


def bent(seed: int = 0, event_dim: int = 3) -> VelocityField:
    torch.manual_seed(seed)
    field = VelocityField(event_dim, 2, width=16).double()
    for parameter in field.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return field


def test_new_field_is_zero() -> None:
    assert VelocityField(2, 1)(torch.tensor(0.3), torch.randn(5, 2), torch.randn(5, 1)).abs().max() == 0


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Solver(tolerance=1e-9), 1e-8),
        (Solver("adams", 400), 1e-4),
        (Solver("midpoint", 400), 1e-4),
        (Solver("euler", 4000), 1e-3),
    ],
)
def test_linear_field(solver: Solver, tolerance: float, volume: bool) -> None:
    x = torch.randn(7, 2, dtype=torch.double)
    exact = x @ torch.linalg.matrix_exp(MATRIX).mT
    end, change = flow(linear, x, solver, volume=volume)
    assert (end - exact).abs().max() < tolerance
    assert (change - (MATRIX.trace() if volume else 0.0)).abs().max() < tolerance
    back, undone = flow(linear, exact, solver, backwards=True, volume=volume)
    assert (back - x).abs().max() < 2 * tolerance
    assert (undone + change).abs().max() < tolerance


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("adams", 2)])
def test_order_of_solvers(method: str, order: int) -> None:
    x = torch.randn(50, 2, dtype=torch.double)
    exact = x @ torch.linalg.matrix_exp(MATRIX).mT
    errors = [(flow(linear, x, Solver(method, n))[0] - exact).norm() for n in (40, 80)]  # type: ignore[arg-type]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("method", "number"), [("euler", 1), ("midpoint", 2), ("adams", 2), ("adams", 10)])
def test_evaluations_are_counted(method: str, number: int) -> None:
    calls = []
    flow(lambda t, x: calls.append(t) or x, torch.ones(1, 1), Solver(method, number).checked())  # type: ignore[arg-type, func-returns-value]
    assert len(calls) == number


@pytest.mark.parametrize(
    "solver",
    [
        Solver("rk4"),  # type: ignore[arg-type]
        Solver("adams", 1),
        Solver("midpoint", 5),
        Solver("euler", 0),
        Solver(tolerance=0.0),
        Solver(divergence="none"),  # type: ignore[arg-type]
    ],
)
def test_solver_refuses(solver: Solver) -> None:
    with pytest.raises(DataError, match="expected"):
        solver.checked()


def test_divergence_against_autograd() -> None:
    field, c = bent(), torch.randn(4, 2, dtype=torch.double)
    x, t = torch.randn(4, 3, dtype=torch.double), torch.tensor(0.4, dtype=torch.double)
    values, divergence = exact_divergence(lambda t, place: field(t, place, c), t, x)
    assert torch.allclose(values, field(t, x, c))
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda place, i=i: field(t, place, c[i]), x[i])
        assert divergence[i].item() == pytest.approx(jacobian.trace().item(), abs=1e-10)


def test_stochastic_divergence_is_unbiased() -> None:
    field, c = bent(), torch.randn(2, dtype=torch.double)
    x, t = torch.randn(3, dtype=torch.double).expand(20_000, 3), torch.tensor(0.4, dtype=torch.double)

    def velocity(t: Tensor, place: Tensor) -> Tensor:
        return field(t, place, c)

    probe = torch.empty_like(x).bernoulli_(0.5) * 2 - 1
    estimate = stochastic_divergence(velocity, t, x, probe)[1]
    exact = exact_divergence(velocity, t, x[:1])[1].item()
    assert abs(estimate.mean().item() - exact) < 4.5 * (estimate.std() / 20_000**0.5).item()


def test_stochastic_volume_is_exact_for_a_diagonal_field() -> None:
    rates = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)
    change = flow(
        lambda t, x: rates * x, torch.randn(4, 3, dtype=torch.double), Solver(divergence="stochastic"), volume=True
    )[1]
    assert (change - rates.sum()).abs().max() < 1e-6


def test_matching_loss_at_its_least() -> None:
    r"""From N(0, 1) to N(m, s²) the best field is known, and what it leaves is the variance of x1 − x0 given x_t."""
    m, s = 1.5, 0.4

    class Best(VelocityField):
        def forward(self, t: Tensor, x: Tensor, c: Tensor) -> Tensor:
            t = t.unsqueeze(-1)
            return m + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * (x - t * m)

    t = torch.linspace(0, 1, 100_001, dtype=torch.double)
    left = 1 + s**2 - (t * s**2 - (1 - t)) ** 2 / ((1 - t) ** 2 + t**2 * s**2)
    generator, number = torch.Generator().manual_seed(0), 400_000
    start, end = torch.randn(number, 1), m + s * torch.randn(number, 1)
    found = matching_loss(Best(1, 0), start, end, torch.zeros(number, 0), generator)
    assert found.item() == pytest.approx(left.mean().item(), rel=0.01)


def test_times_are_stratified() -> None:
    times = stratified(100, torch.Generator().manual_seed(0)).sort().values
    assert torch.equal((times * 100).floor(), torch.arange(100.0))
