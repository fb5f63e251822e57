r"""How much variables say about each other, by a model's own word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

_AT_ONCE = 4096


class MutualInformation(NamedTuple):
    """An estimate in nats, and the standard error of drawing finitely many rows."""

    value: float
    std_error: float


def mutual_information(
    conditional: Callable[[Sequence[str], Mapping[str, Any]], Distribution],
    a: Sequence[str],
    b: Sequence[str],
    given: Sequence[str],
    num_samples: int,
    seed: int,
) -> MutualInformation:
    r"""I(a; b | given) of the law whose conditionals `conditional` gives, by draws from it:

    .. math:: I(a; b \mid g) = E_{g, b, a}\left[\log p(a \mid b, g) - \log p(a \mid g)\right].
    """
    parts = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, num_samples, _AT_ONCE):
            number = min(_AT_ONCE, num_samples - start)
            known: dict[str, Tensor] = {}
            if given:
                known = dict(zip(given, conditional(given, {}).sample(torch.Size((number,))).unbind(-1), strict=True))
            shape = torch.Size(() if known else (number,))
            rest = dict(zip(b, conditional(b, known).sample(shape).unbind(-1), strict=True))
            informed, alone = conditional(a, known | rest), conditional(a, known)
            value = informed.sample()
            parts.append(informed.log_prob(value) - alone.log_prob(value))
    gain = torch.cat(parts).double()
    return MutualInformation(float(gain.mean()), float(gain.std() / len(gain) ** 0.5))
