"""LoRAs that are loaded inside a guarded block: those of another model are refused in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def loading_adapters(kind: Any) -> Callable[..., None]:
    """``load_lora_weights`` of a pipeline's class, with a message that says what is wrong.

    Where the weights are of other shapes than the pipeline's, diffusers lists every layer, and
    leaves behind what it loaded into other parts of the pipeline; here that goes as well.

    Raises:
        ValueError: by the returned method: the LoRA was trained for another model.
    """

    @functools.wraps(kind.load_lora_weights)
    def load_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        before = _names(self)
        try:
            kind.load_lora_weights(self, *args, **kwargs)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            if new := sorted(_names(self) - before):
                self.delete_adapters(new)
            raise ValueError(
                f"memfree.guard: the LoRA does not fit this {kind.__name__}: it was trained for a "
                "model of other shapes"
            ) from error

    return load_lora_weights


def _names(pipe: Any) -> set[str]:
    """Adapters in any part of the pipeline."""
    return {name for names in pipe.get_list_adapters().values() for name in names}
