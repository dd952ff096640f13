"""Export to a diffusers folder and back, with and without memfree."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from memfree.models import NetworkOptions, NoiseOptions, export_model, load_model
from memfree.training import ExponentialMovingAverage

FIELDS = {"image_shape": [1, 4, 4], "num_classes": 3}


@pytest.fixture
def exported(make_module, tmp_path):
    """A class-conditional model folder and its module."""
    module = make_module(noise=NoiseOptions(num_train_timesteps=50, beta_schedule="linear"))
    export_model(tmp_path / "m", DDPMPipeline(module.network, module.noise_scheduler), 0, **FIELDS)
    return tmp_path / "m", module


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(v, w) for (x, v), (y, w) in pairs)


def test_diffusers_loads_it_without_memfree(exported):
    folder, module = exported
    pipeline = DDPMPipeline.from_pretrained(folder / "diffusers", local_files_only=True)
    assert same_weights(pipeline.unet, module.network)
    assert pipeline.scheduler.config["num_train_timesteps"] == 50
    network = UNet2DModel.from_pretrained(folder / "diffusers" / "unet", use_safetensors=True)
    assert same_weights(network, module.network)
    assert [path.suffix for path in (folder / "diffusers" / "unet").iterdir()].count(
        ".safetensors"
    ) == 1


def test_diffusers_samples_an_unconditional_export(make_module, tmp_path):
    module = make_module(num_classes=None)
    fields = {"image_shape": [1, 4, 4], "num_classes": None}
    export_model(tmp_path, DDPMPipeline(module.network, module.noise_scheduler), 0, **fields)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "diffusers", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 4, 4, 1)


def test_averaged_weights_are_what_is_exported(make_module, make_trainer, data, tmp_path):
    module, average = make_module(), ExponentialMovingAverage(0.8)
    make_trainer([average], max_steps=3, enable_checkpointing=False).fit(module, datamodule=data)
    export_model(
        tmp_path, DDPMPipeline(average.average.network, module.noise_scheduler), 0, **FIELDS
    )
    loaded = load_model(tmp_path)
    assert same_weights(loaded.denoiser.network, average.average.network)
    assert not same_weights(loaded.denoiser.network, module.network)


def test_loaded_model_says_what_it_is(exported):
    loaded = load_model(exported[0])
    assert loaded.image_shape == (1, 4, 4)
    assert loaded.num_classes == 3
    assert loaded.manifest["prediction_type"] == "epsilon"
    assert type(loaded.scheduler).__name__ == "DDPMScheduler"
    assert not loaded.denoiser.training
    assert not any(p.requires_grad for p in loaded.denoiser.parameters())


def test_denoiser_means_no_label_by_none(exported):
    folder, module = exported
    denoiser = load_model(folder).denoiser
    x_t = torch.randn(3, 1, 4, 4)
    t = torch.tensor([1, 20, 49])
    module.network.eval()
    labels = torch.tensor([0, 2, 3])
    expected = module.network(x_t, t, labels).sample
    torch.testing.assert_close(denoiser(x_t, t, labels), expected)
    expected = module.network(x_t, t, torch.full((3,), 3)).sample
    torch.testing.assert_close(denoiser(x_t, t, None), expected)
    each = denoiser(x_t, torch.tensor(20), labels)
    torch.testing.assert_close(each, denoiser(x_t, torch.full((3,), 20), labels))
    x_t.requires_grad_(True)
    assert torch.autograd.grad(denoiser(x_t, t, labels).sum(), x_t)[0].abs().sum() > 0


def test_labels_for_an_unconditional_model_are_refused(make_module, tmp_path):
    module = make_module(num_classes=None)
    fields = {"image_shape": [1, 4, 4], "num_classes": None}
    export_model(tmp_path, DDPMPipeline(module.network, module.noise_scheduler), 0, **fields)
    denoiser = load_model(tmp_path).denoiser
    assert denoiser(torch.zeros(1, 1, 4, 4), 3).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="the model is unconditional"):
        denoiser(torch.zeros(1, 1, 4, 4), 3, torch.tensor([0]))


def test_a_new_export_replaces_an_old_one_whole(exported, make_module):
    folder, _ = exported
    other = make_module(seed=5)
    export_model(folder, DDPMPipeline(other.network, DDIMScheduler()), 5, **FIELDS)
    assert same_weights(load_model(folder).denoiser.network, other.network)
    assert sorted(path.name for path in folder.iterdir()) == ["diffusers", "manifest.json"]


def test_a_failed_export_leaves_the_old_one(exported, make_module, monkeypatch):
    folder, module = exported

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", full)
    with pytest.raises(OSError, match="is full"):
        export_model(
            folder, DDPMPipeline(make_module(seed=5).network, DDIMScheduler()), 5, **FIELDS
        )
    monkeypatch.undo()
    assert same_weights(load_model(folder).denoiser.network, module.network)


def test_too_little_disk_is_said_before_writing(make_module, tmp_path, monkeypatch):
    module = make_module()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match="only 0.0 MB is free"):
        export_model(
            tmp_path / "m", DDPMPipeline(module.network, module.noise_scheduler), 0, **FIELDS
        )
    assert not (tmp_path / "m").exists()


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize(
    ("num_classes", "options", "name"),
    [
        (3, {"network": NetworkOptions([16, 8], [False, True], 1, 4, 4)}, "does not fit"),
        (None, {}, "class_embedding.weight does not fit"),
    ],
)
def test_weights_of_another_network_are_one_short_line(
    exported, make_module, tmp_path, capfd, num_classes, options, name
):
    """Of other sizes; or one that lacks weights, which diffusers would leave random."""
    folder, _ = exported
    other = make_module(num_classes=num_classes, **options)
    export_model(
        tmp_path / "other", DDPMPipeline(other.network, other.noise_scheduler), 0, **FIELDS
    )
    weights = "diffusers/unet/diffusion_pytorch_model.safetensors"
    (folder / weights).write_bytes((tmp_path / "other" / weights).read_bytes())
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"weights are of another network.*{name}") as error:
        load_model(folder)
    assert len(str(error.value)) < 160 + len(str(folder))
    assert capfd.readouterr() == ("", "")


def test_folders_that_do_not_load_are_explained(exported, tmp_path):
    folder, _ = exported
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_model(tmp_path / "nowhere")
    unet = folder / "diffusers" / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match="unet cannot be read as a diffusers network"):
        load_model(folder)
    (unet / "config.json").rename(unet / "kept.json")
    (unet / "config.json").write_text(json.dumps({"long": "x" * 999, "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert len(str(error.value)) < 250 + len(str(unet))
    (unet / "kept.json").rename(unet / "config.json")
    weights.unlink()
    torch.save({}, unet / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="unet cannot be read as a diffusers network"):
        load_model(folder)
    weights.write_bytes(kept)
    edit(folder / "manifest.json", num_classes=7)
    with pytest.raises(ValueError, match="are of two models"):
        load_model(folder)
    edit(folder / "manifest.json", num_classes=3)
    scheduler = folder / "diffusers" / "scheduler" / "scheduler_config.json"
    edit(scheduler, _class_name="UNet2DModel")
    with pytest.raises(ValueError, match="no scheduler called 'UNet2DModel'"):
        load_model(folder)
    scheduler.write_text("{")
    with pytest.raises(ValueError, match="is not a scheduler's configuration"):
        load_model(folder)
    scheduler.unlink()
    with pytest.raises(ValueError, match="holds no scheduler"):
        load_model(folder)
    (unet / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no network"):
        load_model(folder)
