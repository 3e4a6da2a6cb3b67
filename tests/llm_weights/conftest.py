import pytest

from tests.llm_weights import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.json"
    import json

    file.write_text(json.dumps(tiny.TEXT.split("\n\n")))
    return file


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")
