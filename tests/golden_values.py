"""Reads the recorded expectations in tests/golden."""

import json
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parent / "golden"


def golden(family: str, name: str) -> tuple[dict, dict]:
    """The tensors and the facts of one golden file."""
    return load_file(HERE / family / f"{name}.safetensors"), json.loads(
        (HERE / family / f"{name}.json").read_text()
    )


def under(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin with `prefix`, without it, in float32."""
    return {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
