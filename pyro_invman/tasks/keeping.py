r"""A manifold as what is written to a folder, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_invman.density.random_functions import RandomFunctions
from pyro_invman.tasks.memory import Memory
from pyro_invman.tasks.prior import GaussianProcessPrior
from pyro_invman.tasks.sources import Sources

if TYPE_CHECKING:
    from pyro_invman.tasks.manifold import ProcessManifold

BUILT_WITH = ("variables", "latent_dim", "task_prior", "seed", "flow", "encoder", "contamination", "reference_source")


def built_with(manifold: ProcessManifold) -> dict[str, Any]:
    """The arguments of its constructor, as JSON knows them."""
    values = (
        manifold.variables.to_list(),
        manifold.latent_dim,
        manifold.task_prior,
        manifold.seed,
        manifold.flow_settings,
        manifold.encoder_settings,
        manifold.contamination is not None,
        manifold.reference_source,
    )
    return dict(zip(BUILT_WITH, values, strict=True))


def state_of(manifold: ProcessManifold) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Schema, and tensors by name."""
    network, prior = manifold.network, manifold.network.prior
    schema = built_with(manifold) | {
        "kind": "ProcessManifold",
        "task_conditions": list(manifold.task_conditions),
        "inducing": list(prior.inducing.shape) if isinstance(prior, GaussianProcessPrior) else None,
        "functions": None if network.base.functions is None else network.base.functions.sizes(),
        "sources": list(manifold.sources.names),
        "known": list(manifold.memory.names),
    }
    kept = {f"memory.{name}": value for name, value in manifold.memory.tensors().items()}
    return schema, manifold.state_dict() | kept


def restore(manifold: ProcessManifold, schema: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """What was learned, into a manifold that was built with the same arguments."""
    manifold.task_conditions = tuple(schema["task_conditions"])
    manifold.variables.indices(manifold.task_conditions)
    if schema["inducing"] is not None:
        manifold.network.prior = GaussianProcessPrior(torch.zeros(schema["inducing"]), schema["latent_dim"])
    if schema["functions"] is not None:
        manifold.network.base.functions = RandomFunctions(schema["functions"])
    manifold.sources = Sources(schema["sources"], manifold.network.base.num_observations)
    kept = {name: value for name, value in tensors.items() if name.startswith("memory.")}
    weights = {name: value for name, value in tensors.items() if name not in kept}
    remembered = {name.removeprefix("memory."): value for name, value in kept.items()}
    manifold.memory = Memory.from_tensors(schema["known"], remembered)
    manifold.network.to(weights["network.flow.out.weight"].dtype)
    manifold.load_state_dict(weights)
    manifold.network.take_links()
