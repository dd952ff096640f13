from collections.abc import Callable, Mapping
from typing import Any

from .commands.audit import audit as audit
from .guidance import GuidanceSettings as GuidanceSettings
from .pipeline_guard import guard as guard
from .retrieval import ReferenceIndex as ReferenceIndex

__version__: str

def with_moved_names(
    package: str, attribute: Callable[[str], Any] | None, moved: Mapping[str, str]
) -> Callable[[str], Any]: ...
