"""--mitigation NAME: options of the chosen mitigation, their old names, and code of the user's."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from memfree.cli.entry import run
from memfree.cli.stages import Stage
from memfree.commands.sample import predict
from memfree.commands.submit import submission_of
from memfree.guidance import MITIGATIONS, GuidanceSettings
from memfree.guidance.baselines import EmbeddingNoiseOptions, PromptEmbeddingOptions
from memfree.guidance.options import record_paths, sampling_options

OLD = Path(__file__).parents[1] / "golden/kept/samples/both/config.yaml"
WEN_5 = GuidanceSettings("wen", wen=PromptEmbeddingOptions(target=5))


def take(guidance: GuidanceSettings = GuidanceSettings()) -> GuidanceSettings:  # noqa: B008
    """Take settings.

    Args:
        guidance: them.
    """
    return guidance


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], GuidanceSettings()),
        (["--mitigation", "wen", "--mitigation.target", "5"], WEN_5),
        (["--mitigation.target=5", "--mitigation=wen"], WEN_5),
        (["--mitigation={name: wen, target: 5}"], WEN_5),
        (["--config={mitigation: wen, mitigation.target: 5}"], WEN_5),
        (["--config={mitigation: {name: wen, target: 5}}"], WEN_5),
        (["--config={mitigation: {name: wen, target: 4}}", "--mitigation.target=5"], WEN_5),
        (
            ["--config={mitigation: {name: gni, strength: 3}}", "--mitigation=multiplicity"],
            GuidanceSettings("multiplicity", gni=EmbeddingNoiseOptions(3.0)),
        ),
        (
            ["--config={mitigation: {name: amg, c3: 600, rate: 1}}", "--mitigation=both"],
            GuidanceSettings("both", c3=600.0, rate=1.0),
        ),
        (["--mitigation=reject", "--mitigation.budget=3"], GuidanceSettings("reject", budget=3)),
    ],
)
def test_options_of_the_chosen_mitigation_are_taken(words, settings, capsys):
    assert run(take, words) == settings
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "settings", "new"),
    [
        (["--guidance.mitigation=both"], GuidanceSettings("both"), "--mitigation"),
        (
            ["--guidance.mitigation", "amg", "--guidance.c1", "7"],
            GuidanceSettings("amg", c1=7.0),
            "--mitigation.c1",
        ),
        (["--guidance.mitigation=wen", "--guidance.wen.target=5"], WEN_5, "--mitigation.target"),
        (["--mitigation=wen", "--guidance.wen={target: 5}"], WEN_5, "--mitigation.target"),
        (["--guidance={mitigation: wen, wen.target: 5}"], WEN_5, "--mitigation.target"),
        (["--config={guidance: {mitigation: wen, wen: {target: 5}}}"], WEN_5, "--mitigation."),
        (["--config={guidance.mitigation: wen, guidance.wen.target: 5}"], WEN_5, "--mitigation."),
        # Of a mitigation that is not chosen: without effect, but a part of the samples' identity.
        (["--guidance.c1=7"], GuidanceSettings(c1=7.0), "--mitigation.c1 of --mitigation amg"),
    ],
)
def test_old_names_work_and_one_line_names_the_new(words, settings, new, capsys):
    assert run(take, words) == settings
    (line,) = capsys.readouterr().err.splitlines()
    assert new in line and "--guidance." in line


def test_a_saved_configuration_of_an_old_folder_still_works(tmp_path, capsys):
    record = yaml.safe_load(OLD.read_text())["guidance"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"guidance": record}))
    settings = run(take, [f"--config={tmp_path / 'old.yaml'}"])
    assert settings == GuidanceSettings("both", 0.95)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert asdict(settings) == {**asdict(GuidanceSettings()), **record}


@pytest.mark.parametrize("name", MITIGATIONS)
def test_what_is_printed_is_read_again_without_old_names(name, tmp_path, capsys):
    words = [
        f"--mitigation={name}",
        "--mitigation.cadence=3",
        "--config={guidance.sail.threshold: 3}",
    ]
    before = run(take, words)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(take, [*words, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["mitigation"].keys() == {"name", *record_paths(name)}
    assert ("guidance.sail.threshold" in printed) == (name != "sail")
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(printed))
    assert run(take, [f"--config={tmp_path / 'new.yaml'}"]) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mitigation=wenn"], ["--mitigation", "wenn", "wen"]),
        (["--mitigation=wen", "--mitigation.tagret=3"], ["--mitigation.tagret", "did you mean"]),
        (["--mitigation=wen", "--mitigation.c1=3"], ["--mitigation.c1", "amg, both"]),
        (["--config={mitigation: {name: wen, c1: 3}}"], ["--mitigation.c1", "amg, both"]),
        (["--mitigation=wen", "--mitigation.target=-3"], ["--mitigation.target", "-3"]),
        (["--config={mitigation: {name: wen, target: x}}"], ["mitigation.target", "x"]),
        (["--guidance.wen.tagret=3"], ["--guidance.wen.tagret"]),
        (["--mitigatoin=wen"], ["--mitigatoin, did you mean --mitigation?"]),
        (["--mitigation=own.Mine"], ["own.Mine", "--allow_code true"]),
        (["--guidance.mitigation=own.Mine"], ["own.Mine", "--allow_code true"]),
        (["--config={mitigation: own.Mine}"], ["own.Mine", "--allow_code true"]),
        (["--config={mitigation: own.Mine, allow_code: true}"], ["allow_code"]),
        (["--mitigation=own.Mine", "--allow_code=maybe"], ["--allow_code", "maybe"]),
        (["--mitigation=wen", "--mitigation="], ["--mitigation"]),
    ],
)
def test_wrong_options_are_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(take, words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in told), line


def test_code_is_taken_only_where_it_is_allowed():
    words = ["--mitigation=json.JSONDecoder", "--allow_code", "true", "--mitigation.rate=1"]
    assert run(take, words) == GuidanceSettings("json.JSONDecoder", rate=1.0)


def test_help_shows_common_options_and_a_line_for_each_mitigation(capsys):
    with pytest.raises(SystemExit) as exit_:
        run(predict, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit_.value.code == 0 and len(lines) <= 160
    for name, entry in MITIGATIONS.items():
        assert any(line.split()[:1] == [name] and entry.summary in line for line in lines)
    assert any("--mitigation.false_positive_rate" in line for line in lines)
    assert not any("--guidance." in line or "--mitigation.c1" in line for line in lines)


@pytest.mark.parametrize("name", MITIGATIONS)
def test_help_of_a_mitigation_shows_its_options_alone(name, capsys):
    with pytest.raises(SystemExit):
        run(predict, ["--mitigation", name, "--help"])
    shown = capsys.readouterr().out
    options = {word for word in shown.split() if word.startswith("--mitigation.")}
    assert options == {f"--mitigation.{option}" for option in record_paths(name)}
    assert "--count" not in shown


def test_subjects_of_plans_name_a_mitigation_and_its_options():
    assert sampling_options({"mitigation": "wen", "target": 3, "rate": 1}) == {
        "mitigation": "wen",
        "mitigation.target": 3,
        "mitigation.rate": 1,
    }
    old = sampling_options({"mitigation": "none", "wen.target": 3, "budget": 2})
    assert old == {"mitigation": "none", "guidance.wen.target": 3, "guidance.budget": 2}
    Stage("sample", {"model": "m", "out": "o", **old}).check()


def test_a_job_has_the_options_of_its_mitigation_but_no_code():
    words = ["--model=m", "--out=o", "--mitigation=wen", "--mitigation.target=5"]
    submission, _ = submission_of("sample", words)
    mitigation = yaml.safe_load(submission.configuration)["mitigation"]
    assert (mitigation["name"], mitigation["target"]) == ("wen", 5)
    with pytest.raises(ValueError, match="--allow_code"):
        submission_of("sample", [*words[:2], "--mitigation=own.Mine", "--allow_code=true"])
