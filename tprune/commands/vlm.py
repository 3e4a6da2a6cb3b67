"""`tprune vlm`."""

from tprune.commands.common import family_command

command = family_command("vlm", "Prune the visual tokens of a vision-language MODEL (a hub id or folder).")
