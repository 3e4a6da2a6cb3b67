"""`digits-llava`: a stock `LlavaForConditionalGeneration` that answers questions about scenes of several digits.

A five-layer CLIP tower with a CLS token (features from the last layer but one, as in LLaVA), the usual two-layer
projector, and a thin Llama decoder of twelve layers with two query heads to each KV head. Training goes in five
legs:

1. the tower learns to name: each projected visual token should point at the embeddings of the digit it belongs to
   (or `nothing`) and of its place, the token at a digit's centre also at `digits`; CLS says which digits are there;
2. a third of the decoder joins while the tower rests, the other layers being exact identities (their output
   projections start at zero);
3. two more layers join;
4. all twelve layers, and the tower again;
5. the same, but three quarters of the images are shown with only some of their tokens, in varying numbers and
   proportions of digit to background, each at its own position, as large models learn on images of many sizes. `what`
   and `where` are then answered with few tokens, as long as they keep their positions. Counting is not cured: it still
   goes in part by the digits' share of the tokens, which any choice that keeps digits rather than ground changes.

The decoder sees several questions behind each image at once. A block mask lets a question see the image and itself
only, and positions start again behind the image, so every question is answered exactly as if it stood alone.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tprune.data import scenes
from tprune.zoo.digits_vit import look_near, position_embedding
from tprune.zoo.train import Learner, Stage, only_blocks

PATCH = 8
SIDE = scenes.SIZE // PATCH
WIDTH = 96
LAYERS = 12
DECODER_LAYERS = {
    "four layers": (2, 5, 8, 11),
    "six layers": (1, 2, 4, 5, 8, 11),
    "twelve layers": range(LAYERS),
    "thinned images": range(LAYERS),
}
MEAN, STD = 0.25, 0.2
FEATURE_LAYER = -2
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
WORDS = (
    *SPECIAL,
    *scenes.DIGITS,
    scenes.NOTHING,
    *scenes.PLACES,
    *["what", "where", "is", "at", "how", "many", "digits", "are", "there", "?"],
)
ID = {word: number for number, word in enumerate(WORDS)}
QUESTIONS = 10  # a scene, in training
SLOT = 7  # tokens: the longest prompt and its answer
IGNORED = -100
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class DigitsLlava(Learner):
    """The model and a linear head that asks CLS which digits are present."""

    stages = (
        Stage("tower", 1200, 16, 1.5e-3),
        Stage("four layers", 1500, 8, 1.5e-3),
        Stage("six layers", 700, 8, 1e-3),
        Stage("twelve layers", 350, 8, 4e-4),
        Stage("thinned images", 1300, 8, 4e-4),
    )

    def __init__(self):
        super().__init__()
        self.model = LlavaForConditionalGeneration(_config())
        self.presence_head = nn.Linear(WIDTH, len(scenes.DIGITS))
        inner = self.model.model
        with torch.no_grad():
            embeddings = inner.vision_tower.embeddings
            embeddings.position_embedding.weight[1:] = position_embedding()
            embeddings.patch_embedding.weight.normal_(std=(3 * PATCH**2) ** -0.5)
            for layer in inner.vision_tower.encoder.layers:
                look_near(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
            for layer in inner.language_model.layers:
                look_alike(layer.self_attn)
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()

    def loss(self, stage: str, indices: Sequence[int], seed: int) -> Tensor:
        """Naming loss of the visual tokens and of CLS; after the first leg also the answers' cross-entropy."""
        examples = [_example(i, seed) for i in indices]
        pixels, digit, place, centre, present, tokens, targets, kept = (
            torch.from_numpy(np.stack(column)) for column in zip(*examples, strict=True)
        )
        with torch.set_grad_enabled(stage in ("tower", "twelve layers", "thinned images")):
            features, cls = self.tower_features(normalised(pixels))
        visual = self.model.model.multi_modal_projector(features)  # [B, 144, D]
        presence = F.binary_cross_entropy_with_logits(self.presence_head(cls), present)
        naming = presence + self._naming_loss(visual, digit, place, centre)
        if stage == "tower":
            return naming
        chosen = DECODER_LAYERS[stage]
        with only_blocks(self.model.model.language_model, "layers", chosen):
            hidden = self.packed_hidden(visual, tokens, kept if stage == "thinned images" else None)
        asked = targets != IGNORED
        return F.cross_entropy(self.model.lm_head(hidden[asked]), targets[asked]) + 0.3 * naming

    def tower_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the projector reads, [B, 144, D], and the tower's normalised CLS, [B, D]."""
        seen = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return seen.hidden_states[FEATURE_LAYER][:, 1:], seen.pooler_output

    def packed_hidden(self, visual: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """The decoder's last states [B, 70, D] at question tokens [B, 70] behind visual tokens [B, 144, D].

        Of the visual tokens only those `kept` are seen, bool [B, 144], each at its own position.
        """
        inner = self.model.model
        embed = inner.get_input_embeddings()
        begin = embed(torch.full((len(visual), 1), ID["<bos>"]))
        mask, positions = _packing()
        mask = mask if kept is None else _thinned(mask, kept)
        output = inner.language_model(
            inputs_embeds=torch.cat([begin, visual, embed(tokens)], 1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )
        return output.last_hidden_state[:, -tokens.shape[1] :]

    def _naming_loss(self, visual: Tensor, digit: Tensor, place: Tensor, centre: Tensor) -> Tensor:
        words = self.model.get_input_embeddings().weight
        pointing = F.rms_norm(visual, (WIDTH,)) @ words.T  # [B, 144, V]
        digits, places = ID[scenes.DIGITS[0]], ID[scenes.PLACES[0]]
        digit_loss = F.cross_entropy(pointing[..., digits : digits + 11].flatten(0, 1), digit.flatten())
        place_loss = F.cross_entropy(pointing[..., places : places + 9].flatten(0, 1), place.flatten())
        centre_loss = F.binary_cross_entropy_with_logits(pointing[..., ID["digits"]], centre)
        return digit_loss + 0.3 * place_loss + 2 * centre_loss

    @torch.inference_mode()
    def accuracy(self, n: int) -> dict:
        """Share of evaluation questions answered right, overall and per kind, through the stock forward pass."""
        questions = list(scenes.question_scenes("test", n, scenes.EVALUATION_SEED))
        processor = _processor()
        right, asked = dict.fromkeys(scenes.KINDS, 0), dict.fromkeys(scenes.KINDS, 0)
        for kind in scenes.KINDS:
            chosen = [q for q in questions if q.kind == kind]
            for start in range(0, len(chosen), 50):
                batch = chosen[start : start + 50]
                inputs = processor(
                    images=[q.image for q in batch],
                    text=[f"<image> {q.prompt}" for q in batch],
                    return_tensors="pt",
                )
                guess = self.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
                right[kind] += int((guess == torch.tensor([ID[q.answer] for q in batch])).sum())
                asked[kind] += len(batch)
        return {
            "accuracy": sum(right.values()) / n,
            "accuracy_by_kind": {kind: round(right[kind] / max(1, asked[kind]), 4) for kind in scenes.KINDS},
            "questions_by_kind": asked,
        }

    def save(self, folder: Path) -> None:
        """Write model and processor as `from_pretrained` reads them."""
        self.model.save_pretrained(folder)
        _processor().save_pretrained(folder)


def look_alike(attention: nn.Module) -> None:
    """Start a decoder layer's queries and keys as one random projection: a word looks at tokens that point to it.

    Only the slower half of the rotary frequencies takes part, as the faster half would blur likeness with distance.
    """
    width, heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim
    key = torch.randn(heads, 2, width // 2, WIDTH) * 1.7 * WIDTH**-0.5
    key[:, :, : width // 4] *= 0.2
    attention.k_proj.weight.copy_(key.reshape(-1, WIDTH))
    attention.q_proj.weight.copy_(key.repeat_interleave(attention.num_key_value_groups, 0).reshape(-1, WIDTH))


def normalised(pixels: Tensor) -> Tensor:
    """Images [B, 96, 96, 3] uint8 to model input [B, 3, 96, 96]."""
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()


def _config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=ID["<pad>"],
        bos_token_id=ID["<bos>"],
        eos_token_id=ID["<eos>"],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ID["<image>"],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=SIDE**2,
        tie_word_embeddings=True,
    )


@cache
def _processor() -> LlavaProcessor:
    words = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ID["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@cache
def _packing() -> tuple[Tensor, Tensor]:
    """Who sees whom in a packed sequence, [1, 1, L, L] bool, and positions [1, L] that restart behind the image."""
    prefix, length = 1 + SIDE**2, 1 + SIDE**2 + QUESTIONS * SLOT
    slot = torch.cat([torch.full((prefix,), -1), torch.arange(QUESTIONS).repeat_interleave(SLOT)])
    mask = torch.ones(length, length).tril().bool() & ((slot == -1) | (slot == slot[:, None]))
    positions = torch.cat([torch.arange(prefix), prefix + torch.arange(SLOT).repeat(QUESTIONS)])
    return mask[None, None], positions[None]


def _thinned(mask: Tensor, kept: Tensor) -> Tensor:
    """The mask [B, 1, L, L] where only the visual tokens `kept` [B, 144] are seen."""
    length = mask.shape[-1]
    seen = torch.ones(len(kept), length, dtype=torch.bool)
    seen[:, 1 : 1 + SIDE**2] = kept
    # Nobody reads what a hidden token sees; itself, so that its softmax is over something.
    return mask & (seen[:, None, None] | torch.eye(length, dtype=torch.bool))


def _example(index: int, seed: int) -> tuple[np.ndarray, ...]:
    """A training scene: pixels; per patch its digit (10: none), place and centre flag [144]; digits present [10];
    question tokens and the targets behind each of them [70]; which patches are shown when images are thinned [144]."""
    layout = scenes.question_layout("train", index, seed)
    middle = (np.arange(SIDE) + 0.5) * PATCH
    place = (
        np.arange(SIDE)[:, None] * scenes.GRID // SIDE * scenes.GRID + np.arange(SIDE) * scenes.GRID // SIDE
    ).flatten()
    digit = np.full((SIDE, SIDE), 10)
    centre = np.zeros((SIDE, SIDE), np.float32)
    present = np.zeros(10, np.float32)
    for cell in np.flatnonzero(layout.cells >= 0):
        row, col = layout.centres[cell]
        digit[np.hypot(middle[:, None] - row, middle - col) < 11] = layout.cells[cell]
        centre[int(row) // PATCH, int(col) // PATCH] = 1
        present[layout.cells[cell]] = 1
    tokens = np.full((QUESTIONS, SLOT), ID["<pad>"])
    targets = np.full((QUESTIONS, SLOT), IGNORED)
    asked = scenes.questions_about(layout, np.random.default_rng((seed, 3, index)))
    chosen = asked["count"] + asked["where"][:5] + asked["what"]
    for slot, (prompt, answer) in enumerate(chosen[:QUESTIONS]):
        words = [ID[word] for word in prompt.split()] + [ID[answer]]
        tokens[slot, : len(words)] = words
        targets[slot, len(words) - 3 : len(words)] = ID[answer], ID[answer], ID["<eos>"]
    return (
        layout.pixels,
        digit.flatten(),
        place,
        centre.flatten(),
        present,
        tokens.flatten(),
        targets.flatten(),
        _some(digit, centre, np.random.default_rng((seed, 5, index))),
    )


def _some(digit: np.ndarray, centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which patches of a scene are shown, bool [144]; every fourth scene is whole.

    Scores are noise, fine and in blobs, with a leaning towards digits or away from them. Centres always stay, so that
    every question can be answered.
    """
    share = rng.uniform(0.15, 1) if rng.random() < 0.75 else 1.0
    blobs = np.kron(rng.normal(size=(3, 3)), np.ones((SIDE // 3, SIDE // 3)))
    score = rng.random((SIDE, SIDE)) + 0.5 * rng.random() * blobs + rng.normal() * (digit != 10) + 99 * centre
    kept = np.zeros(SIDE**2, bool)
    kept[np.argsort(-score.flatten())[: max(1, round(share * SIDE**2))]] = True
    return kept
