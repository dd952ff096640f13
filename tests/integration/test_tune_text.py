"""`memfree tune` for a text-to-image model, against an index of embeddings."""

import json

import pytest
import torch
import yaml
from tiny_text import CAPTIONS, tiny_pipeline

from memfree.cli.entry import main, run
from memfree.commands.sample import predict
from memfree.guidance import EmbeddingSimilarity, GuidanceSettings, calibrate
from memfree.images import from_bytes, to_bytes
from memfree.models import load_model
from memfree.retrieval import ReferenceIndex, TimmFeatures
from memfree.retrieval.features.latents import LatentFeatures
from memfree.sampling import SampleFolder, SamplingModule
from memfree.sampling.checks import build_scheduler

pytestmark = pytest.mark.slow
SEED, STEPS, COUNT = 1_000_000, 4, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random model, and an index in which what it draws unguided are training images."""
    folder = tmp_path_factory.mktemp("text")
    tiny_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    model = load_model(folder / "model")
    unguided = SamplingModule(
        model, build_scheduler("ddim", model.scheduler), STEPS, SEED, (), 3.0, CAPTIONS
    )
    own = from_bytes(to_bytes(unguided.predict_step(torch.arange(COUNT)).images))
    generator = torch.Generator().manual_seed(1)
    images = torch.cat([own, torch.rand(20, 3, 8, 8, generator=generator) * 2 - 1])
    captions = [CAPTIONS[(i + 1) % 4] for i in range(24)]
    counts = torch.tensor([9] * COUNT + [1] * 20)
    index = ReferenceIndex.build(
        images,
        TimmFeatures("test_vit.r160_in1k"),
        captions=captions,
        counts=counts,
        groups=range(24),
    )
    held_out = torch.rand(500, 3, 8, 8, generator=generator) * 2 - 1
    calibrate(index, EmbeddingSimilarity(), held_out)
    index.save(folder / "index")
    vae = LatentFeatures(model.pipe.vae, folder / "model" / "vae")
    latents = ReferenceIndex.build(images, vae, captions=captions, counts=counts, groups=range(24))
    latents.save(folder / "latents")
    return folder


def arguments(folders, out, *more):
    return [
        f"--model={folders / 'model'}",
        f"--index={folders / 'index'}",
        f"--out={out}",
        f"--count={COUNT}",
        f"--prompts.file={folders / 'prompts.txt'}",
        *more,
    ]


SAMPLER = [f"--steps={STEPS}", "--scheduler=ddim", "--guidance_scale=3"]


def copies_of(index, images):
    level = GuidanceSettings().end_threshold(index)
    return float((EmbeddingSimilarity()(index, images).sigma > level).float().mean())


@pytest.mark.parametrize("mitigation", ["amg", "both"])
def test_tune_finds_strengths_for_a_text_model(folders, tmp_path, mitigation):
    out = tmp_path / "tune"
    options = [f"--mitigation={mitigation}", "--scales=[1,0.125]"]
    if mitigation == "both":
        options.append(f"--latents={folders / 'latents'}")
    main(["tune", *arguments(folders, out, *SAMPLER, *options)])
    trials = json.loads((out / "tune.json").read_text())
    assert trials[0]["copies"] == 1 and trials[0]["duplicated_share"] == 1
    assert [trial["scale"] for trial in trials] == sorted(trial["scale"] for trial in trials)
    assert all(trial["copies"] > 0 for trial in trials[:-1])
    assert trials[-1]["copies"] == 0 and trials[-1]["active"] > 0
    chosen = yaml.safe_load((out / "guidance.yaml").read_text())
    assert chosen["mitigation"]["c3"] == trials[-1]["scale"] * GuidanceSettings().c3

    # Sampling with them, from the same noise and prompts and without the last correction, copies
    # nothing either.
    more = [f"--seed={SEED}", f"--config={out / 'guidance.yaml'}"]
    more += ["--mitigation.final_correction=false", *options[2:]]
    run(predict, arguments(folders, tmp_path / "samples", *more))
    samples = SampleFolder(tmp_path / "samples")
    assert samples.manifest["guidance"]["mitigation"] == mitigation
    index = ReferenceIndex.load(folders / "index")
    assert copies_of(index, samples.images()) == 0
    plain = arguments(folders, tmp_path / "plain", *SAMPLER, f"--seed={SEED}")
    run(predict, plain)
    assert copies_of(index, SampleFolder(tmp_path / "plain").images()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts.file=null"], "needs either --prompts.file"),
        (["--mitigation=both"], "needs --latents"),
    ],
)
def test_tune_refuses_text_models_without_prompts_or_latents(
    folders, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit) as caught:
        main(["tune", *arguments(folders, tmp_path / "t", *options)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error.splitlines()[-1]
    assert not (tmp_path / "t").exists()
