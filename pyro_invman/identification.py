"""What a question asks that the data do not say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pyro_invman.density.links import Links
from pyro_invman.variables import Variables


class UnidentifiedConditional(UserWarning):
    """A conditional relates variables that no row shows together."""


def warn_of_unlinked(
    variables: Variables,
    links: Links | None,
    targets: Sequence[int],
    given: Sequence[int],
    beside: str | None = None,
    stacklevel: int = 3,
) -> None:
    """Says which `targets` were never measured together with which other targets and given columns, and what is then
    assumed (:class:`UnidentifiedConditional`); `beside` names what everything is given besides."""
    if links is None:
        return
    said = []
    graph = links.linked.tolist()
    for position, target in enumerate(targets):
        for other in [*given, *targets[:position]]:
            if graph[target][other]:
                continue
            names = [variables[c].name for c in links.between(target, other) or ()] + ([beside] if beside else [])
            a, b = variables[target].name, variables[other].name
            if names:
                said.append(f"{a} and {b} are taken to be independent given {' and '.join(names)}")
            elif other in given:
                said.append(f"{b} is ignored for {a}")
            else:
                said.append(f"{a} and {b} are taken to be independent")
    if said:
        warnings.warn(
            f"no row shows these together: {'; '.join(said)}. Only rows that show both would tell",
            UnidentifiedConditional,
            stacklevel=stacklevel,
        )
