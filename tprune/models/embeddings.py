"""Models that embed texts: texts as they are fed, and their embeddings, behind any block as behind the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tprune.core.contrast import pooled
from tprune.errors import UserError
from tprune.methods.weights import WeightMethod
from tprune.models.blocks import Decoder, find_decoder
from tprune.models.calibrate import Stream
from tprune.models.feed import Feed
from tprune.models.standing_in import answering
from tprune.models.subject import Subject
from tprune.models.text_encoder import is_encoder

Pool = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states [B, L, D], and which tokens count, begin and end int64 [B], to embeddings [B, D]."""
TOGETHER = 32
"""Texts whose last hidden states are normed at the same time."""


class Texts(Feed):
    """Texts of different lengths.

    Attributes:
        ids: of every text its tokens, int64 [L].
        begin: where in each what counts of it begins, behind an instruction and special tokens.
    """

    alike = False

    def __init__(self, ids: Sequence[Tensor], begin: Sequence[int]):
        self.ids, self.begin, self.lengths = list(ids), list(begin), [len(one) for one in ids]

    def __getitem__(self, part: slice) -> Texts:
        return Texts(self.ids[part], self.begin[part])

    def call(self, decoder: Decoder, part: slice) -> None:
        """Through the decoder without its head."""
        (ids,) = self.ids[part]
        decoder.core(input_ids=ids.unsqueeze(0).to(_device(decoder)), use_cache=False)

    def loss(self, place: int, model: nn.Module) -> Tensor:
        """The mean over its tokens, as a language model foretells them."""
        ids = self.ids[place].unsqueeze(0).to(model.device)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def padded(self) -> Tensor:
        """All tokens, int64 [N, L], zeros behind those of shorter texts."""
        return pad_sequence(self.ids, batch_first=True)

    def real(self) -> Tensor:
        """Which of them are of the texts, int64 [N, L] of zeros and ones."""
        return (torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)).long()

    def spans(self) -> tuple[Tensor, Tensor]:
        """Where what counts of each begins and ends, int64 [N] each."""
        return torch.tensor(self.begin), torch.tensor(self.lengths)


def encode(subject: Subject, texts: Sequence[str], instructions: Sequence[str], length: int) -> Texts:
    """Texts behind their instructions, cut at `length` tokens; what counts are the text's own tokens.

    Raises:
        UserError: no tokenizer.
    """
    if subject.processor is None:
        raise UserError(
            f"{subject.source.name} comes without a tokenizer; add its files to the model's folder"
        )
    tokenizer = getattr(subject.processor, "tokenizer", subject.processor)
    told = [
        f"{instruction}; {text}" if instruction else text
        for instruction, text in zip(instructions, texts, strict=True)
    ]
    ids = tokenizer(told, truncation=True, max_length=length)["input_ids"]
    own = tokenizer(list(texts), truncation=True, max_length=length, add_special_tokens=False)["input_ids"]
    begin = [len(whole) - len(part) for whole, part in zip(ids, own, strict=True)]
    return Texts([torch.tensor(one) for one in ids], begin)


@torch.no_grad()
def embed(decoder: Decoder, texts: Texts, pool: Pool) -> Tensor:
    """The embeddings of texts that go through the model together, float32 [N, D] on the CPU."""
    return embedded(decoder, texts, pool).cpu()


def embedded(decoder: Decoder, texts: Texts, pool: Pool) -> Tensor:
    """The same where the model is, with their graph."""
    device = _device(decoder)
    hidden = decoder.core(
        input_ids=texts.padded().to(device), attention_mask=texts.real().to(device), use_cache=False
    ).last_hidden_state
    return pool(hidden, *texts.spans())


@dataclass(frozen=True)
class Contrast:
    """Batches of triples; iterating gives for each what computes its loss of a model.

    Attributes:
        texts: all queries, then all positives, then all negatives.
        pool: what makes an embedding.
        loss: of the queries', positives' and negatives' embeddings, [B, D] each.
        size: triples per batch; the last may have fewer.
    """

    texts: Texts
    pool: Pool
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    size: int

    @property
    def triples(self) -> int:
        """How many there are."""
        return len(self.texts) // 3

    def __len__(self) -> int:
        """How many batches."""
        return -(-self.triples // self.size)

    def __iter__(self) -> Iterator[Callable[[nn.Module], Tensor]]:
        return (partial(self._of, first) for first in range(0, self.triples, self.size))

    def _of(self, first: int, model: nn.Module) -> Tensor:
        """The loss of the batch from triple `first` on, with its graph."""
        decoder, last = find_decoder(model), min(first + self.size, self.triples)
        parts = (
            self.texts[first + start : last + start] for start in range(0, len(self.texts), self.triples)
        )
        return self.loss(*(embedded(decoder, part, self.pool) for part in parts))


@dataclass(frozen=True)
class TripleSets:
    """Triples of a domain, and general ones."""

    domain: Contrast
    general: Contrast

    @property
    def texts(self) -> Texts:
        """Those of both."""
        parts = self.domain.texts, self.general.texts
        return Texts([*chain(*(part.ids for part in parts))], [*chain(*(part.begin for part in parts))])


def pool_of(model: nn.Module, method: WeightMethod) -> Pool:
    """What makes an embedding of a text: the method of a decoder's states, the mean over all tokens of an encoder's."""
    return partial(pooled, how="mean") if is_encoder(model.config) else method.pool


def embeddings(stream: Stream, pool: Pool) -> Tensor:
    """The embeddings of a stream's `Texts` as if the model ended with the blocks that they went through, behind its
    last norm: float32 [N, D] on the CPU.
    """
    decoder, texts, found = stream.decoder, stream.feed, []
    for first in range(0, len(texts), TOGETHER):
        part = texts[first : first + TOGETHER]
        with answering(decoder, stream.hidden[first : first + TOGETHER, : max(part.lengths)]):
            found.append(embed(decoder, part, pool))
    return torch.cat(found)


def _device(decoder: Decoder) -> torch.device:
    return next(decoder.core.parameters()).device
