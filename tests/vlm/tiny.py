"""One tiny random model of every kind that `tprune vlm` prunes, built by hand."""

from functools import cache

import torch
import transformers
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from tprune.models.layout import packed_crops

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
IMAGE = 90


def _llava():
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=16,
        )
    )


def _siglip():
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_select_strategy="full",
        )
    )


def _next():
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def _onevision():
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            video_token_id=IMAGE + 1,
            image_grid_pinpoints=PINPOINTS,
        )
    )


QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _qwen2():
    vision = {"depth": 3, "embed_dim": 24, "hidden_size": 32, "num_heads": 3, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **QWEN)
    )


MERGING = {
    "depth": 3,
    "hidden_size": 24,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 3,
    "patch_size": 4,
}


def _qwen25():
    vision = MERGING | {"window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **QWEN)
    )


def _internvl():
    vision = TOWER | {"image_size": [32, 32], "patch_size": [4, 4]}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**vision),
            text_config=Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            downsample_ratio=0.5,
        )
    )


def _paligemma():
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=GemmaConfig(**TEXT, head_dim=8),
            image_token_id=IMAGE,
            projection_dim=32,
        )
    )


def _idefics3():
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=TOWER | {"patch_size": 4},
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
        )
    )


def _qwen3():
    vision = MERGING | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = TEXT | {"rope_parameters": ROPE, "head_dim": 8}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN))


def _gemma3():
    layers = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SiglipVisionConfig(**TOWER | {"patch_size": 4}, vision_use_head=False),
            text_config=Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=512, layer_types=layers),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
        )
    )


KINDS = {
    "llava": _llava,
    "llava-siglip": _siglip,
    "llava-next": _next,
    "llava-onevision": _onevision,
    "qwen2-vl": _qwen2,
    "qwen2.5-vl": _qwen25,
    "internvl": _internvl,
    "paligemma": _paligemma,
}
MORE = {"gemma3": _gemma3, "idefics3": _idefics3, "qwen3-vl": _qwen3}
"""Kinds on which one method of every kind of signal is tested (tests/vlm/test_more_models.py)."""


@cache
def tiny(kind):
    """The model of a kind, with weights drawn from a fixed seed, large enough that attention is not flat."""
    transformers.utils.logging.set_verbosity_error()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (KINDS | MORE)[kind]().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


def one_row(inputs, row, images=1):
    """The inputs of one prompt of a batch with `images` images each."""
    own = slice(row * images, (row + 1) * images)
    alone = {}
    for name, value in inputs.items():
        if name == "pixel_values" and "image_grid_thw" in inputs:
            patches = int(inputs["image_grid_thw"][0].prod()) * images
            alone[name] = value[row * patches : (row + 1) * patches]
        elif name in ("pixel_values", "image_sizes", "image_grid_thw") and len(value) != len(
            inputs["input_ids"]
        ):
            alone[name] = value[own]
        else:
            alone[name] = value[row : row + 1]
    return alone


def of_sizes(model, sizes, seed):
    """A prompt of random text around noise images of these `sizes`, for a model that packs the crops of each."""
    sizes, generator = torch.tensor(sizes), torch.Generator().manual_seed(seed)
    packed = packed_crops(model.model, model.config, {"image_sizes": sizes})
    pixels = torch.zeros(len(sizes), max(image.cut for image in packed), 3, 32, 32)
    parts = [torch.randint(3, 80, (4,), generator=generator)]
    for own, image in zip(pixels, packed, strict=True):
        own[: image.cut].normal_(generator=generator)
        parts += [torch.full((image.length,), IMAGE), torch.randint(3, 80, (3,), generator=generator)]
    ids = torch.cat(parts)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


def together(prompts):
    """Prompts of `of_sizes` as one batch, padded on the left."""
    widest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    most = max(prompt["pixel_values"].shape[1] for prompt in prompts)

    def filled(name, value):
        if name == "pixel_values":
            return functional.pad(value, (0, 0) * 3 + (0, most - value.shape[1]))
        return value if name == "image_sizes" else functional.pad(value, (widest - value.shape[1], 0))

    batch = {name: torch.cat([filled(name, prompt[name]) for prompt in prompts]) for name in prompts[0]}
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def start(method, model):
    """Arguments of `prune`: what a method that must learn starts from, nothing for the others."""
    from tprune.methods import registry
    from tprune.models.vlm import anatomy
    from tprune.pipelines.run import pipeline
    from tprune.progress import Progress
    from tprune.recipe import ModelSource, Recipe, Stage

    built = registry.build(method, "vlm", SMALL.get(method))
    if built.learns != "required":
        return {}
    stage = Stage("vlm", method, set=SMALL.get(method, {}))
    driver = pipeline(Recipe(ModelSource("a model in memory"), (stage,)), stage, Progress())
    return {"state": built.neutral_state(driver.nominal(anatomy(model)), 0), **SMALL.get(method, {})}


SMALL = {
    "m3": {"scales": "36,576"},
    "glimpseprune": {"layer": 0, "width": 16, "condition": 16, "heads": 2},
    "par": {"depth": 1, "inner": 1.0},
}
"""Hyperparameters that keep what a method learns small."""


def speaking():
    """A new tiny LLaVA that knows the words of the built-in questions, and its processor."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from tprune.zoo.digits_llava import ID, WORDS, _processor

    side = {"height": 32, "width": 32}
    text = TEXT | {"vocab_size": len(WORDS), "eos_token_id": ID["<eos>"]}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**text),
        image_token_id=ID["<image>"],
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side),
        _processor().tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_processor().chat_template,
    )
    return model, processor
