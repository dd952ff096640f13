"""Diffusion models as Lightning modules, and as diffusers folders."""

import lazy_loader

from memfree import with_moved_names

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = with_moved_names(
    __name__,
    __getattr__,
    {
        "ExponentialMovingAverage": "memfree.training",
        "FiniteTraining": "memfree.training",
        "SampleGrid": "memfree.training",
    },
)
