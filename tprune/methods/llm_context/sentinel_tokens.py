"""A sentinel token stands after every chunk of text, reads only that chunk, and sums it up for what follows."""

from tprune.methods.answer import NotAMethod
from tprune.methods.base import Paper


class SentinelTokens(NotAMethod):
    """A way to train, by which nothing leaves."""

    paper = Paper(
        title="Taking a Deep Breath: Enhancing Language Modeling of Large Language Models with Sentinel Tokens",
        venue="arXiv",
        year=2024,
        arxiv="2406.10985",
        checked="abstract",
    )
    why = (
        "it trains a language model further with one more token after every chunk; nothing is removed, and the token "
        "means nothing to a model that was not trained so"
    )
    piece = (
        "the mask by which a token reads its own chunk and later ones read the token, for models trained with it; "
        "for others llm-context/streaming-llm keeps the first and the last entries"
    )
