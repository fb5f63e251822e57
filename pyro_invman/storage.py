"""Models on disk: a folder with weights (safetensors) and a schema (JSON), each with its checksum; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_invman.training import write_atomically
from pyro_invman.variables import DataError

_FORMAT = 1
_NEEDED = {"kind", "variables", "weights_sha256"}


def write(folder: str | os.PathLike[str], schema: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes weights, then the schema that vouches for them."""
    folder = Path(folder)
    copied = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    write_atomically(folder / "weights.safetensors", lambda part: save_file(copied, part))
    whole = {"format": _FORMAT, **schema, "weights_sha256": _digest(folder / "weights.safetensors")}
    whole["sha256"] = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    write_atomically(folder / "schema.json", lambda part: part.write_text(json.dumps(whole, indent=1)))


def read_schema(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The schema in `folder`.

    Raises:
        FileNotFoundError: there is no model.
        DataError: it is damaged, was changed, or comes from a later version of the package.
    """
    path = Path(folder) / "schema.json"
    if not path.is_file():
        raise FileNotFoundError(f"no model in {folder}: schema.json is not there")
    try:
        schema = json.loads(path.read_text())
        stated = schema.pop("sha256")
        version = int(schema["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged, it cannot be read as a schema ({error!r})") from error
    if version > _FORMAT:
        raise DataError(
            f"{folder}: written in format {version}, this version reads up to {_FORMAT}; update pyro_invman"
        )
    if hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest() != stated:
        raise DataError(f"{path}: damaged or changed, its checksum does not agree with its content")
    lacking = _NEEDED - schema.keys()
    if lacking:
        raise DataError(f"{path}: damaged, it lacks {', '.join(sorted(lacking))}")
    return schema


def read_tensors(folder: str | os.PathLike[str], schema: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in `folder`, which `schema` vouches for.

    Raises:
        DataError: they are missing, damaged or changed.
    """
    weights = Path(folder) / "weights.safetensors"
    if not weights.is_file():
        raise DataError(f"{folder}: damaged, weights.safetensors is missing")
    if _digest(weights) != schema["weights_sha256"]:
        raise DataError(f"{weights}: damaged or changed, its checksum does not agree with the schema's")
    try:
        return load_file(weights)
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{weights}: cannot be read ({error})") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
