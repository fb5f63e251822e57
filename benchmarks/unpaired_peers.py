"""Flow matching by the library ``torchcfm``, with the settings of its authors' two-dimensional examples.

Its wheel needs nothing but torch and POT to be imported, though it asks for other versions of them: install it by
``pip install --no-deps torchcfm``.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

KINDS = ("torchcfm ot-cfm", "torchcfm cfm")
_SIGMA, _WIDTH, _BATCH, _STEPS = 0.1, 64, 256, 20_000
_TOLERANCE = 1e-4


def is_there() -> bool:
    """Whether torchcfm can be imported."""
    return importlib.util.find_spec("torchcfm") is not None


class TorchCFM(nn.Module):
    """Its matchers, and its multilayer perceptron reading state, the target's condition and time.

    A batch of each table is drawn independently; ``ot-cfm`` couples states within the batch by exact optimal transport
    and takes the conditions along, as the library does with labels.
    """

    def __init__(self, kind: str, seed: int, steps: int = _STEPS) -> None:
        super().__init__()
        from torchcfm.conditional_flow_matching import (
            ConditionalFlowMatcher,
            ExactOptimalTransportConditionalFlowMatcher,
        )
        from torchcfm.models import MLP

        torch.manual_seed(seed)
        self.net = MLP(dim=3, out_dim=2, w=_WIDTH, time_varying=True)
        optimal = kind == KINDS[0]
        self._matcher = (ExactOptimalTransportConditionalFlowMatcher if optimal else ConditionalFlowMatcher)(_SIGMA)
        self._optimal, self._seed, self._steps = optimal, seed, steps

    def fit(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Adam at its default rate; the coupling draws from numpy's global generator, as the library has it."""
        import numpy as np

        np.random.seed(self._seed)
        optimizer = torch.optim.Adam(self.net.parameters())
        for _ in range(self._steps):
            i, j = (torch.randint(len(table[0]), (_BATCH,)) for table in (source, target))
            x0, x1, c = source[0][i], target[0][j], target[1][j]
            if self._optimal:
                t, place, velocity, _, c = self._matcher.guided_sample_location_and_conditional_flow(
                    x0, x1, source[1][i], c
                )
            else:
                t, place, velocity = self._matcher.sample_location_and_conditional_flow(x0, x1)
            loss = (self.net(torch.cat([place, c, t.unsqueeze(-1)], -1)) - velocity).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def forward(self, x: Tensor, c: Tensor, evaluations: int | None = None) -> Tensor:
        """Points (N, 2) at conditions (N, 1) followed to the end by an adaptive solver, as in the library's examples,
        which takes as many evaluations as it needs; there is no other."""
        from torchdiffeq import odeint

        if evaluations is not None:
            raise ValueError(f"evaluations: found {evaluations}, expected None")

        def slope(t: Tensor, y: Tensor) -> Tensor:
            return self.net(torch.cat([y, c, t.expand(len(y), 1)], -1))

        times = torch.tensor([0.0, 1.0])
        return odeint(slope, x, times, rtol=_TOLERANCE, atol=_TOLERANCE, method="dopri5")[-1]
