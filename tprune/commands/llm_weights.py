"""`tprune llm-weights`."""

from tprune.commands.common import family_command

command = family_command("llm-weights", "Prune the weights, heads, channels or blocks of a language MODEL.")
