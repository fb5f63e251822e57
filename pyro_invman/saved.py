"""Models back from disk, whichever they are."""

from __future__ import annotations

import os

from pyro_invman import storage
from pyro_invman.joint import JointFlow
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.transport import ConditionalTransport
from pyro_invman.variables import DataError


def load(folder: str | os.PathLike[str]) -> JointFlow | ProcessManifold | ConditionalTransport:
    """The model that `save` wrote to `folder`.

    Raises:
        FileNotFoundError: there is no model.
        DataError: a file is damaged, was changed, or comes from a later version of the package.
    """
    schema = storage.read_schema(folder)
    kinds: dict[str, type[JointFlow] | type[ProcessManifold] | type[ConditionalTransport]] = {
        "JointFlow": JointFlow,
        "ProcessManifold": ProcessManifold,
        "ConditionalTransport": ConditionalTransport,
    }
    if schema["kind"] not in kinds:
        raise DataError(f"{folder}: describes a {schema['kind']!r}, expected one of {sorted(kinds)}")
    tensors = storage.read_tensors(folder, schema)
    try:
        return kinds[schema["kind"]].from_schema(schema, tensors)
    except RuntimeError as error:
        raise DataError(
            f"{folder}/weights.safetensors: not the weights of the model in schema.json ({error})"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{folder}/schema.json: describes no model that can be built ({error!r})") from error
