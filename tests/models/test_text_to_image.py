"""Fine-tuning a text-to-image pipeline: the loss, what is trained, and what is saved."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny_text import CAPTIONS, tiny_pipeline, tiny_xl

from memfree.models import FineTuneOptions, ModelOptions, export_model, load_model, text_to_image
from memfree.models.text_pipeline import check_pipeline, encode, load_pipeline
from memfree.models.text_to_image import TextToImageModule, min_snr_weight

SHAPE = (3, 8, 8)


def batch(count=4):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, *SHAPE, generator=generator) * 2 - 1
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    return {"image": images, "caption": captions, "row": torch.arange(count)}


def module_of(pipe, label_dropout=0.0, **finetune):
    options = ModelOptions(finetune=FineTuneOptions(**finetune), label_dropout=label_dropout)
    return TextToImageModule(options, pipe, SHAPE)


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_that_of_latent_diffusion(kind, gamma):
    pipe = tiny_pipeline(prediction_type=kind)
    module, given = module_of(pipe, min_snr_gamma=gamma), batch()
    loss = module.loss(given, generator())
    # By hand, in the order of the draws: posterior, noise, timestep.
    source = generator()
    with torch.no_grad():
        posterior = pipe.vae.encode(given["image"]).latent_dist
        drawn = torch.randn(posterior.mean.shape, generator=source)
        x_0 = 0.7 * (posterior.mean + posterior.std * drawn)
        noise = torch.randn(x_0.shape, generator=source)
        t = torch.randint(1000, (4,), generator=source)
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        x_t = scheduler.add_noise(x_0, noise, t)
        tokens = pipe.tokenizer(given["caption"], padding="max_length", return_tensors="pt")
        text = pipe.text_encoder(tokens.input_ids)[0]
        output = pipe.unet(x_t, t, encoder_hidden_states=text).sample
        target = noise if kind == "epsilon" else scheduler.get_velocity(x_0, noise, t)
        errors = (output - target).square().mean(dim=(1, 2, 3))
        if gamma:
            a = scheduler.alphas_cumprod[t].double()
            snr = a / (1 - a)
            errors *= snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)
    assert loss.item() == pytest.approx(float(errors.mean()), rel=1e-4)


def test_min_snr_weights():
    a = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)  # SNR 1, 9, 99
    assert torch.allclose(
        min_snr_weight(a, 5.0, "epsilon"), torch.tensor([1, 5 / 9, 5 / 99]).double()
    )
    assert torch.allclose(
        min_snr_weight(a, 5.0, "v_prediction"), torch.tensor([1 / 2, 5 / 10, 5 / 100]).double()
    )


def test_dropped_captions_are_empty_ones():
    pipe = tiny_pipeline()
    module, given = module_of(pipe, label_dropout=1.0), batch()
    loss = module.loss(given, generator())
    assert torch.equal(loss, module.loss({**given, "caption": [""] * 4}, generator()))
    assert not torch.equal(loss, module_of(pipe).loss(given, generator()))


@pytest.mark.parametrize("pipe", [tiny_pipeline, tiny_xl])
def test_caches_change_nothing_and_ask_once(pipe, monkeypatch):
    pipe, given = pipe(), batch()
    plain, cached = module_of(pipe), module_of(pipe, cache=True)
    expected = plain.loss(given, generator())
    assert torch.equal(cached.loss(given, generator()), expected)
    assert len(cached.latent_cache) == 4
    monkeypatch.setattr(type(pipe.vae), "encode", None)
    monkeypatch.setattr(type(pipe), "encode_prompt", None)
    assert torch.equal(cached.loss(given, generator()), expected)


@pytest.mark.parametrize(
    ("finetune", "trained"),
    [
        ({}, {"network"}),
        ({"train_text_encoder": True}, {"network", "text_encoders"}),
        ({"lora_rank": 2}, {"network"}),
    ],
)
def test_what_is_trained(finetune, trained):
    pipe = tiny_pipeline()
    module = module_of(pipe, **finetune)
    module.loss(batch(), generator()).backward()
    moved = [name for name, one in module.named_parameters() if one.grad is not None]
    assert {name.split(".")[0] for name in moved} == trained
    if "lora_rank" in finetune:
        assert all("lora" in name for name in moved)
    assert all(one.grad is None for one in pipe.vae.parameters())


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_saved_pipeline_is_the_trained_one(make, rank, tmp_path):
    pipe = make()
    before = copy.deepcopy(pipe.unet.state_dict())
    module, given = module_of(pipe, lora_rank=rank), batch()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # an adapter's first step moves one of its two factors only
        optimizer.zero_grad()
        module.loss(given, generator()).backward()
        optimizer.step()
    export_model(tmp_path, module.pipeline(), 0, image_shape=list(SHAPE), **module.facts())
    loaded = load_model(tmp_path)
    saved = loaded.pipe.unet.state_dict()
    assert saved.keys() == before.keys()
    assert any(not torch.equal(saved[name], before[name]) for name in before)
    x, t = torch.randn(2, 4, 4, 4, generator=generator()), torch.tensor(40)
    conditions = encode(pipe, CAPTIONS[:2])
    module.eval()
    with torch.no_grad():
        expected = module.denoiser(x, t, conditions)
        assert torch.allclose(
            loaded.denoiser(x, t, loaded.encode(CAPTIONS[:2])), expected, atol=1e-5
        )
    assert loaded.noise_shape == (4, 4, 4)


def test_adapters_load_into_the_plain_pipeline(tmp_path):
    pipe = tiny_pipeline()
    plain = copy.deepcopy(pipe)
    module = module_of(pipe, lora_rank=2)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    module.save_adapters(tmp_path)
    plain.load_lora_weights(tmp_path)
    x, text = torch.randn(1, 4, 4, 4, generator=generator()), encode(pipe, ["red apple"]).embeddings
    with torch.no_grad():
        ours, theirs = (one.unet(x, 5, encoder_hidden_states=text).sample for one in (pipe, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_previews_are_images(monkeypatch):
    module = module_of(tiny_pipeline())
    module.loss(batch(), generator())
    images = module.preview(5, 2, 0)
    assert images.shape == (5, *SHAPE)
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, module.preview(5, 2, 0))
    monkeypatch.setattr(text_to_image, "PREVIEW_PIXELS", 2 * 8 * 8)
    assert torch.allclose(images, module.preview(5, 2, 0), atol=1e-4)


def test_the_tokenizer_writes_any_prompt(tmp_path):
    pipe = tiny_pipeline()
    text = "Ünseen wörds, 漢字!"
    ids = pipe.tokenizer(text).input_ids
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == (
        text.lower().replace(" ", "")
    )
    assert len(pipe.tokenizer("red apple").input_ids) == 4  # words of the captions are tokens
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.tokenizer(text).input_ids == ids
    assert isinstance(again, StableDiffusionPipeline)
    assert torch.equal(encode(again, [text]).embeddings, encode(pipe, [text]).embeddings)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="needs captions"):
        module_of(pipe).loss({"image": batch()["image"]}, generator())
    with pytest.raises(ValueError, match="--channels 3"):
        TextToImageModule(ModelOptions(), pipe, (1, 8, 8))
    with pytest.raises(ValueError, match="--image_size that 2 divides"):
        TextToImageModule(ModelOptions(), pipe, (3, 7, 8))
    with pytest.raises(ValueError, match=r"lora_alpha needs .*lora_rank"):
        module_of(pipe, lora_alpha=4.0)
    with pytest.raises(ValueError, match="random_flip"):
        options = ModelOptions(finetune=FineTuneOptions(cache=True))
        TextToImageModule(options, pipe, SHAPE, data={"random_flip": True})
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="has no text_encoder"):
        check_pipeline(pipe, "it")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
