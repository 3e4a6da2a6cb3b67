"""What pruning cost and what it saved: quality, FLOPs, latency, memory; tables."""
