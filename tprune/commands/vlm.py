"""`tprune vlm`."""

from tprune.commands.common import family_command

command = family_command(
    "vlm",
    """Prune the visual tokens of a vision-language MODEL (a hub id or folder).

    \b
      tprune vlm --method visionzip --keep 0.25 digits-llava
      tprune vlm --method covipal --keep 0.5 --fit built-in --out DIR digits-llava
      tprune methods vlm covipal
    """,
)
