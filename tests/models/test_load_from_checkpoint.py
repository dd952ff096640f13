"""``load_from_checkpoint``: a module as it was trained, from the checkpoint alone."""

import io
from pathlib import Path

import pytest
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from tiny_text import CAPTIONS, tiny_pipeline
from torch.utils.data import DataLoader

from memfree.models import DDPMModule, FineTuneOptions, ModelOptions, NetworkOptions
from memfree.models.text_to_image import TextToImageModule
from memfree.training import Checkpoints, ExponentialMovingAverage

OLD = Path(__file__).parents[1] / "golden" / "kept" / "stopped" / "checkpoints"


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.network.parameters()])


@pytest.fixture
def trained(make_module, make_trainer, data, tmp_path):
    def train(callbacks, **options):
        module = make_module(**options)
        trainer = make_trainer([*callbacks, Checkpoints(tmp_path, 2)], max_steps=2)
        trainer.fit(module, datamodule=data)
        return module, tmp_path / "step-00000002.ckpt"

    return train


def test_without_an_average_the_weights_are_those_in_training(trained):
    # As the command line makes options, whose numbers a checkpoint must not hold.
    network = NetworkOptions([PositiveInt(8), PositiveInt(8)], [False, True], 1, 4, 4)
    module, path = trained([], network=network, learning_rate=PositiveFloat(0.01))
    loaded = DDPMModule.load_from_checkpoint(path)
    assert loaded.identity() == module.identity()
    assert isinstance(loaded.options, ModelOptions) and loaded.image_shape == module.image_shape
    assert torch.equal(flat(loaded), flat(module))
    assert not loaded.has_averaged_weights
    buffer = io.BytesIO(path.read_bytes())
    assert torch.equal(flat(DDPMModule.load_from_checkpoint(buffer)), flat(module))


def test_with_an_average_the_weights_are_averaged(trained, make_module, make_trainer, data):
    module, path = trained([ExponentialMovingAverage(0.8)])
    loaded = DDPMModule.load_from_checkpoint(path, map_location="cpu")
    assert torch.equal(flat(loaded), flat(module.average))
    assert not torch.equal(flat(loaded), flat(module))
    assert loaded.has_averaged_weights
    assert torch.equal(loaded.preview(2, 2, 0), module.average.preview(2, 2, 0))
    # Once they are trained on they are averaged no more; nor are those of a resumed training.
    options = {"max_steps": 4, "enable_checkpointing": False}
    make_trainer([], **options).fit(loaded, datamodule=data)
    assert not loaded.has_averaged_weights
    resumed = make_module()
    trainer = make_trainer([ExponentialMovingAverage(0.8)], **options)
    trainer.fit(resumed, datamodule=data, ckpt_path=path, weights_only=True)
    assert not resumed.has_averaged_weights


def test_arguments_that_make_another_model_are_refused(trained):
    _, path = trained([])
    with pytest.raises(ValueError, match="another model: seed is 0 there and 5 here"):
        DDPMModule.load_from_checkpoint(path, seed=5)
    with pytest.raises(ValueError, match="not options of a model: .*colour"):
        DDPMModule.load_from_checkpoint(path, options={"colour": "red"})


@pytest.mark.parametrize("kind", [DDPMModule, TextToImageModule])
def test_an_earlier_checkpoint_says_what_to_do(kind):
    (path,) = OLD.iterdir()
    with pytest.raises(ValueError, match=r"no hyper_parameters: resume .*load_model") as refused:
        kind.load_from_checkpoint(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_what_is_no_checkpoint_of_ours_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.ckpt"

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("touched").touch, ())

    for content in ({"state_dict": {}}, {"state_dict": {}, "memfree": Evil()}, [1]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"a\.ckpt is damaged or not a") as refused:
            DDPMModule.load_from_checkpoint(path)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(FileNotFoundError):
        DDPMModule.load_from_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_fine_tuned_pipeline_is_found_by_its_name(rank, make_trainer, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    finetune = FineTuneOptions(lora_rank=rank)
    options = ModelOptions(pretrained=str(tmp_path / "base"), finetune=finetune, ema_decay=0.8)
    module = TextToImageModule(options, None, (3, 8, 8))
    record = {"image": torch.zeros(3, 8, 8), "caption": CAPTIONS[0], "row": 0}
    callbacks = [ExponentialMovingAverage(0.8), Checkpoints(tmp_path, 2)]
    make_trainer(callbacks, max_steps=2).fit(module, DataLoader([record] * 4, batch_size=2))
    loaded = TextToImageModule.load_from_checkpoint(tmp_path / "step-00000002.ckpt")
    assert loaded.has_averaged_weights
    assert torch.equal(flat(loaded), flat(module.average))
    own, again = (one.pipeline().unet.state_dict() for one in (module, loaded))
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)


def test_a_pipeline_without_a_name_is_passed(make_trainer, tmp_path):
    module = TextToImageModule(ModelOptions(), tiny_pipeline(), (3, 8, 8))
    record = {"image": torch.zeros(3, 8, 8), "caption": CAPTIONS[0], "row": 0}
    loader = DataLoader([record] * 2, batch_size=2)
    make_trainer([Checkpoints(tmp_path, 1)], max_steps=1).fit(module, loader)
    path = tmp_path / "step-00000001.ckpt"
    with pytest.raises(ValueError, match="pass pipe"):
        TextToImageModule.load_from_checkpoint(path)
    loaded = TextToImageModule.load_from_checkpoint(path, pipe=tiny_pipeline(1))
    assert torch.equal(flat(loaded), flat(module))
