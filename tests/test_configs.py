"""Every YAML file of configs parses for its command; those of CIFAR-10 train on fake data."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from memfree import cli
from memfree.data import PartSizes, prepare
from memfree.demo import demo, demo_stages
from memfree.models import load_model
from memfree.training import train

CONFIGS = Path(__file__).parents[1] / "configs"
HEADER = re.compile(r"^#.*?(?:python (?P<script>\w+)\.py|memfree (?P<verb>\w+)) .*--config", re.M)


def function_of(path):
    """The function of the command in a configuration's header, or of its name's first word."""
    found = HEADER.search(path.read_text())
    word = (found["verb"] or found["script"]) if found else path.stem.split("_")[0]
    return cli.load(cli.COMMANDS.get(word) or cli.SCRIPTS[word])


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses(path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(function_of(path), [f"--config={path}", "--print_config"])
    assert exit_.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    assert given.keys() <= resolved.keys()


def resolved(command, arguments, capsys):
    """All options of a command as it would run, by dotted name."""
    with pytest.raises(SystemExit) as exit_:
        cli.run_command(command, [*arguments, "--print_config"])
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
            {"model", "index", "out", "count", "batch_size", "seed", "guidance.mitigation"},
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
    cli.run(
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
