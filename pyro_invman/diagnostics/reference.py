r"""What could have been said: a Gaussian of other held-out tasks, against which a model's answers are weighed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_invman.density.gaussian import GaussianBase
from pyro_invman.diagnostics.answers import Answers, Conditionals, HeldOut, passes
from pyro_invman.variables import Standardization, Variables

_BLOCKS = 8
_STAKES = (0.25, 0.5, 1.0)


class Reference:
    """A judge of held-out questions: a `given` model of rows or, where none is, a Gaussian fitted to held-out tasks.

    Tasks come in a random order, in 8 blocks. Questions of a block are judged by the Gaussian of all rows before it,
    so that it never knows their answers.

    Arguments:
        held_out: the rows.
        given: a model that does not know the held-out rows.
    """

    def __init__(self, held_out: HeldOut, given: Conditionals | None = None) -> None:
        self.held_out, self.given = held_out, given
        tasks = sorted(set(held_out.task_names))
        generator = torch.Generator().manual_seed(held_out.seed)
        place = dict(zip(tasks, torch.randperm(len(tasks), generator=generator).tolist(), strict=True))
        self.block = torch.tensor([place[name] * _BLOCKS // len(tasks) for name in held_out.task_names])
        self._gaussians: dict[int, RowGaussian | None] = {}

    def log_prob(self, asked: Answers) -> Tensor:
        """Log-densities (N,) of the truths, NaN where there is no judge: in the first block, for categories, and for
        targets that do not vary in the rows before."""
        cells = self.held_out.values[asked.rows]
        variables = self.held_out.variables
        targets = [v.name for v in asked.variables]
        found = torch.full_like(asked.log_prob, math.nan)
        if self.given is not None:
            for places, shown in passes(asked.truth, len(asked)):
                known = {name: cells[places, variables.index(name)] for name in asked.given}
                with torch.no_grad():
                    d = self.given.conditional([targets[j] for j in shown], known)
                    found[places] = d.log_prob(asked.truth[places][:, shown].to(d.sample())).to(found)
            return found
        if any(v.discrete for v in asked.variables):
            return found
        block = self.block[asked.rows]
        for b in block.unique().tolist():
            judge = self._gaussian(b)
            columns, given = variables.indices(targets), variables.indices(asked.given)
            if judge is not None and bool(judge.varies[columns].all()):
                found[block == b] = judge.log_prob(cells[block == b], columns, given)
        return found

    def _gaussian(self, block: int) -> RowGaussian | None:
        if block not in self._gaussians:
            before = self.held_out.values[self.block < block]
            enough = len(before) > 2 * (len(self.held_out.variables) + 1)
            self._gaussians[block] = RowGaussian(self.held_out.variables, before) if enough else None
        return self._gaussians[block]


class RowGaussian:
    """The normal law of rows (N, D), in logarithms where positive, categories as indicators; `varies` (D,)."""

    def __init__(self, variables: Variables, rows: Tensor) -> None:
        self.standardization = Standardization.fit(variables, rows)
        self._levels = [len(v.levels) if v.discrete else 0 for v in variables]
        self.varies = torch.tensor([len(c[~c.isnan()].unique()) > 1 for c in rows.unbind(-1)])
        cells = self._cells(self.standardization(rows))
        self._base = GaussianBase(cells.shape[-1], ridge=1e-3)
        self._base.fit(cells, max_iterations=100, tolerance=1e-4)

    def log_prob(self, rows: Tensor, targets: list[int], given: list[int]) -> Tensor:
        """log p(targets | given) (N,) of rows (N, D) in natural units; NaN targets are marginalised."""
        working = self.standardization(rows)
        jacobian = self.standardization.log_abs_det_jacobian(rows)[:, targets].sum(-1)
        both, alone = (self._only(working, kept) for kept in ([*targets, *given], given))
        return self._base.log_prob(both) - self._base.log_prob(alone) + jacobian

    def _only(self, working: Tensor, kept: list[int]) -> Tensor:
        kept = [c for c in kept if self.varies[c]]
        rows = torch.full_like(working, math.nan)
        rows[:, kept] = working[:, kept]
        return self._cells(rows)

    def _cells(self, working: Tensor) -> Tensor:
        """Categories (..., D) as an indicator for each level but the first."""
        found = []
        for column, levels in zip(working.unbind(-1), self._levels, strict=True):
            if levels == 0:
                found.append(column)
            found += [torch.where(column.isnan(), column, (column == code).double()) for code in range(1, levels)]
        return torch.stack(found, -1)


class Evidence(NamedTuple):
    """What a reference says against a model: `log_evidence` in nats, and mean log-density of the reference and of the
    model on the same `questions`."""

    log_evidence: float
    reference: float
    model: float
    questions: int

    @property
    def p_value(self) -> float:
        """At most this probable if the model is right."""
        return math.exp(-max(0.0, self.log_evidence))


def evidence_against(asked: Answers, log_prob: Tensor) -> Evidence:
    r"""Evidence against a model that gives truths the density q, by a reference that gives them r, `log_prob` (N,):

    .. math:: E = \frac{1}{|\Lambda|} \sum_{\lambda \in \Lambda} \prod_n
              \left(1 - \lambda + \lambda \frac{r(t_n)}{q(t_n)}\right), \qquad \Lambda = \{1/4, 1/2, 1\}.

    If q is right, each factor has expectation at most 1 given what came before, so that :math:`P(E \ge 1/\alpha) \le
    \alpha`, whatever r is as long as it does not know the answers: no assumption, and exact for finitely many.

    References:
        Shafer, *Testing by betting*, JRSS A 2021.
        Wasserman, Ramdas & Balakrishnan, *Universal inference*, PNAS 2020.
    """
    seen = ~log_prob.isnan()
    if not bool(seen.any()):
        return Evidence(0.0, math.nan, math.nan, 0)
    ratio = (log_prob - asked.log_prob)[seen]
    products = []
    for stake in _STAKES:
        kept = torch.full_like(ratio, math.log1p(-stake) if stake < 1 else -math.inf)
        products.append(torch.logaddexp(kept, ratio + math.log(stake)).sum())
    evidence = float(torch.stack(products).logsumexp(0)) - math.log(len(_STAKES))
    return Evidence(evidence, float(log_prob[seen].mean()), float(asked.log_prob[seen].mean()), int(seen.sum()))
