"""Gradients of the dense model's loss with respect to its prunable weights, or to what its units put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tprune.models.blocks import Decoder
from tprune.models.encoder_decoder import fed, foretold

POWERS = {"gradient": 2, "gradient_mean": 1, "gradient_square": 2}
"""To which power gradients are summed."""
SENSITIVITY = "sensitivity"
"""What `sensitivities` measures."""
TRIPLES = "triples"
"""Gradients of contrastive losses, of two sets of triples (`embeddings.TripleSets`)."""
USAGE = "usage"
"""What a training under routing counts, [U] by the projection that reads the units (`models.routed`)."""
MEASURED = (*POWERS, SENSITIVITY, TRIPLES)
"""Statistics that need backward passes of the dense model."""


def gradient_norms(decoder: Decoder, sequences: Iterable[Tensor]) -> dict[str, Tensor]:
    """The L2 norm of every weight's gradient over sequences: sqrt(Σ_n g_n²), float32, by parameter name."""
    return gradient_statistics(decoder, sequences, ("gradient",))["gradient"]


def losses(model: nn.Module, sequences: Iterable[Tensor], classes: Tensor | None = None) -> Iterator[Tensor]:
    """The loss of each sequence int64 [L], with its graph: of what is `foretold` of it, or of its class in `classes`
    int64 [N]; or what each computes of the model itself, as those of a `Feed` do.
    """
    for place, sequence in enumerate(sequences):
        with torch.enable_grad():
            if callable(sequence):
                loss = sequence(model)
            else:
                ids = sequence.to(model.get_input_embeddings().weight.device).unsqueeze(0)
                labels = (
                    foretold(model, ids) if classes is None else classes[place : place + 1].to(ids.device)
                )
                loss = model(**fed(model, ids), labels=labels, use_cache=False).loss
        yield loss


def from_embeddings(model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Gradients flow to the embedded tokens, whatever else asks for them, until the hook is removed."""
    return model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, out: out.detach().requires_grad_()
    )


def sensitivities(
    decoder: Decoder, sequences: Iterable[Tensor], classes: Tensor | None, readers: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """How much the loss depends on every input of some modules, and on the outputs of every block: float32 [C] each.

    Σ over sequences of the square of the mean over tokens of the loss's gradient there. What asks for gradients is as
    before afterwards.

    Args:
        decoder: dense.
        sequences, classes: as `losses` takes them.
        readers: the modules by name; blocks are known by theirs.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            square = gradient.detach().float().flatten(0, -2).mean(0).square()
            found[name] = found.get(name, 0) + square

        value.register_hook(add)

    with asking_for(decoder.model, ()), from_embeddings(decoder.model), ExitStack() as stack:
        for name, module in readers.items():
            stack.enter_context(
                module.register_forward_pre_hook(
                    lambda module, arguments, name=name: watch(name, arguments[0])
                )
            )
        for index, block in enumerate(decoder.blocks):
            name = decoder.block_name(index)
            stack.enter_context(
                block.register_forward_hook(
                    lambda module, arguments, out, name=name: watch(
                        name, out[0] if isinstance(out, tuple) else out
                    )
                )
            )
        for loss in losses(decoder.model, sequences, classes):
            loss.backward()
    return {name: total.cpu() for name, total in found.items()}


def gradient_statistics(
    decoder: Decoder, sequences: Iterable[Tensor], kinds: Sequence[str], classes: Tensor | None = None
) -> dict[str, dict[str, Tensor]]:
    """What is asked for of every weight's gradients g_n over N sequences, float32, by kind and parameter name.

    One sequence per backward pass, its loss the mean over its predicted tokens; a gradient is taken in as soon as it
    is there, so that those of one parameter are alive at a time. The sums, each as large as the prunable weights, are
    held on the CPU.

    Args:
        decoder: dense; its gradients and what asks for them are as before afterwards.
        sequences, classes: as `losses` takes them.
        kinds: "gradient", sqrt(Σ_n g_n²); "gradient_mean", Σ_n g_n / N; "gradient_square", Σ_n g_n² / N.
    """
    parameters = {
        matrix.parameter_name: matrix.parameter
        for index in range(len(decoder.blocks))
        for matrix in decoder.matrices(index)
    }
    powers = [POWERS[kind] for kind in kinds]
    count = 0
    with summing_powers(decoder.model, parameters, "cpu", powers) as sums:
        for loss in losses(decoder.model, sequences, classes):
            loss.backward()
            count += 1
    found = dict(zip(kinds, sums, strict=True))
    for kind, totals in found.items():
        for total in totals.values():
            total.sqrt_() if kind == "gradient" else total.div_(count)
    return found


@contextmanager
def summing_squares(
    module: nn.Module, parameters: dict[str, nn.Parameter], device: torch.device | str
) -> Iterator[dict[str, Tensor]]:
    """Squares of gradients, as `summing_powers` gives them."""
    with summing_powers(module, parameters, device, [2]) as (squares,):
        yield squares


@contextmanager
def summing_powers(
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    device: torch.device | str,
    powers: Sequence[int],
) -> Iterator[list[dict[str, Tensor]]]:
    """Powers of gradients, float32 on `device`, by the names of `parameters`: each backward pass in here adds its own.

    What asks for gradients in `module`, and what they are, is as before afterwards.
    """
    sums = [
        {
            name: torch.zeros(held.shape, dtype=torch.float32, device=device)
            for name, held in parameters.items()
        }
        for _ in powers
    ]
    with asking_for(module, parameters.values()):
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                _adding_to([(total[name], power) for total, power in zip(sums, powers, strict=True)])
            )
            for name, parameter in parameters.items()
        ]
        try:
            yield sums
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def asking_for(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Of all in `module` these parameters alone ask for gradients, and start without; afterwards all is as before."""
    asked = {parameter: (parameter.requires_grad, parameter.grad) for parameter in module.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, (wanted, gradient) in asked.items():
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _adding_to(totals: list[tuple[Tensor, int]]) -> Callable[[nn.Parameter], None]:
    """A hook that adds powers of a parameter's gradient and lets go of it."""

    def add(parameter: nn.Parameter) -> None:
        gradient = parameter.grad.detach().float()
        for total, power in totals:
            total.add_(gradient.pow(power).to(total.device))
        parameter.grad = None

    return add
