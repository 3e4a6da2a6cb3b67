"""A text with every token shaded by how much of it is kept: a page for the browser, colours for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from tprune.evaluate.pictures import Picture

PALE, STRONG = (24, 36, 66), (125, 190, 255)
"""Shades behind a token that is hardly kept, and one that is kept everywhere."""


@dataclass(frozen=True)
class Token:
    """One token: what it says, and the fraction of places that kept it."""

    text: str
    kept: float


@dataclass(frozen=True)
class Shaded:
    """Tokens for a terminal: shades behind them; piped, brackets around those that are mostly kept.

    Attributes:
        title, unit: what is shown, and of what the numbers are fractions.
        tokens: in their order.
    """

    title: str
    unit: str
    tokens: Sequence[Token]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Shades where there are colours, else a number per line."""
        yield Text(f"{self.title}\n{self.unit}")
        yield self.coloured() if console.is_terminal else Text(self.plain())

    def coloured(self) -> Text:
        """Dropped tokens dim, the others before a shade that is brighter the more they are kept."""
        text = Text()
        for token in self.tokens:
            text.append(token.text, style_of(token.kept))
        return text

    def plain(self) -> str:
        """A line of text per line, its mean in front; tokens kept by at least half in brackets."""
        shown = [f"{'kept':>5}  [ ]: kept by at least half"]
        for line in lines(self.tokens):
            mean = sum(token.kept for token in line) / len(line)
            parts = []
            for strong, run in groupby(line, key=lambda token: token.kept >= 0.5):
                words = "".join(token.text for token in run).replace("\n", "")
                core = words.strip()
                parts.append(words.replace(core, f"[{core}]") if strong and core else words)
            shown.append(f"{mean:>5.0%}  {''.join(parts)}")
        return "\n".join(shown)


def lines(tokens: Sequence[Token]) -> list[list[Token]]:
    """The tokens of every line, line ends included."""
    found: list[list[Token]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if "\n" in token.text:
            found.append([])
    return [line for line in found if line]


def style_of(kept: float) -> Style:
    """How a token looks that this fraction of places kept."""
    if kept <= 0:
        return Style(dim=True)
    shade = [round(low + (high - low) * kept) for low, high in zip(PALE, STRONG, strict=True)]
    return Style(color="black" if kept > 0.5 else "white", bgcolor="#{:02x}{:02x}{:02x}".format(*shade))


def text_picture(name: str, title: str, unit: str, tokens: Sequence[Token]) -> Picture:
    """The tokens as a self-contained page.

    Args:
        name: of the picture, without ending.
        title: over the text.
        unit: of what the numbers are fractions, such as "kept by layers and heads".
        tokens: in their order.
    """
    from jinja2 import Environment, PackageLoader

    mean = sum(token.kept for token in tokens) / max(1, len(tokens))
    loader = PackageLoader("tprune.evaluate", "")
    page = Environment(loader=loader, autoescape=True).get_template("tokens.html.jinja")
    content = page.render(title=title, unit=unit, mean=mean, tokens=tokens)
    numbers = {
        "mean": mean,
        "tokens": [{"text": token.text, "kept": round(token.kept, 6)} for token in tokens],
    }
    return Picture(f"{name}.html", title, content.encode(), numbers, Shaded(title, unit, tokens))
