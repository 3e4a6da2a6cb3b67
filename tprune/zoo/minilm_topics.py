"""`minilm-topics`: a head on `minilm` that says which topic of Python's manual a passage of 32 to 96 words is from.

minilm itself is not trained. Its class token is computed once for every passage; what learns, and is all that is
stored, is the pooler behind it, from minilm's own, and a linear classifier.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tprune.data import passages
from tprune.models.source import packaged
from tprune.zoo.train import Learner, Stage

BASE = "minilm"


class MinilmTopics(Learner):
    """The pooler and the classifier."""

    stages = (Stage("head", 300, 64, 3e-4, warmup=20),)
    unit = "passages"

    def __init__(self):
        super().__init__()
        self.pooler = nn.Linear(*_base().pooler.dense.weight.shape)
        self.pooler.load_state_dict(_base().pooler.dense.state_dict())
        self.classifier = nn.Linear(self.pooler.out_features, len(passages.TOPICS))

    def logits(self, features: Tensor) -> Tensor:
        """Class tokens [B, D] -> [B, topics]."""
        return self.classifier(self.pooler(features).tanh())

    def loss(self, stage: str, indices: Sequence[int], seed: int) -> Tensor:
        """Cross-entropy of the passages' topics."""
        features, labels = _examples("train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = order[torch.tensor(indices) % len(labels)]
        return F.cross_entropy(self.logits(features[chosen]), labels[chosen])

    @torch.inference_mode()
    def accuracy(self, n: int) -> dict:
        """On the test passages, which share no word with those it learned from."""
        features, labels = (part[:n] for part in _examples("test"))
        right = self.logits(features).argmax(-1) == labels
        return {"accuracy": right.double().mean().item(), "passages": len(labels)}

    def save(self, folder: Path) -> None:
        """Write the configuration of the whole classifier and the weights of the head, as transformers names them."""
        names = dict(enumerate(passages.TOPICS))
        config = AutoConfig.from_pretrained(packaged(BASE), id2label=names)
        config.label2id = {name: place for place, name in names.items()}
        config.architectures, config._name_or_path = ["BertForSequenceClassification"], ""
        config.save_pretrained(folder)
        head = {"bert.pooler.dense": self.pooler, "classifier": self.classifier}
        weights = {
            f"{at}.{name}": p.detach() for at, part in head.items() for name, p in part.named_parameters()
        }
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()), indent=2) + "\n"
        )


@cache
def _base() -> nn.Module:
    return AutoModel.from_pretrained(packaged(BASE)).eval().requires_grad_(False)


@cache
def _examples(split: str) -> tuple[Tensor, Tensor]:
    """minilm's class tokens of all passages of a split, float32 [S, D], and their topics, int64 [S]."""
    texts, labels = zip(*passages.built_in(split), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(packaged(BASE))
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                list(texts[start : start + 32]), padding=True, truncation=True, return_tensors="pt"
            )
            found.append(_base()(**batch).last_hidden_state[:, 0])
    return torch.cat(found), torch.tensor(labels)
