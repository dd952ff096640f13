"""Models of others: pickles, foreign modules, absurd sizes; nothing is run or imported."""

import io
import json
import os
import sys
import zipfile

import pytest
import torch
from hostile_guard import bounded, one_line, refused, tree
from hostile_payloads import OTHER_VALUES, Canary, pickled, zeros
from spoiling import edit, places, wrong_json

from memfree.cli import entry
from memfree.models import load_model
from memfree.models.loading import load_decoder
from memfree.models.text_pipeline import load_pipeline
from memfree.retrieval import CLIPFeatures, LatentFeatures, SSCDFeatures, TimmFeatures
from memfree.training.checkpoints import read_identity
from memfree.training.claim import claim

MODULE = "import pathlib; pathlib.Path('canary').write_text('run')\nclass Net: pass\n"


def archive(packing=zipfile.ZIP_STORED, size=1 << 20):
    """A checkpoint's zip whose pickle is zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as file:
        file.writestr("archive/data.pkl", bytes(size))
        file.writestr("archive/version", "3\n")
    return out.getvalue()


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def script():
    out = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), out)
    return out.getvalue()


def safetensors(shape, size=64, length=None):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + bytes(64)


WEIGHTS = {
    "pickle": pickled("canary"),
    "pickle in a zip": saved({"memfree": Canary("canary"), "state_dict": Canary("canary")}),
    "TorchScript": script(),
    "packed zeros of 512 MiB": archive(zipfile.ZIP_DEFLATED, 512 << 20),
    "zeros": archive(),
    "a list": saved([1]),
    "a tensor": saved(torch.zeros(3)),
    "no identity": saved({"state_dict": {}}),
    "wrong identity": saved({"memfree": 7}),
    "safetensors beyond memory": safetensors([1 << 40, 1 << 20]),
    "safetensors of a long header": safetensors([4], length=1 << 60),
    "text": b"hello",
    "nothing": b"",
    "packed bytes": zeros(1 << 20),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_none(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    readers = {
        "step-00000001.ckpt": read_identity,
        "a.pt": lambda path: CLIPFeatures("RN50", path=path),
        "b.pt": lambda path: TimmFeatures("test_vit.r160_in1k", path=path),
        "b.safetensors": lambda path: TimmFeatures("test_vit.r160_in1k", path=path),
        "c.pt": SSCDFeatures,
    }
    for file, read in readers.items():
        if file == "a.pt" and name not in ("pickle", "pickle in a zip", "TorchScript", "text"):
            continue  # the network takes a second to build
        path = tmp_path / file
        path.write_bytes(WEIGHTS[name])
        refused(lambda read=read, path=path: read(path), path)
    if name != "TorchScript":
        refused(lambda: SSCDFeatures(tmp_path / "c.pt", trust_file=True), tmp_path)
    assert not (tmp_path / "canary").exists()


def config(part, *keys_and_value):
    return lambda folder: edit(folder / part, *keys_and_value)


def foreign(part, library, kind):
    """A pipeline that names a class of another module, which lies beside it in many places."""

    def spoil(folder):
        for place in (folder.parent, folder, folder / part):
            if place.is_dir():
                (place / f"{library}.py").write_text(MODULE)
        edit(folder / "model_index.json", part, [library, kind])

    return spoil


UNET, SCHEDULER = "diffusers/unet/config.json", "diffusers/scheduler/scheduler_config.json"
MODELS = {
    **wrong_json(UNET),
    **wrong_json(SCHEDULER),
    "channels beyond memory": config(UNET, "block_out_channels", [1 << 20, 1 << 20]),
    "channels of gigabytes": config(UNET, "block_out_channels", [4096, 4096]),
    "layers without end": config(UNET, "layers_per_block", 1 << 40),
    "many layers": config(UNET, "layers_per_block", 200),
    "classes beyond memory": config(UNET, "num_class_embeds", 1 << 19),
    "unknown blocks": config(UNET, "down_block_types", ["os.system", "DownBlock2D"]),
    "code by its name": config(UNET, "auto_map", {"AutoModel": "evil.Net"}),
    "quantisation": config(UNET, "quantization_config", {"quant_method": "evil"}),
    "scheduler of another kind": config(SCHEDULER, "_class_name", "UNet2DModel"),
    "scheduler of a number": config(SCHEDULER, "_class_name", 7),
    "scheduler of a module": config(SCHEDULER, "_class_name", "os.system"),
    "steps beyond memory": config(SCHEDULER, "num_train_timesteps", 1 << 34),
    "steps of text": config(SCHEDULER, "num_train_timesteps", "many"),
    "betas of text": config(SCHEDULER, "trained_betas", "x"),
    "unknown betas": config(SCHEDULER, "beta_schedule", "x"),
    "shape beyond memory": config("manifest.json", "image_shape", [1, 1 << 40, 1 << 40]),
    "shape of a number": config("manifest.json", "image_shape", 7),
    "classes of text": config("manifest.json", "num_classes", "3"),
    "weights beyond memory": lambda folder: (
        folder / "diffusers/unet/diffusion_pytorch_model.safetensors"
    ).write_bytes(safetensors([1 << 40, 1 << 20])),
}
PIPES = {
    **wrong_json("model_index.json"),
    "foreign module": foreign("unet", "evil", "Net"),
    "module that is loaded": foreign("unet", "os", "system"),
    "module of diffusers": foreign("unet", "diffusers", "utils"),
    "class with a dot": config("model_index.json", "unet", ["diffusers", "utils.os"]),
    "class of any model": config("model_index.json", "text_encoder", ["transformers", "AutoModel"]),
    "class of numbers": config("model_index.json", "unet", [1, 2]),
    "one of a pair": config("model_index.json", "unet", ["diffusers"]),
    "pipeline of a module": config("model_index.json", "_class_name", ["evil", "Net"]),
    "pipeline of a number": config("model_index.json", "_class_name", 7),
    "pipeline of a path": config("model_index.json", "_class_name", "../evil"),
    "U-Net beyond memory": config("unet/config.json", "block_out_channels", [1 << 19, 1 << 19]),
    "autoencoder beyond memory": config("vae/config.json", "block_out_channels", [8192, 8192]),
    "vocabulary beyond memory": config("text_encoder/config.json", "vocab_size", 1 << 20),
    "layers without end": config("text_encoder/config.json", "num_hidden_layers", 1 << 30),
    "code of a text encoder": config("text_encoder/config.json", "auto_map", {"AutoModel": "e.N"}),
    "steps beyond memory": config(
        "scheduler/scheduler_config.json", "num_train_timesteps", 1 << 40
    ),
    "pickles alone": lambda folder: [
        path.rename(path.with_suffix(".bin")) for path in folder.glob("unet/*.safetensors")
    ],
}


def pipe_of_pickles(folder):
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
        (path.parent / "diffusion_pytorch_model.bin").write_bytes(pickled("canary"))
        (path.parent / "pytorch_model.bin").write_bytes(pickled("canary"))


PIPES["pickles that run"] = pipe_of_pickles


@pytest.mark.parametrize(
    ("kind", "name"), [*(("model", name) for name in MODELS), *(("pipe", name) for name in PIPES)]
)
def test_spoilt_models_are_refused(copy, tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = copy(kind)
    (MODELS if kind == "model" else PIPES)[name](folder)
    before = tree(tmp_path)
    refused(lambda: load_model(folder), folder)
    if kind == "pipe":
        refused(lambda: load_pipeline(folder), folder)
    assert tree(tmp_path) == before and "evil" not in sys.modules


def test_whole_models_are_loaded(whole):
    with bounded():
        load_model(whole / "model")
        load_model(whole / "pipe")
        LatentFeatures.from_folder(whole / "pipe")


def test_an_autoencoder_beyond_memory(copy):
    folder = copy("pipe")
    edit(folder / "vae" / "config.json", "block_out_channels", [8192, 8192])
    refused(lambda: LatentFeatures.from_folder(folder), folder)
    (folder / "vae" / "config.json").write_bytes(b'"AutoencoderTiny"')
    refused(lambda: load_decoder(folder / "vae", None), folder)


@pytest.mark.parametrize("file", ["manifest.json", UNET, SCHEDULER])
def test_any_other_value_is_read_or_refused(copy, file):
    folder = copy("model")
    whole = (folder / file).read_text()
    spots = [keys for keys in places(json.loads(whole)) if keys[0] != "made_by"]
    for keys in spots[:: max(1, len(spots) // 12)]:
        for value in OTHER_VALUES[::3]:
            edit(folder / file, *keys, value)
            try:
                with bounded():
                    load_model(folder)
            except (ValueError, OSError) as error:
                one_line(error)
            (folder / file).write_text(whole)


@pytest.mark.parametrize("field", ["steps", "epochs", "identity", "batch_size"])
def test_claims_on_spoilt_folders(copy, field):
    folder = copy("model")
    for value in OTHER_VALUES:
        edit(folder / "manifest.json", field, value)
        try:
            claim(folder, {"a": 1}, 4, 10, 10, False)
        except (ValueError, OSError) as error:
            one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "count: !!python/object/apply:os.system ['touch canary']",
        "!!python/object/new:os.system ['touch canary']",
        "count: !!python/name:os.system",
        "count: &a [*a]",
        "count: " + "[" * 20_000,
        "\0",
        "count: [",
        "7",
        "model: 1\n" * 3 + "x: y",
    ],
)
def test_configurations_that_would_run(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    for command in ("sample", "prepare"):
        with bounded(), pytest.raises(SystemExit) as exit_:
            entry.run_command(command, ["--config", "config.yaml", "--out=out"])
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("memfree: error: ")
        assert len(lines[0]) < 2000
    assert os.listdir(tmp_path) == ["config.yaml"]
