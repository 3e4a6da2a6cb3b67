"""Token reduction in vision transformers: one file per paper."""
