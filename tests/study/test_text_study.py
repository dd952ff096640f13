"""The study of a text-to-image model: its commands, its tables and its ROC curves."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from memfree.cli import entry
from memfree.cli.stages import Stage
from memfree.commands.study import text_study
from memfree.evaluation.detectors import detector
from memfree.evaluation.metrics import Metric, write_metrics
from memfree.folders.atomic import write_json
from memfree.folders.manifest import read_manifest, write_manifest
from memfree.images import from_bytes
from memfree.study import text_results
from memfree.study.text_plan import TextPlan, Training
from memfree.study.text_results import PROMPTS, as_markdown, summarise

SUBJECTS = {"none": {"mitigation": "none", "wen_norm_steps": 1}, "amg": {"mitigation": "amg"}}
CONFIGS = Path(__file__).parents[2] / "configs" / "study"


def study(subjects=SUBJECTS, **changes):
    given = {"out": Path("runs/x"), "training": Training(plan_seed=3, seed=4), "noise_seed": 9}
    return TextPlan("trial", subjects=subjects, **{**given, **changes})


def test_everyone_draws_from_the_same_noise_and_prompts():
    for prompts, count in (("duplicated", 500), ("other", 200), ("unseen", 250)):
        stages = study().sampled(prompts)
        assert [stage.options["out"].name for stage in stages] == ["none", "amg", "oracle"]
        same = ("seed", "count", "steps", "prompts.captions", "index", "batch_size")
        assert len({tuple(stage.options[key] for key in same) for stage in stages}) == 1
        assert stages[0].options["count"] == count
        models = [str(stage.options["model"]) for stage in stages]
        assert models == ["runs/x/plan-3/model"] * 2 + ["runs/x/unique/model"]
    assert stages[1].options["mitigation"] == "amg"
    assert not [key for key in stages[2].options if key.startswith(("guidance.", "mitigation"))]


def test_a_subject_may_have_fewer_samples():
    few = study({"none": {}, "slow": {"mitigation": "sail", "at_most": 220}})
    counts = {prompts: few.sampled(prompts)[1].options["count"] for prompts in PROMPTS}
    assert counts == {"duplicated": 220, "other": 200, "unseen": 220}
    assert "mitigation.at_most" not in few.sampled("other")[1].options
    assert few.sampled("duplicated")[0].options["count"] == 500


def test_what_guides_and_judges_never_sees_which_images_are_repeated():
    for stage in study().shared():
        assert "plan-3" not in stage.line()


def test_every_judge_has_all_samples():
    pixels, embedding = study().judged("other")
    for stage in (pixels, embedding):
        named = {key for key in stage.options if key.startswith("samples.")}
        assert named == {"samples.none", "samples.amg", "samples.oracle"}
        assert stage.options["other_data"] == ["oracle"]
    assert "second_embedding" not in pixels.options
    assert embedding.options["second_embedding"] != "embedding"
    assert "other_data" not in study(oracle=False).judged("other")[0].options


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("emoji_*.yaml")), ids=lambda path: path.stem)
def test_every_subject_of_the_configurations_is_an_option_of_sampling(path):
    config = yaml.safe_load(path.read_text())
    study(config["subjects"]).check()


def test_studies_that_choose_settings_share_no_noise_and_no_repeats_with_those_reported():
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("emoji_*")}
    chosen, reported = configs.pop("emoji_settings"), list(configs.values())
    for one in reported:
        assert one["training"]["plan_seed"] != chosen["training"]["plan_seed"]
        assert one["training"]["seed"] != chosen["training"]["seed"]
        assert one["noise_seed"] != chosen["noise_seed"]


def test_dry_run_prints_and_does_nothing(tmp_path, capsys):
    text_study("trial", SUBJECTS, out=tmp_path / "out", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("python sample.py") for line in lines) == 9
    assert not (tmp_path / "out").exists()


def test_subjects_are_checked(tmp_path):
    with pytest.raises(ValueError, match="--subjects is empty"):
        text_study("trial", {}, out=tmp_path)
    with pytest.raises(ValueError, match="--subjects: oracle is the model without"):
        text_study("trial", {"oracle": {}}, out=tmp_path)
    with pytest.raises(ValueError, match=r"--subjects: use letters, digits, - and _ .*'kappa_2.5'"):
        text_study("trial", {"kappa_2.5": {}}, out=tmp_path)
    with pytest.raises(ValueError, match=r"--name: use letters, digits, - and _ .*'\.\./x'"):
        text_study("../x", SUBJECTS, out=tmp_path)
    with pytest.raises(ValueError, match="--prompt_sets is empty"):
        text_study("trial", SUBJECTS, out=tmp_path, prompt_sets=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mitigation": "wenn"},
            r"--mitigation: expected .* wenn, .* \(in: python sample.py ",
        ),
        ({"mitigation": "wen", "learning": 1}, "unknown option --mitigation.learning"),
        ({"at_most": 0}, "--subjects.wen.at_most must be a whole number above 0, not 0"),
        ({"at_most": "many"}, "at_most must be a whole number above 0, not 'many'"),
    ],
)
def test_options_of_subjects_are_checked_before_anything_runs(options, message, tmp_path):
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message) as caught:
            text_study("trial", {"none": {}, "wen": options}, tmp_path / "out", dry_run=dry_run)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_it_is_started_where_its_configuration_is(tmp_path, monkeypatch):
    assert (CONFIGS.parents[1] / study().trained()[-1].options["config"]).is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memfree.study.running.run_stages", lambda *_: pytest.fail("it began"))
    with pytest.raises(FileNotFoundError, match=r"no configs/emoji_scratch.yaml here: run memfree"):
        text_study("trial", SUBJECTS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("order", "reference"), [(["wen", "none"], "none"), (["amg", "wen"], "amg")]
)
def test_tables_name_whom_the_others_are_compared_with(order, reference):
    subjects = {one: {} for one in order}
    found = {
        ("other", one, "clip_margin_difference"): Metric("m", one, 0.0, None, None, 9)
        for one in order
    }
    assert f"| … less that of {reference} |" in as_markdown(found, order, [])
    assert study(subjects).judged("other")[0].options["reference"] == reference


def write_evaluations(plan, generator):
    """Finished evaluations of two subjects, and the traces of the unguided one."""
    truth, norms = [], []
    for number, prompts in enumerate(PROMPTS):
        copies = generator.random(40) < 0.5
        for folder, rate in zip(plan.evaluations(prompts), (0.25, 0.5), strict=True):
            folder.mkdir(parents=True)
            write_manifest(folder, "evaluation")
            write_metrics(
                folder / "metrics.json",
                [
                    Metric("copies", "none", 0.75, 0.6, 0.8, 40, {"conditions": 8}),
                    Metric("second_copies", "none", rate, rate - 0.1, rate + 0.1, 40),
                    Metric("copies", "amg", 0.0, 0.0, 0.01, 40),
                    Metric("frechet_pixels", "none", 2.0 + number, None, None, 40),
                ],
            )
            table = {
                "subject": ["none"] * 40 + ["amg"] * 40,
                "sample": [*range(40)][::-1] * 2,
                "second_copy": [*copies[::-1], *(~copies)],
                "caption": [f"{prompts} {sample % 8}" for sample in range(40)][::-1] * 2,
            }
            pq.write_table(pa.table(table), folder / "per_sample.parquet")
        norm = generator.random(40) + copies
        samples = plan.samples(prompts, "none")
        samples.mkdir(parents=True)
        order = generator.permutation(40)
        trace = {
            "sample": np.tile(order, 4),
            "step": np.repeat(np.arange(4), 40),
            "sigma": np.concatenate([generator.random(40) for _ in range(4)]),
            "wen_norm": np.tile(norm[order], 4),
        }
        pq.write_table(pa.table(trace), samples / "trace-000-000.parquet")
        truth.append(copies)
        norms.append(norm)
    return np.concatenate(truth), np.concatenate(norms)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study whose evaluations are finished, and draws no rows of samples."""
    monkeypatch.setattr(text_results, "write_pictures", lambda *_: None)
    plan = study(out=tmp_path / "[/o]", oracle=False)  # no markup
    return plan, *write_evaluations(plan, np.random.default_rng(0))


def test_a_prompt_set_of_one_caption_says_so(finished):
    plan, *_ = finished
    for folder in plan.evaluations("other"):
        write_metrics(folder / "metrics.json", [Metric("copies", "none", 0.7, 0.6, 0.8, 40)])
        table = pq.read_table(folder / "per_sample.parquet").drop_columns("caption")
        alone = table.append_column("caption", pa.array(["a cat"] * len(table)))
        pq.write_table(alone, folder / "per_sample.parquet")
    summarise(plan, Console())
    text = (plan.folder / "trial.md").read_text()
    assert text.count("One caption: 95 % intervals over its samples.") == 1
    assert "a caption of its own" not in text


def test_rows_show_the_first_samples_of_everyone(tmp_path, monkeypatch):
    """Each subject's uniform colour fills its row, however few samples it has."""

    class Folder:
        def __init__(self, path):
            self.value = float(path.name)

        def batches(self, size):
            assert size == 10
            yield torch.full((4, 3, 8, 8), self.value)

    monkeypatch.setattr(text_results, "SampleFolder", Folder)
    text_results.write_pictures(tmp_path / "rows.png", {"dark": Path("-1.0"), "grey": Path("0.0")})
    picture = np.asarray(Image.open(tmp_path / "rows.png").convert("L"), dtype=float)
    middle, right = picture.shape[0] // 2, picture[:, picture.shape[1] // 4]
    assert right[:middle].min() == 0
    assert 120 <= right[middle:].min() <= 135


def test_rows_show_the_very_pixels_that_were_judged(tmp_path, monkeypatch):
    """Drawn from numbers in [0, 1], a quarter of all grey levels came out one too dark."""
    levels = [200, 37, 101, 254]

    class Folder:
        def __init__(self, path):
            self.level = int(path.name)

        def batches(self, size):
            yield from_bytes(torch.full((4, 3, 8, 8), self.level, dtype=torch.uint8))

    monkeypatch.setattr(text_results, "SampleFolder", Folder)
    rows = {str(level): Path(str(level)) for level in levels}
    text_results.write_pictures(tmp_path / "rows.png", rows)
    picture = np.asarray(Image.open(tmp_path / "rows.png").convert("L"))
    assert set(levels) <= set(picture[:, picture.shape[1] // 4].tolist())


def test_results_are_gathered_from_both_judges(finished, capsys):
    plan, truth, norms = finished
    for prompts in PROMPTS:  # of a study of other noise on the same model, with fewer samples
        (plan.folder / "samples-1" / prompts / "none").mkdir(parents=True)
    summarise(plan, Console())
    manifest = read_manifest(plan.evaluation, "study")
    assert manifest["name"] == "trial" and manifest["subjects"] == SUBJECTS
    tmp_path = plan.folder
    rows = pa_csv.read_csv(tmp_path / "trial.csv").to_pylist()
    values = {(row["prompts"], row["subject"], row["metric"]): row["value"] for row in rows}
    assert values["other", "none", "copies"] == 0.75
    assert values["other", "none", "pixel_copies"] == 0.25
    assert values["other", "none", "embedding_copies"] == 0.5
    text = (tmp_path / "trial.md").read_text()
    assert "| none | 75.0 (60.0–80.0) | 25.0 (15.0–35.0) | 50.0 (40.0–60.0) | 3.00 |" in text
    assert "| amg | 0.0 (0.0–1.0) |  |  |  |" in text
    expected = roc_auc_score(truth, norms)
    assert f"| Wen's norm, step 1 | {expected:.3f} (" in text
    assert f"{truth.sum()} of 120 |" in text
    assert text.count("95 % intervals over captions") == 4
    captions = np.concatenate([8 * place + np.arange(40) % 8 for place in range(3)])
    auc = detector(norms, truth, clusters=captions).auc
    assert f"{expected:.3f} ({auc.low:.3f}–{auc.high:.3f}) |" in text
    assert (tmp_path / "trial.png").stat().st_size > 5000
    assert (tmp_path / "trial-detection.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "captions of the repeated images" in printed
    assert f"Written: {tmp_path / 'trial'}.parquet, .csv, .md, .png, -detection.png" in printed


def test_an_unfinished_prompt_set_is_left_out_and_none_is_refused(finished):
    plan, *_ = finished
    (plan.evaluations("unseen")[1] / "manifest.json").unlink()
    summarise(plan, Console())
    text = (plan.folder / "trial.md").read_text()
    assert "### Other" in text and "### Unseen" not in text
    for prompts in ("duplicated", "other"):
        (plan.evaluations(prompts)[0] / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no finished evaluation of the study trial"):
        summarise(plan, Console())


def test_parts_share_the_prompt_sets_and_what_they_have_in_common_is_made_once(
    tmp_path, monkeypatch, capsys
):
    ran, tabulated = [], []

    def pretend(stage):
        ran.append(stage.line())
        write_json(Path(stage.options["out"]) / "manifest.json", {"format": 1})

    monkeypatch.chdir(CONFIGS.parents[1])
    monkeypatch.setattr(Stage, "run", pretend)
    monkeypatch.setattr(text_results, "summarise", lambda plan, _: tabulated.append(plan.cells()))
    file = [str(CONFIGS / "emoji_baselines.yaml"), f"--out={tmp_path / 'out'}"]
    entry.main(["study", *file, "--part=1/2"])
    assert len(ran) == len(set(ran)), "no command of the first part ran twice"
    assert not tabulated and "1 cells of others are not" in capsys.readouterr().out
    entry.main(["text-study", *file, "--part=2/2"])
    assert tabulated == [["duplicated", "other", "unseen"]]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "memfree study PLAN.yaml" in error
    ran.clear()
    entry.main(["study", *file, "--dry_run=true"])
    assert "0 of them" not in capsys.readouterr().out
    entry.main(["study", *file])
    assert not ran and len(tabulated) == 2, "everything is finished"
