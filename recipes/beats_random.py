"""Every method that prunes image classifiers against random drop, on the built-in digits-vit: means and noise.

    .venv/bin/python recipes/beats_random.py [--keep 0.7,0.5] [--method ID,…] [--fit] [--out points.jsonl]

The 2,000 evaluation scenes are five parts of 400. On part i random drop, and whatever else draws, has seed i, and a
method is compared with it on the same scenes: the noise is that of seed and scenes together, for methods that draw
nothing that of the scenes. With --fit what can learn learns first, once per budget (`--fit built-in`, seed 0), as what
is calibrated is calibrated once; without, what must learn is left out. A line is written as soon as it is measured, and
lines that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev

import torch

import tprune
from tprune.data import images
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import load
from tprune.models.source import resolve
from tprune.recipe import ModelSource

PARTS, SCENES = 5, 400
FLOOR = "random"


def model():
    """A fresh digits-vit with its preprocessing: a fit may have changed the last one."""
    return load.load(resolve(ModelSource("digits-vit"), "vit"), "vit", device="cpu", dtype="float32", seed=0)


def accuracies(subject, pixels, labels, prune):
    """Percent right on every part, and the fraction kept; `prune` takes a seed."""
    found, kept = [], []
    for part, (batch, truth) in enumerate(zip(pixels.split(SCENES), labels.split(SCENES), strict=True)):
        with prune(part) as handle, torch.no_grad():
            guesses = torch.cat([subject.model(some).argmax(-1) for some in batch.split(50)])
            kept.append(handle.achieved().value)
        found.append(100 * (guesses == truth).double().mean().item())
    return found, mean(kept)


def measured(method, keep, fits, pixels, labels):
    """One line: a method at a budget."""
    line, subject = {"method": method, "keep": keep, "fit": fits}, model()

    def prune(seed, **more):
        return tprune.prune(subject.model, f"vit/{method}", keep=keep, seed=seed, **more)

    try:
        if fits or registry.load(method, "vit").calibrates:
            fit = "built-in" if fits else None
            with prune(0, fit=fit, tokenizer=subject.processor) as handle:
                found = accuracies(subject, pixels, labels, lambda seed: nullcontext(handle))
        else:
            found = accuracies(subject, pixels, labels, prune)
        line["accuracy"], line["achieved"] = found
    except UserError as error:
        line["reason"] = str(error)
    return line


def wanted(methods, fits):
    """(method, whether it is fitted) of all that are asked for; random first."""
    known = [fact.id for fact in registry.facts("vit")] if methods == ["all"] else methods
    for name in dict.fromkeys([FLOOR, *known]):
        learns = registry.load(name, "vit").learns
        if learns != "required":
            yield name, False
        if fits and learns != "no":
            yield name, True


def tell(lines):
    """A table in Markdown: accuracy, its difference to random on the same scenes, and in how many parts it is above."""
    floors = {line["keep"]: line["accuracy"] for line in lines if line["method"] == FLOOR}
    print("| method | keep | kept | accuracy | above random | parts above |\n|---|---|---|---|---|---|")
    for line in sorted(lines, key=lambda line: (-line["keep"], -mean(line.get("accuracy", [0])))):
        name = line["method"] + (" --fit" if line["fit"] else "")
        if "reason" in line:
            print(f"| {name} | {line['keep']} | | {line['reason']} | | |")
            continue
        own = line["accuracy"]
        gaps = [a - b for a, b in zip(own, floors[line["keep"]], strict=True)]
        print(
            f"| {name} | {line['keep']} | {line['achieved']:.3f} | {mean(own):.1f} ± {stdev(own):.1f} "
            f"| {mean(gaps):+.1f} ± {stdev(gaps):.1f} | {sum(gap > 0 for gap in gaps)} of {PARTS} |"
        )


def main():
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", default="0.7,0.5")
    parser.add_argument("--method", default="all")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("beats_random.jsonl"))
    options = parser.parse_args()
    lines = (
        [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    )
    done = {(line["method"], line["keep"], line["fit"]) for line in lines}
    budgets = [float(word) for word in options.keep.split(",")]
    missing = [
        (name, keep, fits)
        for name, fits in wanted(options.method.split(","), options.fit)
        for keep in budgets
        if (name, keep, fits) not in done
    ]
    if missing:
        scenes, prepare = images.built_in(PARTS * SCENES), model().processor
        pixels = torch.stack([prepare(scenes.open(place)) for place in range(len(scenes))])
        for one in missing:
            lines.append(measured(*one, pixels, torch.tensor(scenes.labels)))
            with options.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    tell(lines)


if __name__ == "__main__":
    main()
