"""Every YAML file of configs parses for its command; those of large models train tiny ones."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from memfree.cli import entry
from memfree.commands.demo import demo, demo_stages
from memfree.commands.prepare import prepare
from memfree.commands.train import train
from memfree.data import DuplicationPlan, PartSizes
from memfree.models import load_model

CONFIGS = Path(__file__).parents[1] / "configs"
HEADER = re.compile(r"^#.*?(?:python (?P<script>\w+)\.py|memfree (?P<verb>[\w-]+)) .*config", re.M)


def function_of(path):
    """The function of the command in a configuration's header, or of its name's first word."""
    found = HEADER.search(path.read_text())
    word = (found["verb"] or found["script"]) if found else path.stem.split("_")[0]
    return entry.load(entry.command_of(word, [f"--config={path}"]))


OWN = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "slurm")


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_every_configuration_parses(path, capsys):
    with pytest.raises(SystemExit) as exit_:
        entry.run(function_of(path), [f"--config={path}", "--print_config"])
    assert exit_.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    assert given.keys() <= resolved.keys()


def resolved(command, arguments, capsys):
    """All options of a command as it would run, by dotted name."""
    with pytest.raises(SystemExit) as exit_:
        entry.run_command(command, [*arguments, "--print_config"])
    assert exit_.value.code == 0

    def flat(value, name):
        if not isinstance(value, dict) or not value:
            return {name: value}
        parts = [flat(one, f"{name}.{key}".lstrip(".")) for key, one in value.items()]
        return {key: one for part in parts for key, one in part.items()}

    return flat(yaml.safe_load(capsys.readouterr().out), "")


@pytest.mark.parametrize(
    ("command", "config", "own"),
    [
        ("train", "digits", {"data.path", "out", "seed"}),
        (
            "sample",
            "sample_digits",
            {"model", "index", "out", "count", "batch_size", "seed", "mitigation"},
        ),
    ],
)
def test_the_demo_runs_what_the_readme_shows_with_configurations(command, config, own, capsys):
    defaults = {name: one.default for name, one in inspect.signature(demo).parameters.items()}
    stages = [stage for stage in demo_stages(**defaults) if stage.command == command]
    assert len(stages) == (3 if command == "sample" else 1)
    for stage in stages:
        demos = resolved(command, stage.arguments(), capsys)
        paths = [f"--{name}={value}" for name, value in stage.options.items() if name in own]
        shown = resolved(command, [f"--config={CONFIGS / config}.yaml", *paths], capsys)
        # The demo keeps to one device; the configurations take what a machine has.
        different = {name for name in demos if demos[name] != shown[name]}
        assert demos.keys() == shown.keys() and different <= {"trainer.devices"}


@pytest.fixture(scope="module")
def colour_folder(tmp_path_factory):
    """A labelled dataset folder of 8x8 RGB noise."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for label in "ab":
        (root / "images" / label).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{number}.png")
    parts = PartSizes(train=8, calibration=4, test=4, fit=4)
    prepare(root / "data", source="folder", path=str(root / "images"), parts=parts)
    return root / "data"


@pytest.mark.parametrize("name", ["cifar10", "cifar10_class"])
def test_cifar10_configurations_train(name, colour_folder, tmp_path):
    """One step on fake data; only sizes are overridden."""
    entry.run(
        train,
        [
            f"--config={CONFIGS / name}.yaml",
            f"--out={tmp_path / 'out'}",
            f"--data.path={colour_folder}",
            "--data.batch_size=4",
            "--data.num_workers=0",
            "--model.network.block_out_channels=[8, 16, 16, 16]",
            "--model.network.norm_num_groups=4",
            "--model.network.attention_head_dim=8",
            "--model.network.layers_per_block=1",
            "--trainer.max_steps=1",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.enable_progress_bar=false",
        ],
    )
    model = load_model(tmp_path / "out")
    assert model.num_classes == (2 if name == "cifar10_class" else None)
    assert model.scheduler.config["num_train_timesteps"] == 4000
    assert list((tmp_path / "out" / "logs").rglob("events.out.tfevents*"))
    assert [p.name for p in (tmp_path / "out" / "samples").iterdir()] == ["samples-0000001.png"]


@pytest.fixture(scope="module")
def captioned_folder(tmp_path_factory):
    """A captioned dataset folder of RGB noise as large as the tiny pipelines' images."""
    root = tmp_path_factory.mktemp("captioned")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(20):
        shape = (tiny_pipelines.PIXELS, tiny_pipelines.PIXELS, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(
            root / "images" / f"{number}.png"
        )
        (root / "images" / f"{number}.txt").write_text(f"noise number {number}")
    parts = PartSizes(train=8, calibration=4, test=4, fit=4)
    plan = DuplicationPlan(images=1, factor=4)
    prepare(root / "data", source="folder", path=str(root / "images"), parts=parts, plan=plan)
    return root / "data"


@pytest.mark.parametrize(
    ("name", "pipe", "kind"),
    [
        ("emoji_finetune", tiny_pipelines.stable_diffusion, StableDiffusionPipeline),
        ("sd15_duplicated", tiny_pipelines.stable_diffusion, StableDiffusionPipeline),
        ("sd15_lora", tiny_pipelines.stable_diffusion, StableDiffusionPipeline),
        ("sdxl_lora", tiny_pipelines.stable_diffusion_xl, StableDiffusionXLPipeline),
    ],
)
def test_fine_tuning_configurations_train(name, pipe, kind, captioned_folder, tmp_path):
    """Two steps of a tiny pipeline of the same class, the rest as it stands in the file."""
    pipe().save_pretrained(tmp_path / "pretrained")
    entry.run(
        train,
        [
            f"--config={CONFIGS / name}.yaml",
            f"--out={tmp_path / 'out'}",
            f"--data.path={captioned_folder}",
            f"--model.pretrained={tmp_path / 'pretrained'}",
            "--trainer.max_steps=2",
            "--trainer.precision=32-true",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.enable_progress_bar=false",
        ],
    )
    made = DiffusionPipeline.from_pretrained(tmp_path / "out" / "diffusers")
    assert type(made) is kind
    made.set_progress_bar_config(disable=True)
    size = tiny_pipelines.PIXELS
    image = made("noise", height=size, width=size, num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, size, size)
    before, after = pipe().unet.state_dict(), made.unet.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    adapters = "lora_rank" in given["model"]["finetune"]
    assert moved and all(".attn" in name for name in moved) == adapters
    assert (tmp_path / "out" / "lora").is_dir() == adapters
    kept, trained = pipe().text_encoder.state_dict(), made.text_encoder.state_dict()
    assert all(torch.equal(kept[name], trained[name]) for name in kept)
