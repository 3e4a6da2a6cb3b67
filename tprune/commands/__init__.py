"""One file per command; a module is imported only when its command is called."""
