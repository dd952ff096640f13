"""One network out of a diffusers folder, with one clear line for whatever is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfree.models.untrusted_folder import check_network
from memfree.untrusted import short

_TALKATIVE = ("models.modeling_utils", "configuration_utils")


def load_network(kind: Any, folder: Path) -> Any:
    """Load a network of the diffusers class ``kind``, in float32 on the CPU.

    Raises:
        ValueError: there is none, it cannot be read, or its weights are of another network.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no network: train the model again or copy it whole")
    with _silent():
        check_network(kind, folder)
    try:
        with _silent():
            # Safetensors only: a pickle from a stranger could execute code.
            network, keys = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                # The default needs accelerate, and asks for it at every load where that is missing.
                low_cpu_mem_usage=False,
                # diffusers would go on with random weights, or list every weight that does not fit.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be read as a diffusers network: {short(error, 120)}"
        ) from error
    mismatched = [name for name, *_ in keys["mismatched_keys"]]
    if wrong := [*keys["missing_keys"], *keys["unexpected_keys"], *mismatched]:
        raise ValueError(
            f"{folder}: the weights are of another network than config.json ({wrong[0]} does not "
            "fit): copy the model folder whole"
        )
    return network


@contextmanager
def _silent() -> Iterator[None]:
    """Keep diffusers from saying at length what is said here in one line."""
    logs = [logging.getLogger(f"diffusers.{name}") for name in _TALKATIVE]
    for log in logs:
        log.disabled = True
    try:
        yield
    finally:
        for log in logs:
            log.disabled = False
