"""The methods: one folder per family, one file per paper; the folders are the registry."""
