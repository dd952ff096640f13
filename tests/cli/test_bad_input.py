"""Wrong input of text-to-image commands: one line that names the option, and nothing lost."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.data import DuplicationPlan, PartSizes
from memfree.models.text_to_image import TextToImageModule
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.embed import EmbeddingModule
from memfree.sampling import SamplingModule

RATE = 0.3
"""False-positive rate that 20 calibration images allow."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data, indexes and pipelines, with captions or a text encoder and without."""
    root = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    parts = PartSizes(train=55, calibration=20, test=5, fit=5)
    for name in ("captioned", "bare"):
        source = root / f"{name}_images"
        source.mkdir()
        for number in range(85):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(source / f"{number:02}.png")
            if name == "captioned":
                (source / f"{number:02}.txt").write_text(f"noise number {number}")
        prepare(
            root / name,
            source="folder",
            path=str(source),
            parts=parts,
            plan=DuplicationPlan(images=2, factor=4),
            near_distance=0,
        )
        entry.main(["index", f"--dataset={root / name}", f"--out={root / name}_index"])
    tiny_pipelines.stable_diffusion().save_pretrained(root / "pipe")
    tiny_pipelines.stable_diffusion(text_encoder=None).save_pretrained(root / "textless")
    for name in ("captioned", "bare"):
        latents = ["--features=latents", f"--extractor.path={root / 'pipe'}"]
        entry.main(["index", f"--dataset={root / name}", f"--out={root / name}_latents", *latents])
    tiny_pipelines.autoencoder(seed=1).save_pretrained(root / "other_vae")
    latents = ["--features=latents", f"--extractor.path={root / 'other_vae'}"]
    entry.main(
        ["index", f"--dataset={root / 'captioned'}", f"--out={root}/other_latents", *latents]
    )
    (root / "adapters").mkdir()
    (root / "adapters" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (root / "prompts.txt").write_text("a cat\n")
    (root / "empty.txt").write_text("")
    (root / "blank.txt").write_text(" \n\n")
    (root / "bytes.txt").write_bytes(bytes(range(256)))
    torch.save(torch.nn.Linear(2, 2).state_dict(), root / "state.pt")
    grey = torch.jit.trace(torch.nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8))
    grey.save(str(root / "grey.pt"))
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A pipeline that is no folder is looked for on the hub, which is asked again and again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def options(root, defaults, changes):
    """Options by name; a string that names something below the folder is its path."""
    given = {**defaults, **changes}
    return [
        f"--{name}={root / value if value in [path.name for path in root.iterdir()] else value}"
        for name, value in given.items()
        if value is not None
    ]


def refused(capsys, command, arguments):
    """The one line of a command that is refused; a bar may stand above it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        entry.run_command(command, arguments)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in " ".join(lines)
    (line,) = (line for line in lines if line.startswith("memfree: error: "))
    assert lines[-1] == line
    return line


TRAINING = {
    "data.path": "captioned",
    "data.batch_size": "8",
    "model.pretrained": "pipe",
    "trainer.max_steps": "2",
    "trainer.sample_grid_every_n_steps": "0",
    "trainer.accelerator": "cpu",
    "trainer.devices": "1",
    "trainer.enable_progress_bar": "false",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.pretrained": "textless"}, "error: --model.pretrained: "),
        ({"model.pretrained": "textless"}, "textless has no text_encoder: give a whole"),
        ({"model.pretrained": "nothing/there"}, "nothing/there cannot be loaded"),
        ({"model.pretrained": "adapters"}, "it holds adapters alone: name the folder of a whole"),
        ({"model.pretrained": "grey.pt"}, "grey.pt cannot be loaded as a diffusers pipeline"),
        ({"data.path": "bare"}, "bare has no captions, which --model.pretrained is trained with"),
        (
            {"model.pretrained": None, "model.finetune.lora_rank": "2"},
            "--model.finetune.lora_rank needs --model.pretrained",
        ),
    ],
)
def test_training_that_is_refused(folders, tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    assert message in refused(
        capsys, "train", [f"--out={out}", *options(folders, TRAINING, changes)]
    )
    assert not out.exists()


SAMPLING = {
    "model": "pipe",
    "index": "captioned_index",
    "prompts.file": "prompts.txt",
    "count": "2",
    "steps": "2",
    "scheduler": "ddim",
    "guidance_scale": "3",
    "mitigation.false_positive_rate": str(RATE),
    "trainer.accelerator": "cpu",
    "trainer.devices": "1",
}

MOST_COMMON = {"mitigation.caption_policy": "most_common", "mitigation.caption_neighbours": "1000"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "textless"}, "has no text_encoder"),
        ({"prompts.file": "empty.txt"}, "--prompts.file: "),
        ({"prompts.file": "blank.txt"}, "has no prompts; write one a line"),
        ({"prompts.file": "bytes.txt"}, "is not UTF-8 text"),
        ({"prompts.file": "missing.txt"}, "no prompt file at"),
        ({"prompts.file": "captioned"}, "no prompt file at"),
        ({"prompts.file": None}, "needs either --prompts.file or --prompts.dataset"),
        ({"prompts.dataset": "captioned"}, "needs either --prompts.file or --prompts.dataset"),
        ({"prompts.file": None, "prompts.dataset": "bare"}, "--prompts.dataset: "),
        ({"prompts.file": None, "prompts.dataset": "bare"}, "bare has no captions"),
        (
            {"mitigation": "amg", "index": "bare_index"},
            "bare_index has no captions, which --mitigation.c2 steers away from",
        ),
        (
            {"mitigation": "prss", "index": None},
            "give --index of captioned images",
        ),
        (
            {"mitigation": "amg", **MOST_COMMON},
            "--mitigation.caption_neighbours 1000: the index has 55 distinct groups, use 1 to 55",
        ),
        ({"classes": "[0]"}, "--classes is for models of classes; a text-to-image model has --p"),
        ({"mitigation": "multiplicity"}, "needs --latents"),
        (
            {"mitigation": "multiplicity", "latents": "captioned_index"},
            "captioned_index is an index of pixels, not of latents",
        ),
        (
            {"mitigation": "multiplicity", "latents": "other_latents"},
            "other_latents holds latents of another autoencoder than the pipeline's",
        ),
        (
            {"mitigation": "multiplicity", "latents": "bare_latents"},
            "bare_latents has no captions",
        ),
    ],
)
def test_sampling_that_is_refused(folders, tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    assert message in refused(
        capsys, "sample", [f"--out={out}", *options(folders, SAMPLING, changes)]
    )
    assert not out.exists()


SSCD = {"features": "sscd", "extractor.trust_file": "true"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**SSCD, "extractor.path": "prompts.txt"}, "error: --extractor.path: "),
        ({**SSCD, "extractor.path": "prompts.txt"}, "prompts.txt is not a TorchScript model"),
        ({**SSCD, "extractor.path": "state.pt"}, "state.pt is not a TorchScript model"),
        ({**SSCD, "extractor.path": "grey.pt"}, "grey.pt does not map images to embeddings"),
        ({**SSCD, "extractor.path": "pipe"}, "pipe: Is a directory"),
        (
            {**SSCD, "extractor.path": "grey.pt", "extractor.trust_file": "false"},
            "pass trust_file=True (--extractor.trust_file true)",
        ),
        (
            {"features": "efficientnet", "out": "captioned_index"},
            "--overwrite true",
        ),
    ],
)
def test_indexing_that_is_refused(folders, tmp_path, capsys, changes, message):
    defaults = {"dataset": "captioned", "out": tmp_path / "out"}
    assert message in refused(capsys, "index", options(folders, defaults, changes))
    assert not (tmp_path / "out").exists()
    assert ReferenceIndex.load(folders / "captioned_index").metric == "l2"


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("scratch", {"dataset": "bare"}, "has no captions"),
        ("train-clip", {"dataset": "bare"}, "has no captions"),
        (
            "prepare",
            {"source": "emoji", "path": "/no/font.ttf"},
            "install it with `apt install fonts-noto-color-emoji`, or give one with --path FONT",
        ),
        ("prepare", {"source": "emoji", "path": "prompts.txt"}, "not a font that can be read"),
    ],
)
def test_what_else_is_refused(folders, tmp_path, capsys, command, changes, message):
    out = tmp_path / "out"
    assert message in refused(capsys, command, options(folders, {"out": out}, changes))
    assert not out.exists()


def exhausted(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nAnd more.")


def exhausted_cpu(*args, **kwargs):
    raise RuntimeError("alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("fail", [exhausted, exhausted_cpu])
def test_training_out_of_memory(folders, tmp_path, capsys, monkeypatch, fail):
    out = tmp_path / "out"
    arguments = [f"--out={out}", *options(folders, TRAINING, {})]
    with monkeypatch.context() as patch:
        patch.setattr(TextToImageModule, "loss", fail)
        assert refused(capsys, "train", arguments) == (
            "memfree: error: out of memory while training: give a smaller --data.batch_size "
            "(now 8) with a larger --trainer.accumulate_grad_batches (now 1), or "
            "--model.finetune.gradient_checkpointing true, or --trainer.precision bf16-mixed, or "
            "--model.ema_decay 0, or --model.finetune.lora_rank 16"
        )
    entry.run_command("train", [*arguments, "--data.batch_size=4"])  # the folder can be used
    assert (out / "manifest.json").is_file()
    more = ["--model.finetune.cache=true", "--data.batch_size=1", "--trainer.precision=bf16-mixed"]
    with monkeypatch.context() as patch:
        patch.setattr(TextToImageModule, "loss", fail)
        line = refused(capsys, "train", [*arguments, f"--out={tmp_path / 'other'}", *more])
    assert "--model.finetune.cache false" in line
    assert "batch_size" not in line and "precision" not in line


def test_sampling_out_of_memory(folders, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [f"--out={out}", *options(folders, SAMPLING, {"count": "4", "batch_size": "2"})]
    step = SamplingModule.predict_step

    def second_is_too_large(module, batch, batch_idx=0):
        return exhausted() if batch_idx else step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingModule, "predict_step", second_is_too_large)
        line = refused(capsys, "sample", arguments)
    assert "out of memory while sampling: give a smaller --batch_size (now 2), or --trainer" in line
    assert len(list(out.glob("samples-*.tar"))) == 1  # what was drawn is kept
    entry.run_command("sample", [*arguments, "--batch_size=1"])
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("features", "ways"),
    [
        ("latents", "(now 9), or --extractor.dtype bfloat16, or --trainer.accelerator cpu"),
        ("pixels", "(now 9)"),
    ],
)
def test_indexing_out_of_memory(folders, tmp_path, capsys, monkeypatch, features, ways):
    changes = {"features": features, "batch_size": "9"}
    if features == "latents":
        changes["extractor.path"] = "pipe"
    defaults = {"dataset": "captioned", "out": tmp_path / "out"}
    arguments = options(folders, defaults, changes)
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingModule, "predict_step", exhausted)
        patch.setattr("memfree.guidance.calibration.measure", exhausted)
        line = refused(capsys, "index", arguments)
    assert line.endswith(f"give a smaller --batch_size {ways}")
    assert not (tmp_path / "out").exists()
    entry.run_command("index", arguments)


def test_out_of_memory_anywhere_else_names_the_batch_sizes(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "memfree.offline.stable_diffusion.AutoencoderModule.training_step", exhausted
    )
    out = tmp_path / "out"
    line = refused(capsys, "scratch", [f"--out={out}", f"--dataset={folders / 'captioned'}"])
    assert line == (
        "memfree: error: out of memory while running: give a smaller --autoencoder.batch_size"
    )
