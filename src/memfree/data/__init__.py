"""Sources, declared duplication, dataset folders and the streams that training reads."""

import lazy_loader

from memfree import with_moved_names

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = with_moved_names(
    __name__,
    __getattr__,
    {
        "ExposureCounter": "memfree.training",
        "prepare": "memfree.commands.prepare",
    },
)
