"""Every baseline through all its stages and the sampler, on a tiny random text-to-image U-Net."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_text_model import SHAPE, TOKENS, WIDTH, generators, tiny_unet

from memfree.conditions import TextConditions
from memfree.guidance import GuidanceSettings, baselines
from memfree.guidance.mitigation import Sequential, Start
from memfree.sampling import sample

STEPS = 4
PROMPTS = ["red cat", "two dogs", "a", "small green bird house"]
WORDS = ["red", "cat", "two", "dogs", "a", "small", "green", "bird", "house"]


class Text(baselines.TextTools):
    """Words as tokens, with no tokenizer."""

    def __init__(self):
        self.prompts = ["cat red", "dogs", "green house", "bird"]

    def words(self):
        return WORDS

    def count_tokens(self, prompts):
        return [min(len(prompt.split()) + 2, TOKENS) for prompt in prompts]


def encode(prompts):
    """A fixed vector for each character of a word, and one for each place."""
    places = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    made = places.expand(len(prompts), -1, -1).clone()
    for row, prompt in enumerate(prompts):
        for place, word in enumerate(prompt.split()[: TOKENS - 2]):
            for letter in word:
                vector = torch.Generator().manual_seed(ord(letter))
                made[row, place + 1] += torch.randn(WIDTH, generator=vector)
    return TextConditions(made)


@pytest.fixture(scope="module")
def network():
    # float64 inside: what optimisers make of a float32 network depends on the batch size.
    return tiny_unet().double()


def draw(network, mitigation, rows, scale=4.0, kind="epsilon"):
    """Samples ``rows`` with all stages of a mitigation, as whoever runs it should."""
    sources = [generators(4)[row] for row in rows]
    noise = torch.stack([torch.randn(SHAPE, generator=one) for one in sources])
    prompts = mitigation.prompts([PROMPTS[row] for row in rows], sources)
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(STEPS)

    def denoiser(x, t, y):
        text = encode([""] * len(x)) if y is None else y
        return network(x.double(), t, text.embeddings.double()).sample.float()

    first = scheduler.timesteps[0]
    start = Start(
        noise=noise,
        conditions=encode(prompts),
        unconditional=encode([""] * len(rows)),
        denoise=lambda x, y: denoiser(x, first, y),
        alpha_bar=scheduler.alphas_cumprod[first],
        prediction_type=kind,
        guidance_scale=scale,
        generators=sources,
    )
    conditions = mitigation.embedding(start)
    start = Start(**{**vars(start), "conditions": conditions})
    noise = mitigation.initial_noise(start)
    with mitigation.around(network):
        return sample(
            denoiser,
            scheduler,
            noise,
            STEPS,
            guidance=mitigation.guidances(),
            conditions=conditions,
            guidance_scale=mitigation.guidance_scale(scale),
            encode=encode,
        ).images


# Thresholds low enough that a random network's samples are above them.
LOW = {
    "wen": baselines.PromptEmbeddingOptions(target=0.1, iterations=3),
    "sail": baselines.SharpnessAwareOptions(threshold=0.1, iterations=2, candidates=2),
    "prss": baselines.PromptReanchoringOptions(trigger=0.01, target=0.02, threshold=0.05),
    "jain": baselines.OppositeGuidanceOptions("dynamic"),
}
OPTIMIZED = {
    "prss": baselines.PromptReanchoringOptions(
        "optimized", trigger=0.01, target=0.02, threshold=0.05
    )
}
NAMES = ["lower_guidance", "rt", "rna", "cwr", "gni", "wen", "ren", "jain", "prss", "sail"]


@pytest.fixture(scope="module")
def plain(network):
    return {
        kind: draw(network, GuidanceSettings().for_text(), [0, 1, 2, 3], kind=kind)
        for kind in ("epsilon", "v_prediction")
    }


@pytest.mark.parametrize(("name", "options"), [(n, LOW) for n in NAMES] + [("prss", OPTIMIZED)])
def test_samples_are_independent_repeatable_and_changed(name, options, network, plain):
    kind = "v_prediction" if name in ("wen", "jain") or options is OPTIMIZED else "epsilon"
    chosen = {name: options[name]} if name in options else {}
    settings = GuidanceSettings(name, **chosen)

    def made(rows):
        return draw(network, settings.for_text(text=Text()), rows, kind=kind)

    together = made([0, 1, 2, 3])
    assert torch.equal(made([0, 1, 2, 3]), together)
    for rows in ([0], [3], [2, 1]):
        assert torch.allclose(made(rows), together[rows], atol=1e-3)
    assert (together - plain[kind]).flatten(1).abs().amax(1).min() > 0.01


NEUTRAL = {
    "lower_guidance": baselines.LowerGuidanceOptions(100.0),
    "rt": baselines.Insertion(0),
    "rna": baselines.Insertion(0),
    "cwr": baselines.Insertion(0),
    "gni": baselines.EmbeddingNoiseOptions(0.0),
    "wen": baselines.PromptEmbeddingOptions(1e9),
    "ren": baselines.AttentionRescalingOptions(1.0, False),
    "jain": baselines.OppositeGuidanceOptions(transition_time=1.0),
    "prss": baselines.PromptReanchoringOptions(trigger=1e9),
    "sail": baselines.SharpnessAwareOptions(1e9),
}


@pytest.mark.parametrize("name", NAMES)
def test_without_strength_every_bit_is_that_of_plain_sampling(name, network, plain):
    mitigation = GuidanceSettings(name, **{name: NEUTRAL[name]}).for_text(text=Text())
    assert torch.equal(draw(network, mitigation, [0, 1, 2, 3]), plain["epsilon"])


def test_baselines_can_be_combined(network):
    both = Sequential(
        [
            GuidanceSettings("wen", wen=LOW["wen"]).for_text(),
            GuidanceSettings("ren").for_text(text=Text()),
        ]
    )
    one = GuidanceSettings("wen", wen=LOW["wen"]).for_text()
    assert not torch.allclose(draw(network, both, [0, 1]), draw(network, one, [0, 1]), atol=1e-3)
