"""Evaluation: memorization, quality, detectors, intervals, pages."""

import lazy_loader

from memfree import with_moved_names

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = with_moved_names(
    __name__,
    __getattr__,
    {
        "audit": "memfree.commands.audit",
        "evaluate": "memfree.commands.evaluate",
        "report": "memfree.commands.report",
    },
)
