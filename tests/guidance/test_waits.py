"""How often a step of guidance makes the host wait for an accelerator: eight times at most."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from amg_steps import make_images, prediction_near
from pretended_device import OnDevice, counted_waits, moved

from memfree.conditions import TextConditions
from memfree.guidance import ConstantThreshold, MultiplicityGuidance, NormalizedL2, SteadyAMG
from memfree.retrieval import ReferenceIndex
from memfree.sampling import sample
from memfree.sampling.loop import trace_rows

MOST = 8
CAPTIONS = [f"picture {i % 20}" for i in range(80)]


def encode(texts):
    vectors = [torch.Generator().manual_seed(int(text.split()[1])) for text in texts]
    return TextConditions(torch.stack([torch.randn(3, 6, generator=g) for g in vectors]))


def encode_there(texts):
    return TextConditions(moved(encode(texts).embeddings))


@pytest.fixture(params=["singles", "groups"])
def index(request):
    counts, groups = torch.ones(80, dtype=torch.int64), torch.arange(80)
    counts[:8] = 64
    if request.param == "groups":
        groups[40:50] = groups[30:40]
    labels = torch.arange(80) % 5
    return ReferenceIndex.build(
        make_images(), labels=labels, captions=CAPTIONS, counts=counts, groups=groups
    )


def step(text):
    _, plain = prediction_near(make_images(), [3, 12, -1, 25], distance=0.05)
    if not text:
        return plain

    def denoise(x_t, conditions):
        shift = (
            0.0
            if conditions is None
            else conditions.embeddings.mean(dim=(1, 2))[:, None, None, None]
        )
        return 0.3 * x_t + shift

    prompts = encode(["picture 3", "picture 5", "picture 7", "picture 9"])
    return replace(plain, conditions=prompts, denoise=denoise, encode=encode)


def there(plain):
    """The same step on the pretended device."""
    fields = ("x_t", "alpha_bar", "output", "output_cond", "output_uncond", "conditions")
    values = {name: getattr(plain, name) for name in fields}
    for name, value in values.items():
        text = isinstance(value, TextConditions)
        values[name] = TextConditions(moved(value.embeddings)) if text else moved(value)
    return replace(plain, **values, memory={}, encode=plain.encode and encode_there)


def move(index):
    index.vectors = moved(index.vectors)
    index._references = None
    for name in ("group", "multiplicity", "group_multiplicity", "labels"):
        setattr(index.items, name, moved(getattr(index.items, name)))
    index.items.label_records = tuple(moved(value) for value in index.items.label_records)


def guidances(index, threshold, latched, with_multiplicity):
    amg = SteadyAMG(
        index,
        NormalizedL2(k=5),
        ConstantThreshold(threshold),
        c1=0.1,
        c2=0.1,
        c3=10.0,
        max_displacement=1.0,
        margin_per_doubling=0.05,
        latched=latched,
        caption_bandwidth=0.3,
    )
    both = [MultiplicityGuidance(index, 1.5, caption_bandwidth=0.3, damped=True), amg]
    return both if with_multiplicity else [amg]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("latched", [False, True])
@pytest.mark.parametrize("with_multiplicity", [False, True])
@pytest.mark.parametrize(("threshold", "most"), [(-9.0, MOST), (0.5, 4)])
def test_a_step_waits_at_most_eight_times(
    index, text, latched, with_multiplicity, threshold, most, monkeypatch
):
    """And fewer times where nothing is near; with the numbers of the same step on the CPU."""
    settings = (threshold, latched, with_multiplicity)
    expected = step(text)
    for guidance in guidances(index, *settings):
        expected = guidance(expected)
    assert bool(expected.active.any()) == (threshold < 0)
    with counted_waits(monkeypatch) as waits:
        move(index)
        steps, memory = guidances(index, *settings), {}
        for number in range(2):  # the first step encodes captions and prepares the search
            waits.counts.clear()
            result = replace(there(step(text)), memory=memory, step=number)
            for guidance in steps:
                result = guidance(result)
            rows = trace_rows(result, number, 900.0)
        counts = dict(waits.counts)
    torch.testing.assert_close(result.output.held, expected.output, atol=1e-5, rtol=1e-5)
    assert sum(counts.values()) <= most, counts
    assert all(isinstance(column, OnDevice) for column in rows.values())


class Instant:
    """A scheduler that keeps its times and noise levels on the device, as diffusers' do."""

    init_noise_sigma = 1.0
    config = SimpleNamespace(prediction_type="epsilon", num_train_timesteps=1000)

    def __deepcopy__(self, memo):
        return Instant()

    def set_timesteps(self, steps, device):
        self.timesteps = moved(torch.linspace(900, 100, steps))
        self.alphas_cumprod = torch.linspace(0.99, 0.01, 1000)

    def scale_model_input(self, x_t, t):
        return x_t

    def step(self, output, t, x_t):
        return SimpleNamespace(prev_sample=x_t - 0.1 * output)


@pytest.mark.parametrize("trace", [False, True])
def test_the_loop_itself_waits_at_its_ends_alone(trace, monkeypatch):
    """Neither the time of a step, nor its noise level, nor its trace is copied at every step."""
    # What the scheduler's last step does is asked of it at the last two steps alone.
    asked = SimpleNamespace(is_last=lambda: False)
    monkeypatch.setattr("memfree.sampling.loop.LastStep", lambda *args, **kwargs: asked)
    monkeypatch.setattr("memfree.sampling.loop.last_step", lambda *args, **kwargs: {})
    totals = []
    with counted_waits(monkeypatch) as waits:
        for steps in (3, 9):
            waits.counts.clear()
            noise = moved(torch.randn(4, 1, 4, 4))
            sample(lambda x, t, y: 0.5 * x, Instant(), noise, steps, trace=trace)
            totals.append(waits.counts.total())
    assert totals[0] == totals[1], waits.counts
