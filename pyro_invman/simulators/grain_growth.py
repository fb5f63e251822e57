r"""Annealing of metal sections: grain size and hardness before and after, each from specimens that are cut up for it.

Grains grow by :math:`d_1^2 = d_0^2 + 2\, k_0\, e^{-Q / R T}\, t` and stored deformation recovers by
:math:`s_1 = s_0\, e^{-r(T)\, t}`; hardness follows Hall and Petch, :math:`H = H_0 + k / \sqrt d + s`. Nobody sees one
specimen twice, but here both are known, so that a map learned from unpaired sections can be held against the truth.

References:
    Burke & Turnbull, *Recrystallization and grain growth*, Progress in Metal Physics 1952.
    Hall, *The deformation and ageing of mild steel: III*, Proc. Phys. Soc. B 1951.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAS = 8.314  # J / (mol K)
HOURS = 1.0
GROWTH, GROWTH_ENERGY = 1.2e12, 2.2e5  # um^2 / h, J / mol
RECOVERY, RECOVERY_ENERGY = 3.0e5, 1.1e5  # 1 / h, J / mol
HARDNESS, PETCH = 60.0, 180.0  # HV, HV um^0.5
COLDEST, HOTTEST = 900.0, 1200.0  # K


def unannealed(number: int, generator: torch.Generator) -> Tensor:
    """Grain size (um) and hardness (HV) of `number` specimens as rolled, (N, 2)."""
    size = 15 * torch.exp(0.3 * torch.randn(number, generator=generator))
    stored = 50 * torch.exp(0.35 * torch.randn(number, generator=generator))
    return torch.stack([size, HARDNESS + PETCH / size.sqrt() + stored], -1)


def annealed(before: Tensor, temperature: Tensor) -> Tensor:
    """What each of those specimens (N, 2) becomes after an hour at `temperature` (N,), in K."""
    size, hardness = before.unbind(-1)
    stored = hardness - HARDNESS - PETCH / size.sqrt()
    growth = 2 * GROWTH * torch.exp(-GROWTH_ENERGY / (GAS * temperature)) * HOURS
    grown = (size.square() + growth).sqrt()
    left = stored * torch.exp(-RECOVERY * torch.exp(-RECOVERY_ENERGY / (GAS * temperature)) * HOURS)
    return torch.stack([grown, HARDNESS + PETCH / grown.sqrt() + left], -1)


def simulate(number: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sections before and sections after, `number` of each from different specimens.

    Returns:
        states (N, 2) and planned temperatures (N, 1) of the specimens cut before annealing, and the same of those cut
        after it.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (unannealed(number, generator) for _ in range(2))
    plans = [COLDEST + (HOTTEST - COLDEST) * torch.rand(number, generator=generator) for _ in range(2)]
    return (first, plans[0].unsqueeze(-1)), (annealed(second, plans[1]), plans[1].unsqueeze(-1))
