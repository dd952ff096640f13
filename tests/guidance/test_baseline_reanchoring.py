"""PRSS, its search and its re-anchoring, against the formula written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_text_model import SHAPE, TOKENS, WIDTH, prediction_of

from memfree.conditions import TextConditions
from memfree.guidance.baselines import PromptReanchoring, PromptReanchoringOptions
from memfree.guidance.baselines.prompt_reanchoring import reanchoring_scale


def test_reanchoring_scale_runs_from_one_at_l_to_s_at_thr():
    m = torch.tensor([3.0, 4.0, 5.0, 9.0])
    assert torch.allclose(reanchoring_scale(m, 3, 5, 7.5), torch.tensor([1, 4.25, 7.5, 7.5]))


class TextModel:
    """Prompts are numbers: "3" pulls by 3 in a fixed direction, from a prediction that x gives."""

    def __init__(self):
        direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
        self.direction = direction / direction.norm()
        self.encoded = 0

    def encode(self, prompts):
        """The first entry is the number; the others say how near prompts are."""
        self.encoded += len(prompts)
        made = torch.zeros(len(prompts), TOKENS, WIDTH)
        for row, prompt in enumerate(prompts):
            size, angle = (float(part) for part in prompt.split("@"))
            made[row, 0, 0] = size
            made[row, 1, 1], made[row, 1, 2] = 100 * np.cos(angle), 100 * np.sin(angle)
        return TextConditions(made)

    def denoise(self, x, conditions):
        size = 0 if conditions is None else conditions.embeddings[:, 0, 0].reshape(-1, 1, 1, 1)
        return 0.1 * x + size * self.direction


# Pull @ angle: the prompts differ by the angle. All are below l, thr or above on purpose.
USER = ["9@0.0", "0.5@0.1", "6@0.2", "8@1.0"]
CANDIDATES = ["7@0.05", "4.5@0.01", "0.7@0.3", "3.5@1.02", "6@1.01", "2@0.6", "9@0.0"]


def prss_in_numpy(x, model, user, candidates, options, s, tries):
    """One sample: search, then the formula, in float64."""
    direction, u = model.direction.double().numpy(), 0.1 * x.double().numpy()
    size, angle = (float(part) for part in user.split("@"))
    y = u + size * direction
    plain = u + s * (y - u)
    if size <= options.trigger:
        return plain, size
    others = [tuple(float(p) for p in one.split("@")) for one in candidates if one != user]
    near = sorted(others, key=lambda one: abs(one[1] - angle))[:tries]
    sizes = [size]
    for one, _ in near:
        sizes.append(one)
        if one <= options.trigger:
            break
    m = sizes[-1] if sizes[-1] <= options.trigger else min(sizes)
    mod = u + m * direction
    if m > options.target:
        c = (s * options.target - options.threshold) / (s - 1)
        s_pr = min((m - c) / (options.threshold - c) * s, s)
        return y + s_pr * (mod - y) + (s - s_pr) * (mod - u), m
    return u + s * (mod - u), m


def prss_prediction(model, users, x, s=7.5, step=0, memory=None, **fields):
    y = model.encode(users)
    return prediction_of(
        model.denoise(x, y),
        model.denoise(x, None),
        scale=s,
        x_t=x,
        conditions=y,
        denoise=model.denoise,
        encode=model.encode,
        step=step,
        memory={} if memory is None else memory,
        **fields,
    )


def noise(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tries", "kinds"),
    [(1, {"plain", "between", "full"}), (2, {"plain", "between"}), (3, {"plain"}), (25, {"plain"})],
)
def test_search_and_reanchoring_are_the_formula(tries, kinds):
    model = TextModel()
    options = PromptReanchoringOptions(candidates=tries, per_element=False)
    (guidance,) = PromptReanchoring(CANDIDATES, options).guidances()
    memory, seen = {}, set()
    for step in range(3):
        x = noise(4, step)
        made = guidance(prss_prediction(model, USER, x, step=step, memory=memory))
        for row, user in enumerate(USER):
            expected, m = prss_in_numpy(x[row], model, user, CANDIDATES, options, 7.5, tries)
            assert np.allclose(made.output[row].numpy(), expected, atol=2e-4)
            seen.add("plain" if m <= 3 else "full" if m >= 5 else "between")
        plain = prss_prediction(model, USER, x)
        assert torch.equal(made.output[1], plain.output[1])  # below the trigger
        assert made.active.tolist() == [True, False, True, True]
    assert seen == kinds


def test_reanchoring_is_rescaled_to_the_branch_of_the_other_prompt():
    model, x, amount = TextModel(), noise(4), 0.7
    options = PromptReanchoringOptions(candidates=1, per_element=False)
    (guidance,) = PromptReanchoring(CANDIDATES, options).guidances()
    made = guidance(prss_prediction(model, USER, x, guidance_rescale=amount))
    for row in (0, 2, 3):
        plain, m = prss_in_numpy(x[row], model, USER[row], CANDIDATES, options, 7.5, 1)
        other = 0.1 * x[row].double().numpy() + m * model.direction.double().numpy()
        expected = amount * plain * other.std(ddof=1) / plain.std(ddof=1) + (1 - amount) * plain
        assert np.allclose(made.output[row].numpy(), expected, atol=2e-4)
        assert not np.allclose(expected, plain, atol=0.1)


def test_samples_of_prss_are_independent():
    model, x = TextModel(), noise(4)
    (guidance,) = PromptReanchoring(CANDIDATES, PromptReanchoringOptions()).guidances()
    together = guidance(prss_prediction(model, USER, x))
    for row in range(4):
        alone = guidance(prss_prediction(model, USER[row : row + 1], x[row : row + 1]))
        assert torch.equal(alone.output[0], together.output[row])


def test_thresholds_of_prss_scale_with_the_size_of_the_latents():
    model, x = TextModel(), noise(4)
    factor = 1 / 8  # 4×8×8 against 4×64×64
    options = [
        PromptReanchoringOptions(),
        PromptReanchoringOptions("search", factor, 3 * factor, 5 * factor, per_element=False),
    ]
    made = [
        PromptReanchoring(CANDIDATES, one).guidances()[0](prss_prediction(model, USER, x)).output
        for one in options
    ]
    assert torch.equal(*made)


def test_an_optimised_prompt_serves_as_the_alternative():
    """The optimisation lowers the prompt's pull; the rest is the same formula."""
    model, x = TextModel(), noise(4)
    options = PromptReanchoringOptions("optimized", per_element=False)
    (guidance,) = PromptReanchoring((), options).guidances()
    memory = {}
    prediction = prss_prediction(model, ["2@0"] * 4, x, memory=memory)

    def tokens_without_the_first(given_x, conditions):
        # Wen leaves the first token alone; here the second one pulls.
        size = 0 if conditions is None else conditions.embeddings[:, 1, 1].reshape(-1, 1, 1, 1)
        return 0.1 * given_x + size / 50 * model.direction

    made = guidance(replace(prediction, denoise=tokens_without_the_first))
    (modified, triggered) = memory[guidance]
    assert bool(triggered.all())
    # AdamW's steps have the learning rate's length: 100 − 10·0.05 and a little decay.
    assert torch.allclose(modified.embeddings[:, 1, 1], torch.tensor(99.0), atol=0.6)
    assert bool((modified.embeddings[:, 1, 1] < 100).all())
    size = modified.embeddings[:, 1, 1].reshape(-1, 1, 1, 1) / 50
    expected = 0.1 * x + 7.5 * size * model.direction
    assert torch.allclose(made.output, expected, atol=1e-4)


def test_prss_with_nothing_triggered_is_plain_guidance():
    model, x = TextModel(), noise(4)
    for alternative in ("search", "optimized"):
        options = PromptReanchoringOptions(alternative, trigger=1e9)
        (guidance,) = PromptReanchoring(CANDIDATES, options).guidances()
        prediction = prss_prediction(model, USER, x)
        assert guidance(prediction).output is prediction.output


def test_bad_uses_are_refused_in_one_line():
    with pytest.raises(ValueError, match="target 5 must be below .*threshold 5"):
        PromptReanchoring(["a"], PromptReanchoringOptions(target=5))
    with pytest.raises(ValueError, match="alternative search chooses"):
        PromptReanchoring()
    model, x = TextModel(), noise(4)
    (prss,) = PromptReanchoring(CANDIDATES).guidances()
    with pytest.raises(ValueError, match="--guidance_scale above 1"):
        prss(prss_prediction(model, USER, x, s=0.5))
    with pytest.raises(ValueError, match="needs classifier-free guidance"):
        prss(prediction_of(x, x, output_uncond=None, time=0.9))
    with pytest.raises(ValueError, match="text encoder"):
        prss(replace(prss_prediction(model, USER, x), encode=None))
