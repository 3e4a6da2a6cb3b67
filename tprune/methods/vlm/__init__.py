"""Visual token pruning in vision-language models: one file per paper."""
