r"""Which variables were ever measured together, and what follows for those that were not.

Two columns are *linked* where some row shows both. Rows say nothing about the dependence of two that are not, and
expectation–maximisation cannot mend that: whatever coupling a model starts with reproduces itself. So dependence runs
along links alone: cells obey the Markov property of the graph of links, the law of greatest entropy among those
that agree with what the rows show.

References:
    Dempster, *Covariance selection*, Biometrics 1972.
    Lauritzen, *Graphical models*, 1996.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invman.density.gaussian import distinct


class Links(nn.Module):
    """The graph of links between D columns, not all of which are linked.

    Arguments:
        linked: (D, D), symmetric; the diagonal is not read.
    """

    linked: Tensor

    def __init__(self, linked: Tensor) -> None:
        super().__init__()
        diagonal = torch.eye(len(linked), dtype=torch.bool, device=linked.device)
        self.register_buffer("linked", linked & ~diagonal, persistent=False)

    @property
    def chained(self) -> bool:
        """Whether some columns are linked through others alone."""
        reached = self.linked | torch.eye(len(self.linked), dtype=torch.bool, device=self.linked.device)
        for _ in range(len(self.linked)):
            reached = reached | (reached.float() @ self.linked.float() > 0)
        return bool((reached & ~self.linked).sum() > len(self.linked))

    def visible(self, known: Tensor, target: Tensor) -> Tensor:
        """Which of the `known` cells (..., D) a `target` column (...) depends on, (..., D).

        A known cell is left out where every path from it to the target passes through other known cells, or where
        there is none.
        """
        at = F.one_hot(target, len(self.linked)).bool()
        known, at = torch.broadcast_tensors(known, at)
        patterns, of_row = distinct(torch.cat([known, at], -1))
        stops, reached = patterns.chunk(2, -1)
        graph = self.linked.to(torch.get_default_dtype())

        def beside(cells: Tensor) -> Tensor:
            return cells.to(graph) @ graph > 0

        for _ in range(len(self.linked)):
            reached = reached | (beside(reached) & ~stops)
        return (stops & beside(reached))[of_row]

    def order(self, known: Tensor) -> Tensor:
        """The columns (..., D) in an order in which unknown cells can be drawn after the `known` ones (..., D).

        Known columns come first; then always the one with most links to those before it. Where the graph has no long
        cycle without a chord, these separate it from all others before it (maximum cardinality search).

        References:
            Tarjan & Yannakakis, *Simple linear-time algorithms to test chordality of graphs*, SIAM J. Comput. 1984.
        """
        patterns, of_row = distinct(known)
        orders = [self._order(pattern.tolist()) for pattern in patterns]
        return torch.tensor(orders, dtype=torch.long, device=known.device)[of_row]

    def _order(self, known: list[bool]) -> list[int]:
        found = [c for c, here in enumerate(known) if here]
        graph = self.linked.tolist()
        left = [c for c, here in enumerate(known) if not here]
        while left:
            best = max(left, key=lambda c: sum(graph[c][f] for f in found))
            found.append(best)
            left.remove(best)
        return found

    def between(self, a: int, b: int) -> list[int] | None:
        """The columns on a shortest path from `a` to `b`, without its ends; None where there is no path."""
        graph, came, front = self.linked.tolist(), {a: a}, [a]
        while front and b not in came:
            step = [(c, d) for c in front for d, here in enumerate(graph[c]) if here]
            front = []
            for c, d in step:
                if d not in came:
                    came[d] = c
                    front.append(d)
        if b not in came:
            return None
        path = [came[b]]
        while path[-1] != a:
            path.append(came[path[-1]])
        return path[-2::-1]


def links_between(linked: Tensor) -> Links | None:
    """The graph of `linked` (D, D); None where every column is linked to every other, or nothing is known of any."""
    seen = linked | torch.eye(len(linked), dtype=torch.bool, device=linked.device)
    return None if bool(seen.all()) or not bool(linked.any()) else Links(linked)


def alike(counts: Tensor, members: Tensor) -> Tensor:
    """Counts (D, D) of rows, as they are when any of the exchangeable `members` (M, C) may stand for any other."""
    number, size = members.shape
    flat, counts = members.flatten(), counts.clone()
    rest = torch.tensor([j for j in range(len(counts)) if j not in set(flat.tolist())], dtype=torch.long)
    blocks = counts[flat][:, flat].reshape(number, size, number, size)
    same = torch.eye(number, dtype=torch.bool)
    within = blocks[same.nonzero()[:, 0], :, same.nonzero()[:, 0]].sum(0)
    across = torch.where(same.reshape(number, 1, number, 1), 0, blocks).sum((0, 2))
    mixed = torch.where(
        same.reshape(number, 1, number, 1), within.reshape(1, size, 1, size), across.reshape(1, size, 1, size)
    )
    counts[flat.unsqueeze(-1), flat] = mixed.reshape(number * size, number * size)
    beside = counts[flat][:, rest].reshape(number, size, -1).sum(0).repeat(number, 1)
    counts[flat.unsqueeze(-1), rest] = beside
    counts[rest.unsqueeze(-1), flat] = beside.mT
    return counts
