"""Networks that read the known cells of a row: a masked residual MLP, and a transformer over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invman.density.context import PER_CELL, Context, Seen


class Block(nn.Module):
    """A residual block, the identity when new; in training a share `dropout` of its hidden units is left out."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.dropout(F.silu(self.up(F.silu(self.norm(hidden)))), self.dropout, self.training)
        return hidden + self.down(inner)


class MaskedMLP(nn.Module):
    """Cells × mask, and mask, through residual blocks; (..., width).

    Members of an exchangeable group pass through one shared network and are summed, so their order cannot matter
    (Zaheer et al., *Deep sets*, NeurIPS 2017).
    """

    def __init__(self, context: Context, width: int, blocks: int, group_width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.sets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(PER_CELL * size, group_width),
                nn.SiLU(),
                nn.Linear(group_width, group_width),
                nn.SiLU(),
                nn.Linear(group_width, group_width),
            )
            for size in context.member_sizes
        )
        features = PER_CELL * context.num_singles + len(self.sets) * (2 * group_width + 1)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))

    def forward(self, seen: Seen) -> Tensor:
        features = [seen.singles.flatten(-2)]
        for network, members, present in zip(self.sets, seen.members, seen.present, strict=True):
            weight = present.to(members).unsqueeze(-1)
            total, count = (network(members) * weight).sum(-2), weight.sum(-2)
            features += [total / members.shape[-2], total / count.clamp_min(1), count]
        hidden: Tensor = self.enter(torch.cat(features, -1))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class TokenTransformer(nn.Module):
    """One token a known cell (one a member, in an exchangeable group) and one that gathers them; (..., width)."""

    def __init__(self, context: Context, width: int, blocks: int, heads: int = 4) -> None:
        super().__init__()
        self.single = nn.Linear(PER_CELL, width)
        self.which = nn.Parameter(0.1 * torch.randn(context.num_singles, width))
        self.member = nn.ModuleList(nn.Linear(PER_CELL * size, width) for size in context.member_sizes)
        self.gather = nn.Parameter(0.1 * torch.randn(width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation=F.silu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)

    def forward(self, seen: Seen) -> Tensor:
        batch = seen.singles.shape[:-2]
        tokens = [self.gather.expand(*batch, 1, -1), self.single(seen.singles) + self.which]
        known = [seen.singles.new_ones((*batch, 1), dtype=torch.bool), seen.singles[..., -1] > 0]
        for network, members, present in zip(self.member, seen.members, seen.present, strict=True):
            tokens.append(network(members))
            known.append(present)
        row, hidden_from = torch.cat(tokens, -2), ~torch.cat(known, -1)
        read: Tensor = self.encoder(
            row.reshape(-1, *row.shape[-2:]), src_key_padding_mask=hidden_from.reshape(-1, row.shape[-2])
        )
        return read[:, 0].reshape(*batch, -1)
