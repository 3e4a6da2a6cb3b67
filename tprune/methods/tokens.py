"""What a method that drops or merges tokens declares, is given and gives back; without torch."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tprune.errors import UserError
from tprune.methods.base import Method
from tprune.methods.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from tprune.core.budget import Site, Stage
    from tprune.core.reduction import Reduction
    from tprune.methods.attention import Attention
    from tprune.methods.fit import Fit
    from tprune.methods.token_view import TokenView


@dataclass(frozen=True)
class TokenMethod(Method):
    """Units are tokens of one sequence, in a ViT, before or inside a VLM's decoder, or in an LLM's prefill."""

    needs_cls: ClassVar[bool] = False
    needs_image: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("attention",)
    """What of the view is read and costs something to provide: "attention", "encoder", "projector", "seeds",
    "sublayers", "neurons", "embeddings", "before" (what the layer before a site was given), "beside" (what tokens of
    the method's own become behind the prompt)."""
    unit: ClassVar[str] = "image"
    """What a view holds at a VLM's projector: a whole "image", or each "crop" of it by itself."""
    native: ClassVar[tuple[str, ...]] = ()
    """The hyperparameters that are themselves a budget; --keep takes their place, so both is a contradiction."""
    under_keep: ClassVar[dict[str, Any]] = {}
    """What hyperparameters are under --keep, so that it fixes all counts; with other values the data decides."""
    positions: ClassVar[str] = "original"
    """Whether tokens that stay keep their "original" position ids, or are renumbered to be "compact"; or "closed": as
    "original", and text begins right behind the largest that is left of the image before it."""
    positions_inside: ClassVar[str | None] = None
    """The same for what leaves inside a VLM's decoder, where it differs from what leaves at the projector."""
    cascades: ClassVar[bool] = False
    """Whether it decides about a decoder's attention heads too: `heads` and `attend` are then asked, and `reduce` has
    in `memory["heads"]`, bool [B, H], those that were left in the layer before a site."""
    projects: ClassVar[bool] = False
    """Whether tokens are merged before a VLM's projector: the view then holds what the projector makes tokens of, class
    tokens in front, and what is merged is projected again."""
    before_tower: ClassVar[bool] = False
    """Whether what leaves at a VLM's projector leaves before a tower that sees images as one sequence; `reduce` is
    asked there too, and has the pixels and the grid alone."""
    calibrates: ClassVar[bool] = False
    """Whether `state` comes from a look at `images` calibration images, before anything is pruned or fitted."""
    restores: ClassVar[bool] = False
    """Whether all that left is back after the last block, with the values it left with; `finish` is called before."""
    routes: ClassVar[bool] = False
    """Whether whole layers of a decoder are passed by. Stages that skip both its sublayers say how many; `reduce` has
    that in `memory["passed"]`, int64 [B], and leaves in `memory["passes"]`, bool [B, depth], which."""
    returns: ClassVar[bool] = False
    """Whether what leaves inside a decoder passes one layer by: at the next site it is back, with the values it left
    with. There `view.attention` is among the tokens that the layer between had."""
    sees: ClassVar[bool] = False
    """Whether its reductions may say what the next attention sees (`core.reduction.Sight`)."""

    def check(self, shape: Shape) -> None:
        """Raise UserError where the model lacks what the method reads."""
        if self.needs_cls and not shape.has_cls:
            raise UserError(
                f"{self.id} reads the attention of the class token, and this model has none; use a method that does "
                "without, such as random, or a model with a class token"
            )
        if self.needs_image and shape.video is not None:
            raise UserError(
                f"{self.id} works on the patches of one image, and this model sees videos; use another method, such as "
                "random, or a model of images"
            )

    def encoder_blocks(self, depth: int) -> Sequence[int]:
        """The blocks of a vision tower of so many that are seen beside the projected one (reads "encoder")."""
        return ()

    def tower_blocks(self, depth: int, projected: int) -> Sequence[int]:
        """The blocks of a vision tower, ascending, behind which leaves what leaves at the projector, where the tower
        allows it (unit "crop"); none: behind the tower. It has `depth`, and `projected` is the one that is projected.

        `reduce` is asked behind each of them with the same `memory`, and at the projector again, for the same.
        """
        return ()

    def stages(self, shape: Shape, knob: float | None) -> list[Stage]:
        """Where tokens leave and how many are left.

        Args:
            shape: the model and the number of prunable tokens.
            knob: 0 to 1, the paper's proportions scaled so that more is kept as it rises and 1 keeps all;
                None for the hyperparameters as they stand.
        """
        raise NotImplementedError

    def weighs_by_size(self) -> bool:
        """Whether attention after a merge counts a token as often as the tokens it stands for (log-size bias)."""
        return False

    def watches(self, depth: int) -> Sequence[int]:
        """The decoder's layers whose attention `watch` is shown, in prompts and behind them (reads "attention")."""
        return ()

    def watch(
        self,
        layer: int,
        attention: Attention,
        last: Tensor,
        image: Tensor,
        total: int,
        memory: dict[str, Any],
    ) -> None:
        """Look at a layer that `watches` names.

        Args:
            layer: which.
            attention: of the prompt, or of what came behind it, over all T keys of the layer.
            last: int64 [B, 1], the place of every row's latest token among the queries.
            image: int64 [B, T], which of its row's image tokens each key is, counted from 0; -1 for all else.
            total: how many image tokens the row with the most of them had.
            memory: lasts from prompt to prompt until `reset` of the handle; `reduce` has it as `memory["episode"]`.
        """
        raise NotImplementedError

    def hides(self) -> bool:
        """Whether what leaves inside a decoder is hidden from attention, and goes on being computed and cached."""
        return False

    def uniform(self) -> bool:
        """Whether what leaves inside a decoder, at one site, leaves the caches of the layers before it too."""
        return False

    def evicts(self) -> bool:
        """Whether image tokens leave each layer's cache, per key-value head, once the prompt has gone through in full.

        `worth` and `counts` are then asked, and never `reduce`; a stage says how many entries stay from its layer on.
        """
        return False

    def worth(self, attention: Attention, image: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's entries are worth, larger is better: [B, G, T]; and what `counts` wants to know of it: [B].

        Args:
            attention: of the whole prompt.
            image: bool [B, T], the image tokens.
            last: int64 [B, 1], the place of each row's last real token.
        """
        raise NotImplementedError

    def counts(self, facts: Tensor, images: Tensor, wanted: Tensor | None) -> Tensor:
        """How many image entries every head of each layer keeps: int64 [L, B].

        Args:
            facts: [L, B], of `worth`.
            images: int64 [B], how many image tokens each row has.
            wanted: int64 [B], what stays where the stages say so, a mean over the layers from the stage's on; None for
                the hyperparameters as they stand.
        """
        raise NotImplementedError

    def edits_attention(self) -> bool:
        """Whether blocks that tokens leave use an attention map that the method has changed."""
        return False

    def edit_attention(self, attention: Tensor) -> Tensor:
        """The map that such a block uses instead of its own softmaxed one, float32 [B, H, N, N].

        Nobody else reads that one: it may be changed in place.
        """
        raise NotImplementedError

    def decays(self) -> bool:
        """Whether a state-space model's state goes on decaying over the places of tokens that have left."""
        return False

    def skip_scale(self) -> float:
        """What a block multiplies its input by where a stage skips its attention, before the MLP adds to it."""
        return 1.0

    def calibrate(
        self, shape: Shape, keep: float | None, outputs: Callable[[Sequence[int]], Tensor]
    ) -> dict[str, Tensor]:
        """What `state` shall be, where `calibrates`.

        Args:
            shape: of the model.
            keep: the budget, as `--keep` means it; None for the hyperparameters as they stand.
            outputs: what the model makes of the calibration images while the attention of these blocks is skipped:
                float [S, C].
        """
        raise NotImplementedError

    def heads(self, shape: Shape, stages: Sequence[Stage]) -> list[int]:
        """How many attention heads every layer of a decoder keeps, where the method `cascades`; never rising.

        Args:
            shape: the model and the number of prunable tokens.
            stages: where these leave.
        """
        return [shape.heads] * shape.depth

    def attend(self, attention: Attention) -> Tensor | None:
        """What the heads read in the method's own way, [B, H, N, d], where it `cascades`; None: the model's kernel."""
        return None

    def revives(self) -> bool:
        """Whether tokens that left inside a decoder may come back in calls that follow the prompt: see `recall`."""
        return False

    def recall(self, attention: Attention, last: Tensor) -> Tensor:
        """What the tokens of a cache are worth to one that comes after them, larger is better: [B, T].

        Args:
            attention: of the layer before a site; it looks at no token that an earlier site has hidden.
            last: int64 [B, 1], the row of the latest token among its queries.
        """
        raise NotImplementedError

    def rejoins(self, shape: Shape) -> Site | None:
        """The site where all that left comes back with the values it left with; None: never.

        In a vision model it is the last of `stages`; in a decoder `reduce` is not asked there.
        """
        return None

    def counted(self) -> typing.Self:
        """The method under --keep, where `stages` fixes all counts: itself, unless the data decides without it."""
        return dataclasses.replace(self, **self.under_keep) if self.varies() else self

    def varies(self) -> bool:
        """Whether the data decides how many tokens each image keeps; `stages` then says how many at most."""
        return any(getattr(self, name) != value for name, value in self.under_keep.items())

    def check_budget(self, knob: float | None) -> None:
        """Raise UserError where nothing says how many stay: neither the data nor a budget."""
        if knob is None and not self.varies():
            fixed = ", ".join(f"{name}={value}" for name, value in self.under_keep.items()).lower()
            raise UserError(f"{self.id}: --set {fixed} leaves the numbers to --keep; give it a budget")

    def fit(self, shape: Shape, keep: float | None, seed: int) -> Fit:
        """The method in training (`learns` is not "no").

        Args:
            shape: of the model.
            keep: the budget, as `--keep` means it; None for the hyperparameters as they stand.
            seed: of initial values.

        Raises:
            UserError: a budget or hyperparameters that cannot be fitted to.
        """
        raise NotImplementedError

    def unpruned(self) -> typing.Self:
        """The method as it runs with a budget of 1, of one that `restores`: what pruning is compared with."""
        raise NotImplementedError

    def neutral_state(self, shape: Shape, seed: int) -> dict[str, Tensor]:
        """What `state` is before any step of a fit, for contract tests and to be timed."""
        return self.fit(shape, 0.5, seed).state()

    def loosened(self, knob: float, shape: Shape) -> typing.Self:
        """The fitted method keeping more: 0 keeps least, 0.5 is as learned, 1 keeps all; for counts that vary."""
        raise NotImplementedError

    def reduce(
        self, site: Site, view: TokenView, count: int | Tensor, memory: dict[str, Any]
    ) -> Reduction | None:
        """What happens at `site`; None inside a decoder where all stay, for methods that only look there.

        Args:
            site: one of `stages`.
            view: the tokens and the signals of the block they come from.
            count: how many prunable tokens shall be left; int64 [B] on the CPU where rows differ.
            memory: what this forward carries from site to site; empty at its start.
        """
        raise NotImplementedError

    def finish(self, view: TokenView, memory: dict[str, Any]) -> None:
        """After the last block, of a method that `restores`: a look at what is left.

        A map of what all patches show goes into `memory["map"]`, probabilities [B, N, names].
        """
