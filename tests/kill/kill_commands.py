"""Tiny runs of the commands that write: their inputs, and their words."""

from __future__ import annotations

import shutil
from pathlib import Path

from kill_server import KillServer

TRAIN = [
    "--model.network.block_out_channels=[8, 8]",
    "--model.network.attention=[false, true]",
    "--model.network.layers_per_block=1",
    "--model.network.norm_num_groups=4",
    "--model.warmup_steps=2",
    "--model.class_conditional=true",
    "--data.batch_size=16",
    "--trainer.log_every_n_steps=1",
    "--trainer.sample_grid_every_n_steps=5",
    "--trainer.checkpoint_every_n_steps=2",
    "--trainer.devices=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
PREPARE = [
    "--parts.train=30",
    "--parts.calibration=100",
    "--parts.test=20",
    "--parts.fit=20",
    "--plan.images=2",
    "--plan.factor=4",
    "--records_per_shard=40",
]
SAMPLE = [
    "--batch_size=4",
    "--steps=3",
    "--scheduler=ddim",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]


def words(inputs: Path) -> dict[str, list[str]]:
    """Each command's words; what is written goes to ``out`` in the current folder."""
    data, model, index = inputs / "data", inputs / "model", inputs / "index"
    amg = ["--mitigation=amg", "--mitigation.false_positive_rate=0.1"]
    return {
        "prepare": ["prepare", "--out=out", *PREPARE],
        "train": ["train", f"--data.path={data}", "--out=out", "--trainer.max_steps=5", *TRAIN],
        "index_pixels": ["index", f"--dataset={data}", "--out=out", "--batch_size=16"],
        "index_network": [
            "index",
            f"--dataset={data}",
            "--out=out",
            "--features=copy_detection",
            f"--extractor.path={inputs / 'embedding'}",
            "--batch_size=16",
            "--trainer.accelerator=cpu",
        ],
        "sample": [
            "sample",
            f"--model={model}",
            f"--index={index}",
            "--out=out",
            "--count=10",
            *SAMPLE,
            *amg,
        ],
        "evaluate": [
            "evaluate",
            f"--dataset={data}",
            f"--index={index}",
            f"--samples.unguided={inputs / 'samples'}",
            f"--second_embedding={inputs / 'embedding'}",
            "--out=out",
            "--false_positive_rate=0.1",
            "--other_rates=[0.2]",
        ],
    }


def make_inputs(server: KillServer, inputs: Path) -> Path:
    """A data set, a model, an index, samples and an embedding, of undisturbed runs."""
    chain = {
        "data": ["prepare", "--out=out", *PREPARE],
        "embedding": [
            "train-embedding",
            f"--dataset={inputs / 'data'}",
            "--out=out",
            "--steps=2",
            "--batch_size=8",
            "--accelerator=cpu",
        ],
        "model": words(inputs)["train"],
        "index": words(inputs)["index_pixels"],
        "samples": [
            "sample",
            f"--model={inputs / 'model'}",
            f"--index={inputs / 'index'}",
            "--out=out",
            "--count=12",
            "--mitigation.false_positive_rate=0.1",
            *SAMPLE,
        ],
    }
    for name, command in chain.items():
        ended = server.run(command, inputs / "making")
        assert ended.status == 0, f"{name}: {ended.output}"
        shutil.move(inputs / "making" / "out", inputs / name)
    return inputs
