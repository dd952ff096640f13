"""What a training leaves, to be compared bit for bit with another one's."""

import json

import torch

from memfree.training.checkpoints import latest_checkpoint


def trained_state(out):
    """The last checkpoint, the epochs, and the log of the loss and the exposures as bytes."""
    checkpoint = torch.load(latest_checkpoint(out / "checkpoints"), weights_only=True)
    # Lightning counts an epoch less that began after a checkpoint of the last one's end; the
    # position within the epoch is what matters.
    loops = checkpoint.pop("loops")
    checkpoint["position"] = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
    checkpoint["epochs"] = json.loads((out / "manifest.json").read_text())["epochs"]
    assert {"optimizer_states", "lr_schedulers", "current_model_state"} <= checkpoint.keys()
    files = ["logs/version_0/metrics.csv", "exposures.parquet"]
    return {"checkpoint": checkpoint, "files": [(out / name).read_bytes() for name in files]}


def difference(first, second, name="state"):
    """Where two nested values differ, tensors bit for bit; None where nowhere."""
    if isinstance(first, torch.Tensor):
        return None if torch.equal(first, second) else name
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return name
        pairs = ((difference(first[k], second[k], f"{name}.{k}")) for k in first)
        return next(filter(None, pairs), None)
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return name
        pairs = enumerate(zip(first, second, strict=True))
        return next(filter(None, (difference(a, b, f"{name}.{i}") for i, (a, b) in pairs)), None)
    return None if first == second else f"{name}: {first} / {second}"
