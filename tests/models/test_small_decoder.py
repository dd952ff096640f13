"""A small decoder of the same latents: loaded, refused, and used for estimates alone."""

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny_text import tiny_pipeline, tiny_vae

from memfree.models import load_model
from memfree.models.loading import check_decoder, decode_latents, load_decoder, pixels_per_latent


def tiny_decoder(latent_channels=4, levels=2, **config):
    torch.manual_seed(3)
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * levels,
        decoder_block_out_channels=(4,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
        latent_channels=latent_channels,
        **config,
    ).eval()


@pytest.fixture
def model_folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def latents_of(count, scale=1.0):
    return scale * torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def test_estimates_are_its_images_and_samples_are_not(model_folder, tmp_path):
    decoder = tiny_decoder()
    decoder.save_pretrained(tmp_path / "decoder")
    model, plain = load_model(model_folder, tmp_path / "decoder"), load_model(model_folder)
    latents = latents_of(3).requires_grad_()
    images = model.decode_estimate(latents)
    # TAESD takes latents as the denoiser sees them: they are not divided by the scaling factor.
    assert model.pipe.vae.config.scaling_factor == 0.7
    assert torch.equal(images, decoder.decoder(latents))
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert bool((gradient != 0).any())
    assert torch.equal(model.decode(latents), plain.decode(latents))
    assert torch.equal(plain.decode_estimate(latents), plain.decode(latents))
    assert not any(weight.requires_grad for weight in model.decoder.parameters())
    model.to(torch.device("cpu", 0))


def test_mixed_precision_does_not_reach_decoders_and_text_encoders(model_folder, tmp_path):
    tiny_decoder().save_pretrained(tmp_path / "decoder")
    model = load_model(model_folder, tmp_path / "decoder")
    for decode in (model.decode, model.decode_estimate):
        expected = decode(latents_of(3))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decode(latents_of(3)), expected)
    said = model.encode(["red apple"]).embeddings
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(["red apple"]).embeddings, said)


def test_far_latents_have_next_to_no_gradient():
    """What the documentation warns of: 3·tanh(z/3)."""
    decoder = tiny_decoder().requires_grad_(False)
    sizes = []
    for scale in (1.0, 30.0):
        latents = latents_of(2, scale).requires_grad_()
        (gradient,) = torch.autograd.grad(decode_latents(decoder, latents).sum(), latents)
        sizes.append(float(gradient.abs().median()))
    assert sizes[1] < 1e-3 * sizes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_channels": 16}, "takes latents of 16 channels .* pipeline's .* 4 channels"),
        ({"levels": 3}, "makes 4x4 pixels of 3 channels of each, the pipeline's .* 2x2"),
        ({"upsampling_scaling_factor": 4}, "makes 4x4 pixels"),
        ({"out_channels": 1, "in_channels": 1}, "makes 2x2 pixels of 1 channels"),
    ],
)
def test_a_decoder_of_other_latents_is_refused_in_one_line(config, message, model_folder, tmp_path):
    tiny_decoder(**config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"^--decoder .*other .*{message}") as error:
        load_model(model_folder, tmp_path / "other")
    assert "\n" not in str(error.value)


def test_what_is_no_decoder_is_refused(model_folder, tmp_path):
    for folder in (tmp_path / "nowhere", model_folder, model_folder / "vae"):
        with pytest.raises(ValueError, match="is not a folder of a diffusers AutoencoderTiny"):
            load_decoder(folder, tiny_vae())
    tiny_decoder().save_pretrained(tmp_path / "mixed")
    weights = "diffusion_pytorch_model.safetensors"
    tiny_decoder(latent_channels=16).save_pretrained(tmp_path / "other")
    (tmp_path / "mixed" / weights).write_bytes((tmp_path / "other" / weights).read_bytes())
    with pytest.raises(ValueError, match="weights are of another network"):
        load_decoder(tmp_path / "mixed", tiny_vae())
    with pytest.raises(ValueError, match="^it is a Linear, not an autoencoder$"):
        check_decoder(torch.nn.Linear(1, 1), tiny_vae(), "it")


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pixels_per_latent_is_what_it_decodes(levels):
    decoder = tiny_decoder(levels=levels)
    images = decode_latents(decoder, latents_of(1))
    assert images.shape[2:] == (4 * pixels_per_latent(decoder),) * 2
