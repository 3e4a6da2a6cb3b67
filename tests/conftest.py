"""Settings and tiny models shared by all tests: one thread, no hub, nothing left behind."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch
from hypothesis import settings

settings.register_profile("tprune", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tprune")


SEED = int(os.environ.get("TPRUNE_TEST_SEED", "0"))
"""Of torch's own generator; the suite must pass with any."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Weights that a test leaves to chance are the same in every run, whatever ran before."""
    torch.manual_seed(SEED)


def pytest_collection_finish():
    """What is imported by now stays: collecting it again and again took half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def tiny_vit(**changes):
    """A timm VisionTransformer of 4 blocks and 16 patches with weights drawn from a fixed seed."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        arguments = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 3,
            "mlp_ratio": 2.0,
            "num_classes": 5,
        } | changes
        model = VisionTransformer(**arguments).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


SMALL = {"bavit": {"width": 24, "blocks": 1}, "dtop": {"channels": 24, "decoder": 1}}
"""Hyperparameters that keep what a method learns small."""


def start(method, model):
    """Arguments of `prune`: what a method that must learn or calibrates starts from, nothing for the others."""
    from tprune.methods import registry
    from tprune.models.kinds import dissect

    method = registry.build(method, "vit", SMALL.get(method))
    if method.learns != "required" and not method.calibrates:
        return {}
    return {"state": method.neutral_state(dissect(model).shape, 0)}


@pytest.fixture
def vit():
    return tiny_vit()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    """A tiny timm model on disk, in timm's own format."""
    import timm

    from tprune.models import save
    from tprune.models.source import Source
    from tprune.models.subject import Subject

    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=4,
            num_heads=3,
            num_classes=10,
        )
    save.model(Subject(model, None, Source("tiny-vit", "folder", str(folder), "timm")), folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text for a tiny tokenizer."""
    import json

    from tests.llm_weights import tiny

    file = tmp_path_factory.mktemp("text") / "text.json"
    file.write_text(json.dumps(tiny.TEXT.split("\n\n")))
    return file


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer on disk."""
    from tests.llm_weights import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "llama")
