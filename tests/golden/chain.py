"""The chain of commands whose folders lie in kept/, and what is compared of them.

``python tests/golden/chain.py`` makes kept/ anew. That is right only where bits are meant to
change.
"""

import hashlib
import io
import json
import os
import runpy
import shutil
import sys
import tarfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from pyarrow import parquet

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = HERE / "kept"
MITIGATIONS = ("none", "amg", "multiplicity", "both")
STEPS = 60
STOPPED = 40

PREPARE = {
    "source": "digits",
    "seed": 3,
    "parts.train": 60,
    "parts.calibration": 100,
    "parts.test": 20,
    "parts.fit": 20,
    "plan.images": 6,
    "plan.factor": 12,
    "plan.choice": "balanced",
    "plan.seed": 3,
}
TRAIN = {
    "model.network.block_out_channels": "[8,16]",
    "model.network.attention": "[false,true]",
    "model.class_conditional": "true",
    "model.warmup_steps": 5,
    "model.ema_decay": 0.9,
    "data.batch_size": 32,
    "trainer.max_steps": STEPS,
    "trainer.checkpoint_every_n_steps": STOPPED,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "seed": 3,
}
SAMPLE = {
    "count": 12,
    "batch_size": 5,
    "steps": 12,
    "scheduler": "ddpm",
    "guidance_scale": 2,
    "guidance.false_positive_rate": 0.95,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "seed": 3,
}


def run(command, **options):
    """One command in this process, as a shell would start it."""
    words = [f"--{name}={value}" for name, value in options.items()]
    if command in ("train", "sample"):
        script = ROOT / f"{command}.py"
        with mock.patch.object(sys, "argv", [str(script), *words]):
            runpy.run_path(str(script), run_name="__main__")
    else:
        from memfree.cli.entry import main

        main([command, *words])


def prepare(out):
    run("prepare", out=out, **PREPARE)


def index(data, out):
    run("index", dataset=data, out=out)


def train(data, out):
    run("train", **{"data.path": data}, out=out, **TRAIN)


def sample(model, index, mitigation, out):
    run(
        "sample", model=model, index=index, out=out, **SAMPLE, **{"guidance.mitigation": mitigation}
    )


def evaluate(root, out):
    named = {f"samples.{name}": root / "samples" / name for name in MITIGATIONS}
    run(
        "evaluate",
        dataset=root / "data",
        index=root / "index",
        out=out,
        **named,
        false_positive_rate=0.05,
    )


def make(root):
    """Every folder of the chain, and a training that was stopped on its way."""
    prepare(root / "data")
    index(root / "data", root / "index")
    watching = threading.Thread(target=keep_checkpoint, args=(root / "model", root / "stopped"))
    watching.start()
    train(root / "data", root / "model")
    watching.join()
    for mitigation in MITIGATIONS:
        sample(root / "model", root / "index", mitigation, root / "samples" / mitigation)
    evaluate(root, root / "evaluation")


def keep_checkpoint(model, out):
    """A training folder as it is when the process is killed after STOPPED steps."""
    path = model / "checkpoints" / f"step-{STOPPED:08d}.ckpt"
    while not path.exists():
        time.sleep(0.005)
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(path, out / "checkpoints")
    shutil.copy(model / "config.yaml", out)


def files(folder):
    """SHA-256 of the files of a folder whose bytes depend on nothing but the options."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".tar", ".npy")
    }


def columns(path):
    """A table's columns as arrays by name."""
    table = parquet.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def pictures(folder):
    """Samples of a folder (n, H, W) uint8, in the order of their names."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".png"):
                    data = archive.extractfile(member).read()
                    found[member.name] = np.array(Image.open(io.BytesIO(data)))
    return np.stack([found[name] for name in sorted(found)])


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


if __name__ == "__main__":
    os.chdir(HERE)  # no folder's configuration names a path of this machine
    shutil.rmtree("kept", ignore_errors=True)
    make(Path("kept"))
    shutil.rmtree("kept/model/checkpoints")  # as large as all the rest
