"""`tprune llm-context`."""

from tprune.commands.common import family_command

command = family_command("llm-context", "Prune a language MODEL's prompt tokens or its key-value cache.")
