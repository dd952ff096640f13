"""sample.py on a tiny untrained model: what it writes, and what it refuses."""

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderTiny, DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny_sampling import DATASET, SCRIPT, SHAPE, make_folders, options
from tiny_text import CAPTIONS, tiny_pipeline

from memfree.cli.entry import run
from memfree.commands.sample import predict
from memfree.guidance import NormalizedL2, calibrate
from memfree.models import export_model
from memfree.retrieval import ReferenceIndex
from memfree.sampling import SampleFolder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def unguided(folders):
    """One uninterrupted process."""
    out = folders / "unguided"
    run(predict, options(folders, out))
    return SampleFolder(out)


def test_a_finished_folder(folders, unguided, capsys):
    assert unguided.images().shape == (7, *SHAPE)
    assert unguided.conditions.tolist() == [0, 1, 2, 0, 1, 2, 0]
    manifest = unguided.manifest
    assert manifest["mitigation"] == "none"
    assert (manifest["seed"], manifest["count"], manifest["steps"]) == (0, 7, 4)
    assert (manifest["scheduler"], manifest["guidance_scale"]) == ("ddim", 2)
    assert manifest["dataset_hash"] == manifest["index_dataset_hash"] == DATASET
    assert manifest["seconds_per_sample"] == pytest.approx(manifest["seconds"] / 7)
    assert manifest["peak_memory_bytes"] > 50e6
    assert manifest["trace_summary"]["active_samples"] == 0
    trace = unguided.trace()
    assert trace.num_rows == 7 * 4
    assert trace["sigma"].null_count == 0
    assert not any(trace["active"].to_pylist())
    peak = max(trace["sigma"].to_pylist()[:4])
    assert unguided.records["peak_sigma"][0].as_py() == pytest.approx(peak)

    def times():
        return {path: path.stat().st_mtime_ns for path in unguided.path.iterdir()}

    before = times()
    run(predict, options(folders, unguided.path, batch_size=2))
    assert "is finished: 7 samples" in capsys.readouterr().out
    assert times() == before


def test_a_finished_folder_is_known_by_old_names_of_options(folders, unguided, capsys):
    old = {"guidance.mitigation": "none", "guidance.c1": 5, "guidance.wen.target": 3}
    run(predict, options(folders, unguided.path, **old))
    told = capsys.readouterr()
    assert "is finished: 7 samples" in told.out
    assert len(told.err.splitlines()) == 1 and "is now --mitigation" in told.err


def test_a_mitigation_of_the_users_runs_where_its_code_is_allowed(folders, monkeypatch, capsys):
    (folders / "their_rule.py").write_text(
        "from memfree.guidance import Mitigation\n"
        "class Rule(Mitigation):\n"
        "    def accept(self, images):\n"
        "        print('judged', len(images))\n"
        "        return super().accept(images)\n"
    )
    monkeypatch.syspath_prepend(str(folders))
    given = {"mitigation": "their_rule.Rule", "count": 2, "steps": 2}
    for index in ("index", None):
        out = folders / f"own-{index}"
        more = {} if index else {"index": None}
        with pytest.raises(SystemExit):
            run(predict, options(folders, out, **given, **more))
        assert "--allow_code true" in capsys.readouterr().err and not out.exists()
        run(predict, options(folders, out, **given, **more, allow_code=True))
        assert "judged" in capsys.readouterr().out
        assert SampleFolder(out).manifest["mitigation"] == "their_rule.Rule"
        assert (SampleFolder(out).manifest["trace_summary"] is None) == (index is None)


def test_the_saved_configuration_replays(folders, unguided):
    config = unguided.path / "config.yaml"
    run(predict, [f"--config={config}", f"--out={folders / 'replay'}"])
    assert torch.equal(SampleFolder(folders / "replay").images(), unguided.images())


def test_one_class(folders):
    run(predict, options(folders, folders / "one", index=None, classes=1, count=2, steps=2))
    assert SampleFolder(folders / "one").conditions.tolist() == [1, 1]


def test_classes_and_no_index(folders):
    out = folders / "classes"
    run(predict, options(folders, out, index=None, classes="[2,0]", count=3, steps=2))
    samples = SampleFolder(out)
    assert samples.conditions.tolist() == [2, 0, 2]
    assert samples.records["nearest"].to_pylist() == [None] * 3
    assert samples.manifest["trace_summary"] is None


def test_unconditional(folders):
    out = folders / "plain"
    changes = {"model": folders / "unconditional", "guidance_scale": None, "count": 2, "steps": 2}
    run(predict, options(folders, out, **changes))
    assert SampleFolder(out).conditions is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "no model folder at nowhere"),
        ({"index": "nowhere"}, "no index folder at nowhere"),
        ({"index": None, "mitigation": "amg"}, "--mitigation amg needs --index"),
        ({"index": "other_index"}, "different dataset than the model"),
        ({"index": "small_index"}, "the model makes (1, 8, 8)"),
        ({"index": "uncalibrated"}, "calibrat"),
        ({"classes": "[3]"}, "0 to 2"),
        ({"classes": "3"}, "--classes 3 is not a class of this model: 0 to 2"),
        ({"classes": "cat"}, "--classes: "),
        ({"trainer.devices": 0}, "--trainer.devices 0: Trainer(devices=0) value is not"),
        ({"trainer.strategy": "dpp"}, "--trainer.strategy dpp: You selected an invalid"),
        pytest.param(
            {"trainer.accelerator": "gpu"},
            "error: --trainer.accelerator gpu: No supported gpu backend found!",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"classes": "[]"}, "--classes is empty"),
        ({"steps": 1001}, "--steps 1001"),
        ({"count": 0}, "count"),
        ({"scheduler": "dream"}, "scheduler"),
        ({"model": "unconditional"}, "--guidance_scale 2"),
        ({"model": "unconditional", "guidance_scale": 1, "classes": "[1]"}, "--classes needs"),
        ({"nonsense": 1}, "--nonsense"),
        ({"decoder": "nowhere"}, "--decoder is for text-to-image models"),
        ({"decoder": "nowhere", "index": None}, "--decoder needs --index"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, capsys, changes, message):
    named = {
        name: folders / value
        if name in ("model", "index") and value and (folders / value).exists()
        else value
        for name, value in changes.items()
    }
    with pytest.raises(SystemExit) as exit_:
        run(predict, options(folders, tmp_path / "out", **named))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_data_set_can_be_allowed(folders):
    changes = {"index": folders / "other_index", "allow_other_dataset": "true", "count": 1}
    run(predict, options(folders, folders / "allowed", **changes))
    assert SampleFolder(folders / "allowed").manifest["index_dataset_hash"] == "e" * 64


def test_a_full_disk_is_noticed_before_anything_is_drawn(folders, tmp_path, capsys, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(SystemExit):
        run(predict, options(folders, tmp_path / "out"))
    assert "is free; choose another --out" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/samples-*"))


def test_not_a_number_is_one_line(folders, tmp_path, capsys):
    network = UNet2DModel.from_pretrained(folders / "unconditional" / "diffusers" / "unet")
    with torch.no_grad():
        network.conv_out.bias.fill_(float("nan"))
    fields = {"num_classes": None, "image_shape": SHAPE, "dataset_hash": DATASET}
    export_model(tmp_path / "model", DDPMPipeline(network, DDPMScheduler()), seed=0, **fields)
    changes = {"model": tmp_path / "model", "guidance_scale": None, "index": None}
    with pytest.raises(SystemExit) as exit_:
        run(predict, options(folders, tmp_path / "out", **changes))
    assert exit_.value.code == 2
    assert "NaN" in capsys.readouterr().err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        run(predict, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "sample i depends on (seed, i)" in text
    assert "--mitigation" in text
    assert "--trainer.strategy" in text
    assert "one label, as 3, or several that are taken in turn, as [0,1]" in text


@pytest.mark.parametrize(
    "config", sorted((SCRIPT.parent / "configs").glob("sample*.yaml")), ids=lambda path: path.stem
)
def test_every_configuration_parses(config, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(predict, [f"--config={config}", "--model=m", "--out=o", "--print_config"])
    assert exit_.value.code == 0
    assert "name: none" in capsys.readouterr().out


def test_a_small_decoder_is_part_of_the_run(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for number in (1, 2):
        torch.manual_seed(number)
        AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(tmp_path / f"decoder{number}")
    (tmp_path / "prompts.txt").write_text("red apple\n")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(560, 3, 8, 8, generator=generator) * 2 - 1
    index = ReferenceIndex.build(images[:60], captions=[CAPTIONS[0]] * 60)
    calibrate(index, NormalizedL2(), images[60:])
    index.save(tmp_path / "index")

    def sampled(out, decoder):
        arguments = {
            "model": tmp_path / "model",
            "index": tmp_path / "index",
            "out": tmp_path / out,
            "decoder": decoder and tmp_path / decoder,
            "count": 3,
            "steps": 4,
            "scheduler": "ddim",
            "guidance_scale": 3,
            "prompts.file": tmp_path / "prompts.txt",
            "trainer.accelerator": "cpu",
        }
        run(predict, [f"--{name}={value}" for name, value in arguments.items() if value])
        trace = pq.read_table(next((tmp_path / out).glob("trace-*.parquet")))
        return SampleFolder(tmp_path / out), trace["sigma"].to_numpy()

    plain, sigma = sampled("plain", None)
    small, approximate = sampled("small", "decoder1")
    assert plain.manifest["settings"]["decoder_sha256"] is None
    assert len(small.manifest["settings"]["decoder_sha256"]) == 64
    same = sigma == approximate
    assert same.sum() == 3 and len(same) == 12  # the last step of each sample
    with pytest.raises(SystemExit):
        sampled("small", "decoder2")
    assert "made with another decoder" in capsys.readouterr().err
