r"""What is known of a process, or of how it was recorded, besides the rows.

A *mechanism* says which cells go unrecorded by what they would have shown, p(observed | values). A *simulator* says
what some variables are given others, p(targets | given). Both are Pyro functions of a row, with one sample site for
each variable they speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_invman.variables import DataError, Variables

Row = Mapping[str, Tensor]


@dataclass(frozen=True)
class Simulator:
    """The known law p(targets | given) of some variables, or draws from it.

    The targets depend on nothing else of the row once these are given.

    Arguments:
        function: of a mapping of the givens' names to tensors (B,) in natural units. Either a Pyro function with a
            sample site of shape (B,) for each target, by its name, whose density is then known too; or any function
            that returns such a mapping of draws of the targets.
        given: names of what it needs.
        targets: names of what it gives.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def law(row):
        ...     pyro.sample("depth_um", dist.Normal(6 * row["power_W"], 5.0))
        >>> Simulator(law, given=["power_W"], targets=["depth_um"]).targets
        ('depth_um',)
    """

    function: Callable[[Row], Any]
    given: Sequence[str]
    targets: Sequence[str]

    def __post_init__(self) -> None:
        for field in ("given", "targets"):
            names = getattr(self, field)
            object.__setattr__(self, field, (names,) if isinstance(names, str) else tuple(names))
        if not self.given or not self.targets or set(self.given) & set(self.targets):
            raise DataError(
                f"simulator: found given {list(self.given)} and targets {list(self.targets)}; expected two sets of "
                "names without a common one"
            )

    def columns(self, variables: Variables) -> tuple[list[int], list[int]]:
        """Of the givens, and of the targets."""
        return variables.indices(self.given), variables.indices(self.targets)

    def draw(self, variables: Variables, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of the targets (B, T) for natural rows (B, D) with all givens known."""
        row = {name: rows[:, variables.index(name)] for name in self.given}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            trace = pyro.poutine.trace(self.function).get_trace(row)
        returned = trace.nodes["_RETURN"]["value"]
        sites = {name: trace.nodes[name]["value"] for name in self.targets if name in trace.nodes}
        if not sites and isinstance(returned, Mapping):
            sites = dict(returned)
        drawn = []
        for name in self.targets:
            if name not in sites:
                raise DataError(
                    f"simulator: no draw of {name}; expected a sample site of that name, or a mapping with it returned"
                )
            value = torch.as_tensor(sites[name]).to(rows)
            if value.shape != rows.shape[:1]:
                raise DataError(
                    f"simulator: draws of {name} have shape {tuple(value.shape)}, expected {tuple(rows.shape[:1])}, "
                    "one for each row"
                )
            bad = ~variables[variables.index(name)].constraint.check(value) | ~value.isfinite()
            if bool(bad.any()):
                raise DataError(f"simulator: found {name} = {value[bad][0].item():g}, outside its support")
            drawn.append(value)
        return torch.stack(drawn, -1)

    def log_prob(self, variables: Variables, rows: Tensor) -> Tensor | None:
        """log p(targets | given) (B,) of complete natural rows (B, D); None where only draws are to be had."""
        given = {name: rows[:, variables.index(name)] for name in self.given}
        data = {name: rows[:, variables.index(name)] for name in self.targets}
        sites = _sites(self.function, given, data)
        return None if set(sites) != set(self.targets) else _total(sites, "simulator", len(rows))


def log_recorded(
    mechanism: Callable[[Row], Any], variables: Variables, rows: Tensor, observed: Tensor, names: Sequence[str]
) -> Tensor:
    """log p(observed | values) (B,) of complete natural rows (B, D), for the variables `names` that it speaks of."""
    row = {name: rows[:, j] for j, name in enumerate(variables.names)}
    data = {name: observed[:, variables.index(name)].to(rows) for name in names}
    return _total(_sites(mechanism, row, data), "mechanism", len(rows))


def spoken_of(mechanism: Callable[[Row], Any], variables: Variables, rows: Tensor) -> tuple[str, ...]:
    """Names of the variables whose being recorded a mechanism speaks of, by complete natural rows (B, D).

    Raises:
        DataError: no sample site, or one that is no variable, or whose values are not 0 and 1.
    """
    row = {name: rows[:, j] for j, name in enumerate(variables.names)}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        trace = pyro.poutine.trace(mechanism).get_trace(row)
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample" and not _is_plate(site)]
    if not sites:
        raise DataError("mechanism: found no sample site; expected one for each variable that may go unrecorded")
    for name in sites:
        variables.index(name)
        value = torch.as_tensor(trace.nodes[name]["value"])
        if bool(((value != 0) & (value != 1)).any()):
            raise DataError(
                f"mechanism: site {name} drew {value.flatten()[0].item():g}; expected a Bernoulli law, 1 where {name} "
                "is recorded"
            )
    return tuple(sites)


def _sites(function: Callable[[Row], Any], row: Row, data: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sample sites of a Pyro function with the values of `data`, and their log-densities."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        trace = pyro.poutine.trace(pyro.poutine.condition(function, data=dict(data))).get_trace(row)
        trace.compute_log_prob()
    return {n: site for n, site in trace.nodes.items() if site["type"] == "sample" and not _is_plate(site)}


def _is_plate(site: Mapping[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _total(sites: Mapping[str, Any], what: str, rows: int) -> Tensor:
    parts = []
    for name, site in sites.items():
        found = site["log_prob"]
        if found.shape != (rows,):
            raise DataError(
                f"{what}: site {name} has log-densities of shape {tuple(found.shape)}, expected {(rows,)}, one a row"
            )
        if bool(found.isnan().any()):
            raise DataError(f"{what}: site {name} has a log-density that is not a number")
        parts.append(found)
    return torch.stack(parts).sum(0)
