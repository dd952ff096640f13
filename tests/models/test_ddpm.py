"""The loss, what it draws, and the learning rate, against independent computations."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from memfree.models import NoiseOptions
from memfree.models.module import adamw, warm_up


class Recorder(nn.Module):
    """A network that notes its arguments and answers with a fixed tensor."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.calls = []

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        self.calls.append((x_t, t, class_labels))
        return (self.answer,)


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 4, 4, generator=generator) * 2 - 1
    return {"image": images, "label": torch.arange(count) % 3}


def numpy_alphas(schedule, count):
    """ᾱ_t of the schedule, from its definition."""
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, count))
    f = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weight", [None, 0.5, torch.tensor([0.0, 1.0, 2.0, 0.5])])
def test_loss_equals_numpy(make_module, schedule, prediction_type, weight):
    noise = NoiseOptions(
        num_train_timesteps=50, beta_schedule=schedule, prediction_type=prediction_type
    )
    module = make_module(num_classes=None, noise=noise)
    answer = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    module.network = Recorder(answer)
    batch = batch_of(4)
    if weight is not None:
        batch["weight"] = weight
    loss = module.loss(batch, torch.Generator().manual_seed(5))

    ((x_t, t, labels),) = module.network.calls
    assert labels is None
    a = numpy_alphas(schedule, 50)[t.numpy()].reshape(-1, 1, 1, 1)
    x_0 = batch["image"].double().numpy()
    eps = (x_t.double().numpy() - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    # The noise that x_t was made of is standard normal and drawn first.
    drawn = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(5)).numpy()
    np.testing.assert_allclose(eps, drawn, atol=2e-4)
    target = eps if prediction_type == "epsilon" else np.sqrt(a) * eps - np.sqrt(1 - a) * x_0
    errors = ((answer.double().numpy() - target) ** 2).mean((1, 2, 3))
    weights = 1.0 if weight is None else np.asarray(weight)
    assert float(loss) == pytest.approx(float((weights * errors).mean()), rel=1e-4)


def test_noise_levels_cover_all_steps_evenly(make_module):
    module = make_module(num_classes=None)
    module.network = Recorder(torch.zeros(5000, 1, 4, 4))
    module.loss(batch_of(5000), torch.Generator().manual_seed(0))
    counts = torch.bincount(module.network.calls[0][1], minlength=50)
    # 100 expected each, standard deviation 10.
    assert int(counts.min()) > 50
    assert int(counts.max()) < 150
    assert len(counts) == 50


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_stated_rate(make_module, share):
    module = make_module(label_dropout=share)
    module.network = Recorder(torch.zeros(4000, 1, 4, 4))
    batch = batch_of(4000)
    module.loss(batch, torch.Generator().manual_seed(0))
    labels = module.network.calls[0][2]
    dropped = labels == 3
    assert float(dropped.float().mean()) == pytest.approx(share, abs=0.02)
    assert torch.equal(labels[~dropped], batch["label"][~dropped])
    assert batch["label"].max() == 2


def test_a_conditional_network_knows_the_null_label(make_module):
    assert make_module().network.config["num_class_embeds"] == 4
    assert make_module(num_classes=None).network.config["num_class_embeds"] is None


def test_weights_depend_on_the_seed_only(make_module):
    before = torch.random.get_rng_state()
    first, second, other = make_module(), make_module(), make_module(seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    values = [m.network.conv_in.weight for m in (first, second, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_learning_rate_warms_up_and_falls_along_a_cosine(
    make_module, make_trainer, data, monkeypatch
):
    rates = []
    module = make_module(warmup_steps=4, learning_rate=0.01)
    step = module.training_step

    def recorded(batch, batch_idx):
        rates.append(module.optimizers().param_groups[0]["lr"])
        return step(batch, batch_idx)

    monkeypatch.setattr(module, "training_step", recorded)
    make_trainer([], max_steps=10, enable_checkpointing=False).fit(module, datamodule=data)
    expected = [0.01 * (n + 1) / 4 for n in range(4)]
    expected += [0.005 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("warm", "total"), [(0, 7), (1, 1), (3, 40.0), (5, 2)])
def test_all_trainings_set_up_one_optimizer(warm, total):
    """The rates of a training that takes its own weight decays, to the last bit."""
    values = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    groups = [{"params": values[:1], "weight_decay": 0.3}, {"params": values[1:]}]
    found = adamw(groups, 0.002, warm_up(warm, total))
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert found["lr_scheduler"]["interval"] == "step"
    for step in range(10):
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))
        rate = 0.002 * ((step + 1) / warm if step < warm else share)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
        optimizer.step()
        schedule.step()


def test_a_conditional_model_needs_labels(make_module):
    with pytest.raises(ValueError, match=r"--model\.class_conditional needs labels"):
        make_module(num_classes=None, class_conditional=True)


def test_an_average_that_never_moves_is_refused(make_module):
    with pytest.raises(ValueError, match=r"--model\.ema_decay 1 would keep the initial weights"):
        make_module(ema_decay=1)
    make_module(ema_decay=0.9999)


def test_draws_differ_between_batches_epochs_ranks_and_seeds(make_module, monkeypatch):
    module = make_module()

    def draw(module, batch_idx):
        generator = module.step_generator(batch_idx)
        return float(torch.rand((), generator=generator))

    values = {draw(module, 0), draw(module, 1), draw(make_module(seed=1), 0)}
    monkeypatch.setattr(type(module), "global_rank", property(lambda self: 1))
    values.add(draw(module, 0))
    monkeypatch.setattr(type(module), "current_epoch", property(lambda self: 1))
    values.add(draw(module, 0))
    assert len(values) == 5
    assert draw(module, 0) in values
