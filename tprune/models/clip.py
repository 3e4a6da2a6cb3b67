"""The CLIP that a vision tower comes from: its text tower and both projections, beside a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.token_view import TokenView


class Clip:
    """Brings patches of the tower, and text, into one space.

    Args:
        model: a `CLIPModel`.
        tokenizer: of its text tower.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def image(self, patches: Tensor) -> Tensor:
        """Patches as the tower gives them [..., C] -> [..., d], float32."""
        normed = self.model.vision_model.post_layernorm(patches.to(self.model.dtype))
        return self.model.visual_projection(normed).float()

    def text(self, told: list[str]) -> TokenView:
        """Texts -> their segments, as long as the text tower takes them: float32 [B, M, d], with `real`."""
        width = self.model.config.text_config.max_position_embeddings
        rows = []
        for row in told:
            ids = torch.tensor(self.tokenizer(row)["input_ids"], device=self.model.device)
            padding = -len(ids) % width
            mask = torch.ones_like(ids)
            ids, mask = (nn.functional.pad(part, (0, padding)).view(-1, width) for part in (ids, mask))
            output = self.model.text_model(input_ids=ids, attention_mask=mask)
            rows.append(self.model.text_projection(output.pooler_output).float())
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=hidden.device)
        real = torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)
        return TokenView(hidden, torch.zeros_like(real), whole=False, real=real)


def load_clip(name: str, device: Any) -> Clip:
    """The CLIP of this name on the hub or in this folder.

    Raises:
        UserError: it cannot be had.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(name).eval().requires_grad_(False).to(device)
        return Clip(model, AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--set clip={name}: no CLIP model to be had there ({reason}); leave it out"
        ) from None
