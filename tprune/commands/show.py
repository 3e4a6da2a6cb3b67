"""`tprune show`: what an output folder holds, and pictures of what its methods did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tprune import artifact
from tprune.errors import UserError
from tprune.recipe import Recipe, read

if TYPE_CHECKING:
    from tprune.evaluate.pictures import Picture


@click.command("show")
@click.argument("folder")
@click.option("--sample", type=click.IntRange(0), metavar="N", help="Draw sample N of the data, from 0 on.")
@click.option("--image", metavar="FILE", help="Draw this image instead.")
@click.option("--prompt", metavar="TEXT", help="Draw this text, or ask this about the image.")
@click.option("--pictures", is_flag=True, help="Draw sparsity and widths of pruned weights.")
@click.option("--to", metavar="DIR", help="Where pictures are written [./FOLDER-pictures].")
@click.option("--force", is_flag=True, help="Replace other pictures of the same names.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: str,
    sample: int | None,
    image: str | None,
    prompt: str | None,
    pictures: bool,
    to: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Say what the output FOLDER holds: method, budget, figures, files, how to load it.

    With --sample, --image or --prompt, draw what its token or cache method keeps of that; with --pictures, the sparsity
    and widths of pruned weights.
    """
    report, recipe = artifact.read_report(folder), read(Path(folder) / artifact.RECIPE)
    asked = sample is not None or image is not None or prompt is not None
    weights = any(stage.family == "llm-weights" for stage in recipe.stages)
    if pictures and not weights:
        raise UserError(f"--pictures: {folder} holds no pruned weights; draw --sample N or --image FILE")
    if (to is not None or force) and not asked and not pictures:
        what = "--pictures" if weights else "--sample N or --image FILE"
        raise UserError(f"--to and --force are about pictures; say of what: {what}")
    place = picture_folder(folder, to) if asked or pictures else None
    shown: dict[str, Any] = {"out": str(folder)}
    if not asked:
        shown = report | shown | {"files": sizes(folder)}
        if not as_json:
            print_folder(shown, recipe)
    drawn: list[Picture] = []
    if asked:
        drawn += draw_sample(folder, report, sample, image, prompt)
    if pictures:
        from tprune.pipelines.weights_pictures import of_folder

        drawn += of_folder(Path(folder), report, recipe)
    written = [] if place is None else write(drawn, place, force)
    if as_json:
        listed = [
            {"path": str(path), "title": picture.title, **picture.numbers}
            for path, picture in zip(written, drawn, strict=True)
        ]
        click.echo(json.dumps(shown | ({"pictures": listed} if listed else {})))
        return
    from tprune.evaluate.table import make_console

    for path, picture in zip(written, drawn, strict=True):
        if picture.terminal is not None:
            make_console().print(picture.terminal)
        click.echo(f"{path}: {picture.title}")


def sizes(folder: str) -> dict[str, int]:
    """Bytes of the files of a folder."""
    return {file.name: file.stat().st_size for file in sorted(Path(folder).iterdir()) if file.is_file()}


def print_folder(shown: dict[str, Any], recipe: Recipe) -> None:
    """Report, files and recipe, for people."""
    from tprune.evaluate.table import print_report

    print_report(shown)
    click.echo("\nfiles")
    for name, size in shown["files"].items():
        click.echo(f"  {name:<32} {size / 1e6:10.3f} MB")
    click.echo("\nrecipe")
    click.echo("".join(f"  {line}\n" for line in recipe.to_yaml().splitlines()), nl=False)


def picture_folder(folder: str, to: str | None) -> Path:
    """Where pictures go: beside an artifact, never in it.

    Raises:
        UserError: inside the artifact, or a file.
    """
    place = Path(to) if to is not None else Path(f"{Path(folder).resolve().name}-pictures")
    if place.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"--to {place}: an output folder stays as it was written; give one outside {folder}")
    if place.exists() and not place.is_dir():
        raise UserError(f"--to {place} is a file; give a folder")
    return place


def draw_sample(
    folder: str, report: dict[str, Any], sample: int | None, image: str | None, prompt: str | None
) -> list[Picture]:
    """Open the artifact and draw what its last method does to one sample."""
    from tprune.pipelines.base import Sample
    from tprune.pipelines.load import open_artifact
    from tprune.progress import Progress

    given = "--image" if image is not None else "--prompt" if sample is None else None
    if sample is not None and (image is not None or prompt is not None):
        raise UserError(f"--sample {sample} and {given or '--prompt'} exclude each other; give one of them")
    if report["family"] == "llm-weights":
        raise UserError(
            f"{folder} holds pruned weights, which no sample decides; tprune show {folder} --pictures draws them"
        )
    opened = open_artifact(folder, Progress())
    return opened.driver.pictures(opened.subject, opened.handles[-1], Sample(sample or 0, image, prompt))


def write(pictures: list[Picture], place: Path, force: bool) -> list[Path]:
    """The pictures as files in the folder `place`; a file that is there already may only be the same.

    Raises:
        UserError: other files of these names are there, or nothing can be written.
    """
    paths = [place / picture.name for picture in pictures]
    try:
        if not force:
            for path, picture in zip(paths, pictures, strict=True):
                if path.exists() and path.read_bytes() != picture.content:
                    raise UserError(f"{path} exists; give another folder with --to, or --force to replace it")
        for path, picture in zip(paths, pictures, strict=True):
            place.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.content)
    except OSError as error:
        raise UserError(f"--to {place}: cannot write there: {error.strerror}") from None
    return paths
