"""The guard in half precision, compiled, offloaded, and what memory its gradients take."""

import pytest
import tiny_pipelines
import torch
from compute_devices import DEVICES, additional_memory, on_gpu
from guard_parts import ALWAYS, amg, drawn, make_index, noise, options, state

import memfree
from memfree.guidance import ConstantThreshold, NormalizedL2, Observer, SteadyAMG
from memfree.guidance.equations import ThresholdSchedule

PRECISIONS = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    on_gpu("cuda", torch.float32),
    on_gpu("cuda", torch.float16),
    on_gpu("cuda", torch.bfloat16),
]


class Forced(SteadyAMG):
    """AMG whose gate is open to the first rows of every step."""

    def __init__(self, index, count):
        super().__init__(
            index, NormalizedL2(), ConstantThreshold(ALWAYS), c3=30.0, max_displacement=0.1
        )
        self.count = count

    def opens(self, detection, records):
        sigma = detection.match.sigma
        return torch.arange(len(sigma), device=sigma.device) < self.count


def seen_by(pipe, index, guidance=None):
    """Images, report, and σ (steps, 2) of a guarded call."""
    guidance = guidance or Observer(index, NormalizedL2(), ThresholdSchedule(-1.5, -0.5))
    with memfree.guard(pipe, index, guidance) as report:
        images = drawn(pipe)
    return images, report, torch.tensor(report.trace["sigma"].to_pylist()).reshape(-1, 2)


@pytest.mark.parametrize(("device", "dtype"), PRECISIONS)
def test_active_rows_are_no_copies_and_others_have_the_pipelines_bits(device, dtype):
    pipe = tiny_pipelines.stable_diffusion().to(device, dtype)
    expected = drawn(pipe)
    before = state(pipe)
    assert expected.dtype == dtype and expected.device.type == device
    index = make_index(2 * expected[:1].float().cpu() - 1)  # the first image is in the index
    _, _, sigma = seen_by(pipe, index)
    # Above anything that the second image comes to, below what the first one ends at.
    threshold = float(sigma[:, 1].max()) / 2
    assert threshold < -0.02 and float(sigma[-1, 0]) > threshold / 4
    index.calibrations["nl2-k50-a0.5"]["sigmas"] = [threshold] * 500
    guidance = amg(
        index, threshold, c3=30.0, max_displacement=0.5, final_correction=1.3 * threshold
    )
    images, report, _ = seen_by(pipe, index, guidance)
    assert torch.equal(images[1], expected[1]) and not torch.equal(images[0], expected[0])
    assert bool(images.isfinite().all())
    active = torch.tensor(report.trace["active"].to_pylist()).reshape(-1, 2)
    assert bool(active[:, 0].any()) and not bool(active[:, 1].any())
    assert [one.copy for one in report.verdicts] == [False, False]
    assert [one.copy for one in seen_by(pipe, index)[1].verdicts] == [True, False]
    assert state(pipe) == before and index.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "eager"), on_gpu("cuda", "eager"), on_gpu("cuda", "inductor")]
)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_denoiser_is_guarded_like_the_plain_one(device, backend, in_place):
    pipe, index = tiny_pipelines.stable_diffusion().to(device), make_index()
    expected = seen_by(pipe, index, Forced(index, 1))[0]
    torch._dynamo.reset()
    if in_place:
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    plain = drawn(pipe)
    images, report, _ = seen_by(pipe, index, Forced(index, 1))
    torch.testing.assert_close(images, expected, atol=2e-3, rtol=0)
    assert torch.equal(images[1], plain[1]) and not torch.equal(images[0], plain[0])
    assert report.trace["active"].to_pylist() == [True, False] * 4
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("small", [False, True])
def test_an_offloaded_pipeline_is_guarded_like_one_in_place(device, small):
    index = make_index()
    guidance = amg(index, final_correction=-1.0)
    decoder = tiny_pipelines.tiny_autoencoder() if small else None

    def made(pipe):
        with memfree.guard(pipe, index, guidance, decoder=decoder, chunk_size=1) as report:
            images = drawn(pipe)
        return images, [one.similarity for one in report.verdicts]

    expected = made(tiny_pipelines.stable_diffusion().to(device))
    pipe = tiny_pipelines.stable_diffusion()
    pipe.enable_model_cpu_offload(device=device)
    plain = drawn(pipe)
    found = made(pipe)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
    assert found[1] == pytest.approx(expected[1], abs=1e-3)
    assert torch.equal(drawn(pipe), plain)
    assert {part.device.type for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {"cpu"}
    assert index.device.type == "cpu" and (decoder is None or decoder.device.type == "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_take_the_memory_of_active_rows_alone(device, record_property):
    """Stated in bytes in the report of pytest (``--junitxml``) and with ``-s``."""
    count = 16
    pipe = tiny_pipelines.stable_diffusion(vae=tiny_pipelines.autoencoder(layers_per_block=3))
    pipe, index = pipe.to(device), make_index()
    pipe.vae.requires_grad_(False)
    call = {**options("stable_diffusion", count), "num_inference_steps": 2}

    def peak(active, **extra):
        def draw():
            guidance = Observer(index, NormalizedL2(), ConstantThreshold(0.0))
            with memfree.guard(pipe, index, Forced(index, active) if active else guidance, **extra):
                pipe(["a cat"] * count, **{**call, "generator": noise(count)})

        draw()  # what is allocated once
        bytes_ = additional_memory(draw, device)
        name = f"peak bytes on {device}, {active} of {count} samples active"
        record_property(f"{name}{', chunks of 1' if extra else ''}", bytes_)
        print(f"{name} {extra}: {bytes_}")
        return bytes_

    none, one, every = peak(0), peak(1), peak(count)
    if none is None:
        pytest.skip("this torch's profiler does not tell allocations")
    assert one < none + 0.2 * (every - none)
    assert every > 1.5 * none
    assert peak(count, chunk_size=1) < none + 0.5 * (every - none)
