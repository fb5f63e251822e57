r"""Monte-Carlo expectation–maximisation: missing cells are drawn from the model, and the completed rows learned from.

Questions to observed cells alone are answered rightly where cells are missing completely at random. Where whether a
cell is missing depends on what was observed, rows that show it are a biased choice; completed by *draws* from
p(missing | observed), never by means, they are not. What is declared of the process or its records weights the draws,

.. math:: w_s \propto p(\text{mask} \mid v_s)\,
    \frac{p(y \mid x_s)\, p(x_s \mid \text{rest})}{q(x_s \mid y, \text{rest})},
    \qquad v_s \sim q(\text{missing} \mid \text{observed}),

and they are resampled by weight.

References:
    Wei & Tanner, *A Monte Carlo implementation of the EM algorithm and the poor man's data augmentation algorithms*,
        JASA 1990.
    Little & Rubin, *Statistical analysis with missing data*, 2019.
    Kim & Yu, *A semiparametric estimation of mean functionals with nonignorable missing data*, JASA 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.declared import Row, Simulator, log_recorded, spoken_of
from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.training import Record
from pyro_invman.variables import DataError, Standardization, Variables

_AT_ONCE = 16_384  # rows a block of draws, which bounds memory
_SETTLING, _SETTLED = 30, 2e-3  # rounds of the Gaussian base alone, and a move that ends them


class Completion(NamedTuple):
    """How missing cells are drawn and learned from.

    `rounds` at most; `steps` of training in each (None: a third of those before); `proposals` for each row that are
    weighted, where something is declared; `false_alarm` of the test whether the mask depends on observed values.
    """

    rounds: int = 6
    steps: int | None = None
    proposals: int = 32
    false_alarm: float = 0.01


class Completed(NamedTuple):
    """Draws of completed working rows (M, N, D), the logarithm of their mean weight (N,), and the effective number of
    proposals (N,), NaN where none was weighted."""

    rows: Tensor
    log_weight: Tensor
    effective: Tensor


class Round(NamedTuple):
    """One expectation and maximisation: the records of its training, log p(observed cells) of held-out rows in nats a
    row, whether its weights were kept, and the mean and smallest effective number of proposals (NaN where none was
    weighted)."""

    records: list[Record]
    evidence: float
    kept: bool
    effective: float
    smallest: float


class Completer:
    """Completes rows by draws from a flow, and what is declared besides.

    Arguments:
        density, standardization, variables: of the joint flow.
        mechanism: which cells are recorded, given all (:mod:`pyro_invman.declared`).
        simulator: of some variables given others.
        proposals: for each row that is weighted.
        like: some natural rows (B, D), to find out what the mechanism speaks of.

    Raises:
        DataError: what is declared speaks of no variable, or not as it should.
    """

    def __init__(
        self,
        density: AnyOrderFlow,
        standardization: Standardization,
        variables: Variables,
        mechanism: Callable[[Row], Any] | None,
        simulator: Simulator | None,
        proposals: int,
        like: Tensor,
    ) -> None:
        self.density, self.standardization, self.variables = density, standardization, variables
        self.mechanism, self.simulator, self.proposals = mechanism, simulator, proposals
        self.recorded: tuple[str, ...] = ()
        self.learned_from_recorded = False
        like = standardization.inverse(density.complete(self._working(like), torch.Generator().manual_seed(0)).double())
        if mechanism is not None:
            self.recorded = spoken_of(mechanism, variables, like)
            log_recorded(mechanism, variables, like, torch.ones_like(like), self.recorded)
        if simulator is not None:
            simulator.draw(variables, like, torch.Generator().manual_seed(0))
            self._has_density = simulator.log_prob(variables, like) is not None

    @property
    def declared(self) -> bool:
        """Whether anything but the rows is known."""
        return self.mechanism is not None or self.simulator is not None

    @property
    def counts_what_is_declared(self) -> bool:
        """Whether the evidence has the declared laws in it; of a simulator that only draws it has not."""
        return self.simulator is None or self._has_density

    @torch.no_grad()
    def __call__(self, rows: Tensor, number: int, generator: torch.Generator) -> Completed:
        """`number` draws M of natural rows (N, D) completed."""
        if not self.declared:
            working = self._working(rows)
            drawn = [self.density.complete(working, generator) for _ in range(number)]
            nothing = rows.new_full(rows.shape[:1], math.nan)
            return Completed(torch.stack(drawn), torch.zeros_like(nothing), nothing)
        parts = [self._weighted(part, number, generator) for part in rows.split(max(1, _AT_ONCE // self.proposals))]
        completed, weight, effective = zip(*parts, strict=True)
        return Completed(torch.cat(completed, 1), torch.cat(weight), torch.cat(effective))

    def evidence(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """log p(observed cells) (N,) of natural rows (N, D) in working coordinates, with what is declared of them."""
        seen = ~rows.isnan()
        completed = self(rows, 1, generator)
        if self.simulator is not None:  # the weights have the targets in them
            _, backward = self._directions(seen)
            targets = torch.zeros(rows.shape[-1], dtype=torch.bool)
            targets[self.simulator.columns(self.variables)[1]] = True
            seen = seen & ~(backward.unsqueeze(-1) & targets)
        return completed.log_weight + self._log_prob(completed.rows[0], torch.zeros_like(seen), seen)

    def _working(self, rows: Tensor) -> Tensor:
        return self.standardization(rows).to(self.density.dtype)

    def _log_prob(self, rows: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
        """log p(wanted | known) (N,) of complete working rows (N, D), by masks (N, D)."""
        columns = list(range(rows.shape[-1]))
        parts = zip(rows.split(_AT_ONCE), known.split(_AT_ONCE), wanted.split(_AT_ONCE), strict=True)
        return torch.cat([self.density.log_prob(r, k, columns, r, w).double() for r, k, w in parts])

    def _directions(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows (N,) the simulator completes, and which it weights, by what is observed (N, D)."""
        nothing = torch.zeros(len(seen), dtype=torch.bool)
        if self.simulator is None:
            return nothing, nothing
        given, targets = self.simulator.columns(self.variables)
        forward = seen[:, given].all(-1) & ~seen[:, targets].any(-1)
        return forward, ~seen[:, given].all(-1) & seen[:, targets].any(-1)

    def _weighted(self, rows: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        seen = ~rows.isnan()
        times = self.proposals
        forward, backward = self._directions(seen)
        repeated = rows.repeat(times, 1)
        if self.simulator is not None and bool(forward.any()):
            _, targets = self.simulator.columns(self.variables)
            here = forward.repeat(times).nonzero()[:, 0]
            told = self.simulator.draw(self.variables, repeated[here], generator)
            repeated[here.unsqueeze(-1), torch.tensor(targets)] = told
        working = self.density.complete(self._working(repeated), generator)
        natural = self.standardization.inverse(working.double())
        log_weight = torch.zeros(times * len(rows), dtype=torch.float64)
        weighted = torch.zeros_like(forward)
        if self.simulator is not None and bool(backward.any()):
            index = backward.repeat(times)
            found = self._by_simulator(natural[index], working[index], seen.repeat(times, 1)[index])
            if found is not None:
                log_weight[index] += found
                weighted |= backward
        if self.mechanism is not None:
            open_ = ~seen.all(-1)
            index = open_.repeat(times)
            recorded = log_recorded(
                self.mechanism, self.variables, natural[index], seen.repeat(times, 1)[index], self.recorded
            )
            if self.learned_from_recorded:
                whole = torch.ones_like(natural[index], dtype=torch.bool)
                recorded = recorded - log_recorded(self.mechanism, self.variables, natural[index], whole, self.recorded)
            log_weight[index] += recorded
            weighted |= open_
        log_weight = log_weight.unflatten(0, (times, len(rows)))
        total = log_weight.logsumexp(0)
        lost = ~total.isfinite()
        if bool(lost.any()):
            raise DataError(
                f"row {int(lost.nonzero()[0])} of those learned from: what is declared gives no weight to any of "
                f"{times} draws of its missing cells; widen the declared law, or ask for more proposals"
            )
        share = (log_weight - total).exp()
        effective = (1 / share.square().sum(0)).where(weighted, math.nan)
        picked = torch.multinomial(share.mT, number, replacement=True, generator=generator).mT  # (M, B)
        drawn = working.unflatten(0, (times, len(rows)))[picked, torch.arange(len(rows))]
        return drawn, total - math.log(times), effective

    def _by_simulator(self, natural: Tensor, working: Tensor, seen: Tensor) -> Tensor | None:
        """log of p(y | x) p(x | rest) / q(missing of both | observed), of completed rows with observed cells `seen`."""
        assert self.simulator is not None
        forward = self.simulator.log_prob(self.variables, natural)
        if forward is None:
            return None
        given, targets = (torch.zeros_like(seen[0]).index_fill(0, torch.tensor(c), True) for c in
                          self.simulator.columns(self.variables))  # fmt: skip
        jacobian = self.standardization.log_abs_det_jacobian(natural)
        forward = forward.double() - jacobian[:, targets].sum(-1)
        before = self._log_prob(working, seen & ~targets, ~seen & given)
        proposed = self._log_prob(working, seen, ~seen & (given | targets))
        return forward + before - proposed


def rounds(
    completer: Completer,
    learned: Callable[[torch.Generator], Tensor],
    held_out: Tensor,
    run: Callable[[int, Tensor, Tensor], list[Record]],
    plan: Completion,
    draws: tuple[int, int],
    seed: int,
    base: AnyOrderFlow,
) -> list[Round]:
    """Draws missing cells and trains on the completed rows, until the evidence of held-out rows stops rising. A round
    after which it has fallen, by more than two standard errors, is taken back.

    The first draws are the Gaussian base's, which is right for what is linear even where nothing was observed, unless
    what was trained describes the held-out cells better by more than two standard errors. Where a mechanism is
    declared, rounds of the base alone come first: each takes a share of what is left of an error away, and they cost
    little. First draws from what was trained are of the law among *recorded* values, which has another of the hidden
    ones beside it, p(v | hidden) ∝ p(v | recorded) p(hidden | v) / p(recorded | v): they are weighted by that, once.
    Where a simulator only draws, the evidence knows nothing of it, and no round is taken back.

    Arguments:
        learned: natural rows (N, D) to learn from, drawn within their rounding.
        held_out: natural rows (H, D).
        run: trains on completed working rows (M, N, D), with others (R, H, D) held out, in round 1, 2, …
        draws: M and R.
        seed: of the draws.
        base: the density as its Gaussian base alone, changed in place.
    """
    found: list[Round] = []
    trained = completer.density

    @torch.no_grad()
    def evidence() -> Tensor:
        return completer.evidence(held_out, torch.Generator().manual_seed(seed)).double()

    last = evidence()
    completer.density = base
    if completer.mechanism is not None:
        _settle(completer, learned(torch.Generator().manual_seed(seed)), draws[0], seed)
    better, error = _mean(last - evidence())
    if better > 2 * error:
        completer.density = trained
    for number in range(1, plan.rounds + 1):
        generator = torch.Generator().manual_seed(seed + 7919 * number)
        completer.learned_from_recorded = number == 1 and completer.density is trained
        pool = completer(learned(generator), draws[0], generator)
        checked = completer(held_out, draws[1], generator)
        completer.density, completer.learned_from_recorded = trained, False
        before = {name: value.clone() for name, value in trained.state_dict().items()}
        if completer.declared:  # by the rows alone the base is right already, its likelihood is the observed cells'
            completer.density.refit_base(pool.rows.flatten(0, 1))
        records = run(number, pool.rows, checked.rows)
        weighted = pool.effective[~pool.effective.isnan()]
        mean, least = (float(weighted.mean()), float(weighted.min())) if len(weighted) else (math.nan, math.nan)
        now = evidence()
        (rise, error), last = _mean(now - last), now
        kept = rise >= -2 * error or not completer.counts_what_is_declared
        found.append(Round(records, float(now.mean()), kept, mean, least))
        if not kept:
            trained.load_state_dict(before)
        if not kept or (number > 1 and rise <= error):
            break
    return found


def _settle(completer: Completer, rows: Tensor, number: int, seed: int) -> None:
    """Draws missing cells of natural rows (N, D) from the Gaussian base and fits it to what was completed, until it
    hardly moves; the same random numbers every time, so that what moves it are the rows."""
    found = completer.density.context.base
    for _ in range(_SETTLING):
        before = found.mean.clone(), found.covariance.clone()
        pool = completer(rows, number, torch.Generator().manual_seed(seed)).rows
        completer.density.refit_base(pool.flatten(0, 1))
        after = found.mean, found.covariance
        if max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) < _SETTLED:
            break


def _mean(values: Tensor) -> tuple[float, float]:
    """With its standard error; of one value that is infinite."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.inf
