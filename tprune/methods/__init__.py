"""The methods: one folder per family, one file per paper; the folders are the registry.

The module itself can be called: `tprune.methods("vit")` lists the methods of a family, `tprune.methods()` all.
"""

import sys
from types import ModuleType


class _Listing(ModuleType):
    def __call__(self, family: str | None = None) -> list:
        """All methods, or those of one family, with their papers and hyperparameters (`registry.Facts`)."""
        from tprune.methods.registry import facts

        return facts(family)


sys.modules[__name__].__class__ = _Listing
