"""What the guard is measured on: pipelines × schedulers × features, and the table in the docs.

Every cell is one test: where nothing is active the pipeline's bits stay, and where its images are
in the index none of them is a copy after guidance. docs/guard.md shows the cells of this module.
"""

import inspect
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from guard_parts import FAMILIES, NEVER, amg, make_index, noise, options
from peft import LoraConfig

import memfree

SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DDPM": diffusers.DDPMScheduler,
    "PNDM": diffusers.PNDMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler a": diffusers.EulerAncestralDiscreteScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "KDPM2": diffusers.KDPM2DiscreteScheduler,
    "LMS": diffusers.LMSDiscreteScheduler,
    "DPM++": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "DEIS": diffusers.DEISMultistepScheduler,
    "LCM": diffusers.LCMScheduler,
}
WITH_SCHEDULERS = ("stable_diffusion", "stable_diffusion_img2img", "stable_diffusion_inpaint")
"""Pipelines that are measured with all of these; others with the scheduler of their own."""
FEATURES = {
    "rescale": "guidance_rescale",
    "images": "num_images_per_prompt",
    "negative": "negative_prompt",
    "embeds": "prompt_embeds",
    "strength": "strength",
    "eta": "eta",
    "timesteps": "timesteps",
    "sigmas": "sigmas",
    "callback": "callback_on_step_end",
    "LoRA": "",
    "offload": "",
    "fp16": "",
    "bf16": "",
    "pil": "",
    "np": "",
    "latent": "",
}
"""Each with the argument that a pipeline's call needs to have it; empty: every pipeline has it."""
EVERY = tuple(FEATURES)
MEASURED: dict[str, tuple[str, ...]] = {
    "stable_diffusion": EVERY,
    "stable_diffusion_xl": EVERY,
    "stable_diffusion_img2img": EVERY,
    "stable_diffusion_xl_img2img": EVERY,
    "pixart": (
        "images",
        "negative",
        "embeds",
        "eta",
        "timesteps",
        "sigmas",
        "offload",
        "fp16",
        "bf16",
        "pil",
        "np",
        "latent",
    ),
    "pixart_sigma": (
        "images",
        "negative",
        "embeds",
        "bf16",
    ),
    "stable_diffusion_3": (
        "embeds",
        "bf16",
    ),
    "stable_diffusion_3_img2img": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_inpaint": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_inpaint_9": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_xl_inpaint": EVERY,
    "stable_diffusion_xl_inpaint_9": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_controlnet": (
        "embeds",
        "bf16",
    ),
    "stable_diffusion_controlnet_img2img": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_controlnet_inpaint": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_xl_controlnet": (
        "embeds",
        "bf16",
    ),
    "stable_diffusion_xl_controlnet_img2img": (
        "embeds",
        "strength",
        "bf16",
    ),
    "stable_diffusion_xl_controlnet_inpaint": (
        "embeds",
        "bf16",
    ),
    "latent_consistency": (
        "embeds",
        "bf16",
    ),
    "latent_consistency_img2img": (
        "embeds",
        "bf16",
    ),
}
"""Features that a test measures, by pipeline; whatever is not here is not measured."""
IN_SHORT = ("stable_diffusion", "stable_diffusion_xl_inpaint")
"""Pipelines whose features are not left to the exhaustive tests."""


def call_of(name):
    return inspect.signature(type(pipeline(name)).__call__).parameters


_made = {}


def pipeline(name):
    """One pipeline of each family, for what does not change it."""
    if name not in _made:
        _made[name] = getattr(tiny_pipelines, name)()
    return _made[name]


def cell(name, feature):
    """✓: measured, –: the pipeline has no such option, ?: not measured."""
    if FEATURES[feature] and FEATURES[feature] not in call_of(name):
        return "–"
    if feature == "LoRA" and "pixart" in name:
        return "–"  # its transformer takes no adapters
    return "✓" if feature in MEASURED.get(name, ()) else "?"


def short(name):
    return name.replace("stable_diffusion", "SD").replace("_", " ").replace("SD xl", "SDXL")


def tables():
    """The tables of docs/guard.md."""
    lines = ["| pipeline | " + " | ".join(SCHEDULERS) + " |", "|---" * (len(SCHEDULERS) + 1) + "|"]
    lines += [
        f"| {short(name)} | " + " | ".join("✓" for _ in SCHEDULERS) + " |"
        for name in WITH_SCHEDULERS
    ]
    lines += ["", "| pipeline | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    lines += [
        f"| {short(name)} | " + " | ".join(cell(name, feature) for feature in FEATURES) + " |"
        for name in FAMILIES
    ]
    return "\n".join(lines)


def same(first, second):
    if isinstance(first, list):
        return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    return (torch.as_tensor(first) == torch.as_tensor(second)).all()


def check(pipe, call, prompts):
    """Bits where nothing is active; copies before, and none after."""

    def made(**more):
        given = {**call, **more}
        if isinstance(given.get("generator"), list):
            given["generator"] = noise(len(given["generator"]))
        return pipe(**({} if "prompt_embeds" in given else {"prompt": prompts}), **given).images

    expected = made()
    elsewhere = make_index()
    with memfree.guard(pipe, elsewhere, amg(elsewhere, NEVER)):
        assert same(made(), expected)
    index = make_index(2 * made(output_type="pt").float().cpu() - 1)
    index.calibrations["nl2-k50-a0.5"]["sigmas"] = [-0.05] * 500
    left = []
    for guidance in ([], None):
        with memfree.guard(pipe, index, guidance) as report:
            made()
        assert all(one.finite and one.finished for one in report.verdicts)
        left.append(len(report.copies))
    assert left == [len(expected), 0] and not report.unmoved


@pytest.mark.parametrize("name", FAMILIES)
def test_20_of_20_copies_are_none_after_guidance(name):
    call = {**options(name, 20), "guidance_scale": 4.0}
    check(pipeline(name), call, ["a cat"] * 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_of_torch(dtype):
    """A caller's ``torch.set_default_dtype`` is not the guard's."""
    pipe = tiny_pipelines.stable_diffusion()
    call = {**options("stable_diffusion"), "guidance_scale": 4.0}
    torch.set_default_dtype(dtype)
    try:
        check(pipe, call, ["a cat", "two dogs"])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "name",
    [
        WITH_SCHEDULERS[0],
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in WITH_SCHEDULERS[1:]),
    ],
)
def test_schedulers(name, scheduler):
    kind = tiny_pipelines.noise_schedule(SCHEDULERS[scheduler])
    call = {**options(name), "num_inference_steps": 6, "guidance_scale": 4.0}
    check(getattr(tiny_pipelines, name)(kind), call, ["a cat", "two dogs"])


def cells():
    for name in FAMILIES:
        marks = [] if name in IN_SHORT else [pytest.mark.exhaustive]
        measured = [feature for feature in FEATURES if cell(name, feature) == "✓"]
        yield from (pytest.param(name, feature, marks=marks) for feature in measured)


@pytest.mark.parametrize(("name", "feature"), list(cells()))
def test_features(name, feature):
    pipe = getattr(tiny_pipelines, name)()
    call, prompts = {**options(name), "guidance_scale": 4.0}, ["a cat", "two dogs"]
    if feature == "images":
        call, prompts = {**call, "num_images_per_prompt": 2}, ["a cat"]
        for each in ("image", "mask_image", "control_image"):
            if each in call and "controlnet" in name:
                call[each] = call[each][:1]
    elif feature == "embeds":
        call |= embeddings(pipe, name, prompts)
    elif feature == "eta":
        pipe.scheduler = tiny_pipelines.noise_schedule()
    elif feature == "timesteps":
        call = {**call, "timesteps": [900, 700, 400, 100]}
        pipe.scheduler = tiny_pipelines.noise_schedule(diffusers.EulerDiscreteScheduler)
        if "latent_consistency" in name:
            pipe.scheduler = tiny_pipelines.noise_schedule(diffusers.LCMScheduler)
            call["timesteps"] = [899, 699, 399, 99]
    elif feature == "sigmas":
        flow = "stable_diffusion_3" in name
        call["sigmas"] = [1.0, 0.7, 0.4, 0.1] if flow else [10.0, 5.0, 2.0, 0.5]
        if not flow:
            pipe.scheduler = tiny_pipelines.noise_schedule(diffusers.EulerDiscreteScheduler)
    elif feature == "callback":
        call["callback_on_step_end"] = lambda pipe, step, t, given: {
            "latents": given["latents"] * (1.01 if step == 0 else 1)
        }
    elif feature == "LoRA":
        part = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        part.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    elif feature == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    elif feature in ("fp16", "bf16"):
        pipe = pipe.to(torch.float16 if feature == "fp16" else torch.bfloat16)
    elif feature in ("pil", "np", "latent"):
        call["output_type"] = feature
    more = {
        "rescale": {"guidance_rescale": 0.7},
        "negative": {"negative_prompt": ["red", "blue"]},
        "strength": {"strength": 0.5, "num_inference_steps": 6},
        "eta": {"eta": 0.5},
    }
    check(pipe, {**call, **more.get(feature, {})}, prompts)


def embeddings(pipe, name, prompts):
    """Encoded prompts, of twice the length that CLIP encodes."""
    if "xl" in name or "stable_diffusion_3" in name or "pixart" in name:
        values = pipe.encode_prompt(**{"prompt": prompts, **more_prompts(name)})
    else:
        values = pipe.encode_prompt(prompts, "cpu", 1, True)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if "pixart" in name:
        names = [
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        ]
    elif "xl" in name or "stable_diffusion_3" in name:
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    call = dict(zip(names, values, strict=True))
    if "pixart" in name:
        call["negative_prompt"] = None
    else:
        for each in names[:2]:
            call[each] = call[each].repeat(1, 2, 1)
    return {each: value for each, value in call.items() if each in call_of(name)}


def more_prompts(name):
    if "stable_diffusion_3" in name:
        return {"prompt_2": None, "prompt_3": None, "max_sequence_length": 16}
    return {}


def test_the_documentation_shows_the_cells_of_this_module():
    page = (Path(__file__).parents[2] / "docs" / "guard.md").read_text()
    assert tables() in page
