"""The shared mathematics of pruning: score the units, choose under a budget, reduce.

Pure tensor functions that know nothing of models, files or families:

- `score`: attention rows and columns, page rank, similarities, norms: what a unit is worth;
- `match`: which tokens resemble which: bipartite matching and greedy diversity;
- `greedy`: sets built pick by pick: diverse, covering, of large determinant;
- `select`: exact, stable choices under a count, per row, per layer or n:m;
- `reduction`: what happens to the tokens, as a value that can be applied, undone and drawn;
- `budget`: from "keep this fraction" to a method's own stage sizes, and back;
- `statistics`: norms, Gram matrices and moments of a layer's inputs, gathered batch by batch;
- `solve`: weight reconstruction.
"""
