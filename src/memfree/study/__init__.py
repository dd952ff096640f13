"""Studies: models sampled in many ways, over several training seeds."""

from memfree import with_moved_names

__getattr__ = with_moved_names(
    __name__,
    None,
    {
        "study": "memfree.commands.study",
        "text_study": "memfree.commands.study",
    },
)
