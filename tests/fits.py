"""What the tests of methods that learn share, whatever the family."""

import torch

from tprune.pipelines import fit_loop


def same(one, two):
    """Whether two sets of named tensors are the same, bit by bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class StoppedError(Exception):
    """What ends a run that is interrupted."""


def stopping(step, monkeypatch):
    """Every step is a checkpoint, and that one which comes as the `step`-th ends its run before it is saved.

    Returns:
        A list that grows by every step that any run takes.
    """
    note, seen = fit_loop.Loop._note, []

    def stop(loop, found):
        seen.append(found)
        if len(seen) == step:
            raise StoppedError
        note(loop, found)

    monkeypatch.setattr("tprune.training.SAVE_EVERY_SECONDS", 0)
    monkeypatch.setattr(fit_loop.Loop, "_note", stop)
    return seen


def interrupted(run, folder, monkeypatch):
    """Run `run`, which checkpoints every step in `folder`, until its second step ends it; then again, to its result."""
    note = fit_loop.Loop._note

    def stop(loop, found):
        note(loop, found)
        if loop.begin == 0 and len(list(folder.iterdir())) == 1:
            raise StoppedError

    monkeypatch.setattr("tprune.training.SAVE_EVERY_SECONDS", 0)
    monkeypatch.setattr(fit_loop.Loop, "_note", stop)
    try:
        run()
    except StoppedError:
        return run()
    raise AssertionError("nothing stopped the first run")
