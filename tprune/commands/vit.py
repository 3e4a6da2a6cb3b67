"""`tprune vit`."""

from tprune.commands.common import family_command

command = family_command(
    "vit", "Prune the patch tokens of a vision transformer MODEL (a timm name, hub id or folder)."
)
