"""The guard in company: denoisers that others call too, wrapped, cached or compiled ones."""

import threading

import accelerate
import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from guard_parts import (
    PROMPTS,
    ActiveRows,
    amg,
    drawn,
    make_index,
    make_latents,
    noise,
    options,
    refused,
    state,
)
from torch import nn

import memfree
from memfree.guidance import GuidanceSettings
from memfree.guidance.baselines.opposite_guidance import OppositeGuidance
from memfree.guidance.baselines.wen_norm import WenNorm
from memfree.pipeline_guard.decode import Decoder


def sharing(pipe):
    """Another pipeline with the same denoiser and a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return tiny_pipelines.stable_diffusion(scheduler, unet=pipe.unet)


def other_call(pipe):
    return pipe(
        "another prompt", num_inference_steps=3, output_type="pt", generator=noise(1)
    ).images


class Official(PipelineCallback):
    """A callback of diffusers' own kind."""

    tensor_inputs = ["latents"]

    def __init__(self, run):
        super().__init__()
        self.run = run

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.run(step_index)
        return callback_kwargs


CALLBACKS = {
    "function": lambda run: {
        "callback_on_step_end": lambda pipe, i, t, kept: run(i) or kept,
    },
    "official": lambda run: {"callback_on_step_end": Official(run)},
    "several": lambda run: {"callback_on_step_end": MultiPipelineCallbacks([Official(run)])},
    "legacy": lambda run: {"callback": lambda i, t, latents: run(i), "callback_steps": 1},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("form", list(CALLBACKS))
@pytest.mark.parametrize("shared_scheduler", [False, True])
def test_another_pipeline_in_a_callback_is_left_alone(index, form, shared_scheduler):
    pipe = tiny_pipelines.stable_diffusion()
    other = sharing(pipe)
    if shared_scheduler:  # DDIM keeps nothing of a call but its number of steps
        other.scheduler = pipe.scheduler
    call = {"num_inference_steps": 3}
    expected, outside = drawn(pipe, **call), other_call(other)
    with memfree.guard(pipe, index, ActiveRows([0])):
        guarded = drawn(pipe, **call)
    assert not torch.equal(guarded, expected)
    seen, direct = [], []

    def run(step):
        seen.append(other_call(other))
        if step == 1:
            x = torch.ones(4, 4, 8, 8)
            direct.append(pipe.unet(x, 3, encoder_hidden_states=torch.ones(4, 16, 32)).sample)

    with memfree.guard(pipe, index, ActiveRows([0])) as report:
        images = drawn(pipe, **call, **CALLBACKS[form](run))
    assert torch.equal(images, guarded)
    assert len(seen) == 3 and all(torch.equal(one, outside) for one in seen)
    plain = pipe.unet(torch.ones(4, 4, 8, 8), 3, encoder_hidden_states=torch.ones(4, 16, 32)).sample
    assert torch.equal(direct[0], plain)
    assert report.trace["step"].to_pylist() == [0, 0, 1, 1, 2, 2]


def test_the_pipeline_itself_may_be_called_in_its_callback(index):
    pipe = tiny_pipelines.stable_diffusion()
    with memfree.guard(pipe, index, ActiveRows([0])):
        guarded, inner = drawn(pipe), drawn(pipe, num_inference_steps=4, prompt=["x", "y"])
    seen = []

    def once(pipeline, step, t, kept):
        if step == 3:
            seen.append(drawn(pipe, num_inference_steps=4, prompt=["x", "y"]))
        return kept

    with memfree.guard(pipe, index, ActiveRows([0])) as report:
        assert torch.equal(drawn(pipe, callback_on_step_end=once), guarded)
    assert torch.equal(seen[0], inner)
    assert len(report.verdicts) == 4 and len(report.trace) == 16


@pytest.mark.parametrize("other_is_guarded", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_threads_share_a_denoiser(index, other_is_guarded, compiled):
    pipe = tiny_pipelines.stable_diffusion()
    other = sharing(pipe)
    if compiled:
        pipe.unet.compile(backend="eager")
    guidances = {True: ActiveRows([0]), False: ActiveRows([0], change=0.7)}

    def guarded(which, **call):
        with memfree.guard(which, index, guidances[which is pipe]):
            return drawn(which, num_inference_steps=6, **call)

    def second():
        return guarded(other) if other_is_guarded else drawn(other, num_inference_steps=6)

    expected = guarded(pipe), second()
    results, failed = {}, []

    def repeat(name, draw):
        try:
            results[name] = [draw() for _ in range(3)]
        except BaseException as error:
            failed.append(error)
            raise

    before = torch.get_rng_state()
    threads = [
        threading.Thread(target=repeat, args=("first", lambda: guarded(pipe))),
        threading.Thread(target=repeat, args=("second", second)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(torch.equal(one, expected[0]) for one in results["first"])
    assert all(torch.equal(one, expected[1]) for one in results["second"])
    assert torch.equal(torch.get_rng_state(), before)


class InAThread(diffusers.StableDiffusionPipeline):
    """Draws in a thread of its own."""

    def __call__(self, prompt, **kwargs):
        made = []
        call = super().__call__
        thread = threading.Thread(target=lambda: made.append(call(prompt, **kwargs)))
        thread.start()
        thread.join()
        return made[0]


def test_a_denoiser_that_is_called_elsewhere_is_not_missed_silently(index):
    pipe = tiny_pipelines.stable_diffusion(kind=InAThread)
    with (
        refused("denoiser was called 0 times"),
        memfree.guard(pipe, index, ActiveRows([0])),
    ):
        drawn(pipe)


@pytest.mark.parametrize("name", ["unet", "scheduler"])
def test_a_part_that_a_callback_replaces_is_noticed(index, name):
    pipe = tiny_pipelines.stable_diffusion()
    parts = {"unet": tiny_pipelines.unet(seed=3), "scheduler": tiny_pipelines.noise_schedule()}

    def swap(pipeline, step, t, kept):
        setattr(pipeline, name, parts[name])
        return kept

    with (
        pytest.raises(ValueError, match=f"callback replaced the {name}"),
        memfree.guard(pipe, index, ActiveRows([0])),
    ):
        drawn(pipe, callback_on_step_end=swap)


class OneBranchACall(diffusers.StableDiffusionPipeline):
    """Calls its U-Net once a branch of classifier-free guidance."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps, guidance_scale=4.0, generator=None, **_):
        self._guidance_scale = guidance_scale
        cond, uncond = self.encode_prompt(prompt, "cpu", 1, True)
        self.scheduler.set_timesteps(num_inference_steps)
        x = self.prepare_latents(len(prompt), 4, 16, 16, cond.dtype, "cpu", generator)
        for t in self.scheduler.timesteps:
            eps, eps_cond = (self.unet(x, t, y, return_dict=False)[0] for y in (uncond, cond))
            x = self.scheduler.step(eps + guidance_scale * (eps_cond - eps), t, x).prev_sample
        return (self.vae.decode(x, return_dict=False)[0].clamp(0, 1),)


@pytest.mark.parametrize("count", [1, 2])
def test_a_pipeline_that_calls_its_denoiser_once_a_branch_is_refused(index, count):
    """Its batch would be cut in half as if it held both branches."""
    pipe = tiny_pipelines.stable_diffusion(kind=OneBranchACall)
    with (
        refused("both branches of classifier-free guidance"),
        memfree.guard(pipe, index, ActiveRows([0])),
    ):
        pipe(PROMPTS[:count], **options("", count))


class Anonymous(nn.Module):
    """A wrapper that names no arguments."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, module.config
        self.device, self.dtype = module.device, module.dtype

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class OtherNames(Anonymous):
    """A wrapper whose arguments have names of its own."""

    def forward(self, x, t, *, encoder_hidden_states, **kwargs):
        return self.module(x, t, encoder_hidden_states, **kwargs)


def replaced_forward(unet):
    """As DeepCache and others do, which look at their second argument."""
    forward = unet.forward

    def wrapped(*args, **kwargs):
        assert args[1].ndim == 0
        return forward(*args, **kwargs)

    unet.forward = wrapped
    return unet


WRAPPED = {
    "module": Anonymous,
    "other names": OtherNames,
    "forward": replaced_forward,
    "compile": lambda unet: torch.compile(unet, backend="eager"),
    "in place": lambda unet: unet.compile(backend="eager") or unet,
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_a_wrapped_denoiser_is_guarded_as_the_denoiser_itself(index, name):
    pipe = tiny_pipelines.stable_diffusion()
    unguarded = drawn(pipe)
    with memfree.guard(pipe, index, amg(index)):
        expected = drawn(pipe)
    pipe.unet = WRAPPED[name](pipe.unet)
    before = state(pipe)
    with memfree.guard(pipe, index, amg(index)) as report:
        images = drawn(pipe)
    assert state(pipe) == before
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(images, unguarded, atol=1e-3)
    assert max(report.trace["s2"].to_pylist()) > 0  # the neighbour's caption was told
    torch.testing.assert_close(drawn(pipe), unguarded)


def deep_cache(unet):
    """DeepCache: the forward of blocks is answered from a cache at every second step."""

    class Helper:
        cached, step = {}, 0

    helper = Helper()

    def cached(name, forward):
        def run(*args, **kwargs):
            if helper.step % 2:
                return helper.cached[name]
            helper.cached[name] = forward(*args, **kwargs)
            return helper.cached[name]

        return run

    def counted(forward):
        def run(*args, **kwargs):
            result = forward(*args, **kwargs)
            helper.step += 1
            return result

        return run

    unet.mid_block.forward = cached("mid", unet.mid_block.forward)
    unet.forward = counted(unet.forward)


def tea_cache(unet):
    """TeaCache: a forward that keeps the last output in attributes of the module."""

    def run(self, *args, **kwargs):
        self.previous = {"output": type(self).forward(self, *args, **kwargs)}
        return self.previous["output"]

    unet.forward = run.__get__(unet)


def gate(unet):
    """T-GATE: attention processors that keep what they computed."""

    class Keeping(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            self.kept = super().__call__(*args, **kwargs)
            return self.kept

    unet.set_attn_processor({name: Keeping() for name in unet.attn_processors})


def broadcast(unet):
    """Pyramid attention broadcast, of diffusers."""
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("attentions",),
        cross_attention_block_identifiers=("attentions",),
        current_timestep_callback=lambda: 500,
    )
    diffusers.hooks.apply_pyramid_attention_broadcast(unet, config)


@pytest.mark.parametrize("enable", [deep_cache, tea_cache, gate, broadcast])
def test_caches_that_further_calls_would_spoil_are_refused(index, enable):
    pipe = tiny_pipelines.stable_diffusion()
    enable(pipe.unet)
    with (
        refused("memfree.guard: the denoiser caches what it"),
        memfree.guard(pipe, index, amg(index)),
    ):
        drawn(pipe)


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: accelerate.cpu_offload(pipe.unet, torch.device("cpu")),
    "group": lambda pipe: diffusers.hooks.apply_group_offloading(
        pipe.unet, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "casting": lambda pipe: pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("name", list(OFFLOADS))
def test_hooks_that_move_weights_are_no_cache(index, name):
    pipe = tiny_pipelines.stable_diffusion()
    OFFLOADS[name](pipe)
    unguarded = drawn(pipe)
    with memfree.guard(pipe, index, amg(index)) as report:
        images = drawn(pipe)
    assert max(report.trace["s2"].to_pylist()) > 0 and not torch.equal(images, unguarded)
    assert torch.equal(drawn(pipe), unguarded)


@pytest.mark.parametrize("enable", [deep_cache, tea_cache, gate])
def test_guidance_that_calls_no_denoiser_works_with_caches(index, enable):
    pipe = tiny_pipelines.stable_diffusion()
    enable(pipe.unet)
    jain = OppositeGuidance().guidances()
    for guidance in ([], amg(index, c1=0.1, c2=0.0, c3=30.0), [*jain, WenNorm()]):
        with memfree.guard(pipe, index, guidance) as report:
            drawn(pipe)
        assert len(report.verdicts) == 2


def test_a_denoiser_compiled_in_place_keeps_the_hooks_out_of_its_graph(index):
    """One graph of the U-Net, whole (``fullgraph``), before, inside and after the block."""
    pipe, graphs = tiny_pipelines.stable_diffusion(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with memfree.guard(pipe, index, ActiveRows([0])):
        expected = drawn(pipe)
    unguarded = drawn(pipe)
    pipe.unet.compile(backend=backend, fullgraph=True)
    with memfree.guard(pipe, index, ActiveRows([0])):
        torch.testing.assert_close(drawn(pipe), expected)
    count = len(graphs)
    torch.testing.assert_close(drawn(pipe), unguarded)
    with memfree.guard(pipe, index, ActiveRows([0])):
        torch.testing.assert_close(drawn(pipe), expected)
    assert len(graphs) == count == 1


class DrawingDecoder(diffusers.AutoencoderKL):
    """An autoencoder whose decoder draws, as consistency decoders do."""

    def decode(self, z, *args, **kwargs):
        return super().decode(z + 1e-3 * torch.randn_like(z), *args, **kwargs)


@pytest.mark.parametrize("on_copy", ["keep", "resample"])
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_what_the_guard_draws_does_not_move_torchs_own_generator(index, on_copy, output_type):
    """The pipeline draws its noise from there: no ``generator`` is given."""
    vae = tiny_pipelines.seeded(lambda: DrawingDecoder(**tiny_pipelines.autoencoder().config))
    pipe = tiny_pipelines.stable_diffusion(
        tiny_pipelines.noise_schedule(diffusers.EulerAncestralDiscreteScheduler), vae=vae
    )
    call = {"num_inference_steps": 4, "output_type": output_type}

    def draw():
        torch.manual_seed(3)
        return pipe(PROMPTS, **call).images, torch.get_rng_state()

    expected, state_after = draw()
    everything = make_index()
    everything.calibrations["nl2-k50-a0.5"]["sigmas"] = [-9.0] * 500  # every image is a copy
    watching = amg(everything, threshold=1.0, c3=0.0)
    for guidance in ([], watching):
        with memfree.guard(pipe, everything, guidance, on_copy=on_copy, budget=3) as report:
            images, after = draw()
        assert torch.equal(after, state_after)
        assert all(one.draws == (1 if on_copy == "keep" else 3) for one in report.verdicts)
        if on_copy == "keep":
            assert torch.equal(images, expected)


def test_torchs_generators_stay_with_other_threads_where_nothing_draws(index, monkeypatch):
    """They are of the process: what another thread drew meanwhile would be of the guard's seed."""
    pipe, moved = tiny_pipelines.stable_diffusion(), []
    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "set_rng_state", moved.append)
    with memfree.guard(pipe, index, amg(index)) as report:
        for output_type in ("pt", "latent"):
            drawn(pipe, output_type=output_type)
    assert max(report.trace["s2"].to_pylist()) > 0
    assert not moved and torch.equal(torch.get_rng_state(), before)


def test_noise_of_the_guards_own_differs_from_step_to_step(index):
    pipe, drawn_here = tiny_pipelines.stable_diffusion(), []

    def guidance(prediction):
        drawn_here.append(float(torch.rand(())))
        return prediction

    with memfree.guard(pipe, index, guidance):
        drawn(pipe)
    assert len(set(drawn_here)) == 4


@pytest.mark.parametrize("offload", ["none", "model", "sequential", "group"])
def test_the_float32_copy_of_an_autoencoder_is_of_the_autoencoder_alone(
    index, offload, monkeypatch
):
    """Hooks of offloading know the pipeline's other models."""
    monkeypatch.setattr(type(tiny_pipelines.unet()), "__deepcopy__", refuse_copy, raising=False)
    monkeypatch.setattr(
        type(tiny_pipelines.clip_text_encoder()), "__deepcopy__", refuse_copy, raising=False
    )
    vae = tiny_pipelines.autoencoder(force_upcast=True).half()
    pipe = tiny_pipelines.stable_diffusion(vae=vae)
    expected = tiny_pipelines.autoencoder(force_upcast=True).half().float()
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device="cpu")
    elif offload == "group":
        diffusers.hooks.apply_group_offloading(
            vae, onload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = Decoder(vae, index, None)(latents)
    scaled = latents / vae.config.scaling_factor
    torch.testing.assert_close(images, expected.decode(scaled, return_dict=False)[0])


def refuse_copy(self, memo):
    raise AssertionError(f"{type(self).__name__} was copied")


def test_a_replaced_autoencoder_is_the_one_that_decides(index):
    """What is guided and judged is what the pipeline now decodes."""
    pipe = tiny_pipelines.stable_diffusion()
    seen = []

    def watch(prediction):
        seen.append((prediction.decode, prediction.clean_estimate()))
        return prediction

    with memfree.guard(pipe, index, watch) as report:
        drawn(pipe)
        pipe.vae = tiny_pipelines.autoencoder(seed=5)
        images = drawn(pipe)
        latents = drawn(pipe, output_type="latent")
    decode, estimate = seen[-1]
    scaled = estimate / pipe.vae.config.scaling_factor
    expected = pipe.vae.decode(scaled, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(decode(estimate), expected)
    with memfree.guard(pipe, index, []) as fresh:
        assert torch.equal(drawn(pipe), images)
        assert torch.equal(drawn(pipe, output_type="latent"), latents)
    assert [one.similarity for one in report.verdicts[2:]] == [
        one.similarity for one in fresh.verdicts
    ]


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("unet", lambda: tiny_pipelines.unet(in_channels=9), "takes 9 channels"),
        ("vae", lambda: tiny_pipelines.autoencoder(latent_channels=3), "takes 4 channels"),
        (
            "scheduler",
            lambda: diffusers.EDMEulerScheduler(),
            "sigma_data",
        ),
    ],
)
def test_a_part_that_cannot_be_guarded_is_refused_when_it_is_replaced(
    index, name, replace, message
):
    pipe = tiny_pipelines.stable_diffusion()
    with memfree.guard(pipe, index, []) as report:
        drawn(pipe)
        setattr(pipe, name, replace())
        with pytest.raises(ValueError, match=message):
            drawn(pipe)
    assert len(report.verdicts) == 2


def test_references_of_the_old_autoencoder_are_refused_with_a_new_one(index):
    pipe = tiny_pipelines.stable_diffusion()
    settings = GuidanceSettings("multiplicity")
    with memfree.guard(pipe, index, settings, latents=make_latents()):
        drawn(pipe)
        pipe.vae = tiny_pipelines.autoencoder(seed=5)
        with pytest.raises(ValueError, match="latents= holds latents of another autoencoder"):
            drawn(pipe)


def test_a_replaced_denoiser_and_scheduler_are_guarded(index):
    pipe = tiny_pipelines.stable_diffusion()
    with memfree.guard(pipe, index, ActiveRows([0])) as report:
        drawn(pipe)
        pipe.unet = tiny_pipelines.unet(seed=3)
        pipe.scheduler = tiny_pipelines.noise_schedule(diffusers.EulerDiscreteScheduler)
        images = drawn(pipe)
    assert not torch.equal(images, drawn(pipe)) and len(report.trace) == 16
