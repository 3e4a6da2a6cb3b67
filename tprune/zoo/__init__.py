"""The built-in models: small, trained here on real handwritten digits and real text, and shipped with the package.

Importing this module imports neither torch nor the models. Each model's folder is what its library reads
(`timm.create_model("local-dir:…")`, `from_pretrained`), with its measured facts beside it in `zoo.json`; of the models
in `BASES` it holds the head alone.
"""

import json
from pathlib import Path

NAMES = ("digits-vit", "digits-llava", "minilm-topics")
BASES = {"minilm-topics": "minilm"}
"""Models that are a head on a model of another package, by the name of that."""

DESCRIPTIONS = {
    "digits-vit": "timm VisionTransformer, 12 blocks, 144 patches: reads the large digit in a cluttered scene",
    "digits-llava": "LLaVA, 144 visual tokens, 12-layer Llama: answers questions about scenes of several digits",
    "minilm-topics": "a head on minilm (BERT, 6 layers): says which topic of Python's manual a passage is from",
}


def path(name: str) -> Path:
    """The folder of a built-in model."""
    if name not in NAMES:
        raise ValueError(f"no built-in model {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).parent / name


def facts(name: str) -> dict:
    """What was measured when the model was trained, from its `zoo.json`: accuracy, scenes, seed."""
    return json.loads((path(name) / "zoo.json").read_text(encoding="utf-8"))
