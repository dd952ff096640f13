"""The options of every baseline: from the command line to the mitigation that they name."""

import inspect
import json
from dataclasses import asdict, fields, is_dataclass

import pytest
import torch
from tiny_text_model import generators, start_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from memfree.cli.entry import run
from memfree.guidance import (
    GuidanceSettings,
    Guided,
    NormalizedL2,
    Observer,
    RejectAndResample,
    Sequential,
    calibrate,
)
from memfree.guidance.amg_extensions import SteadyAMG
from memfree.guidance.baselines import (
    AttentionRescaling,
    EmbeddingNoise,
    EmbeddingNoiseOptions,
    Insertion,
    LowerGuidance,
    OppositeGuidance,
    PromptEmbeddingOptimization,
    PromptReanchoring,
    RandomNumbers,
    RandomTokens,
    RepeatedWords,
    SharpnessAwareInitialization,
    TextTools,
)
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.multiplicity import MultiplicityGuidance
from memfree.guidance.options import MITIGATIONS, TEXT_ONLY, WITH_INDEX
from memfree.models import LoadedModel
from memfree.retrieval import ReferenceIndex
from memfree.sampling.checks import refuse_text_only

CLASSES = {
    "lower_guidance": LowerGuidance,
    "rt": RandomTokens,
    "rna": RandomNumbers,
    "cwr": RepeatedWords,
    "gni": EmbeddingNoise,
    "wen": PromptEmbeddingOptimization,
    "ren": AttentionRescaling,
    "jain": OppositeGuidance,
    "prss": PromptReanchoring,
    "sail": SharpnessAwareInitialization,
}


@pytest.fixture(scope="module")
def text():
    vocabulary = {"<s>": 0, "</s>": 1, "cat": 2, "dog": 3, "red": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="red"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=6
    )
    return TextTools(fast, ["a cat", "a dog"])


@pytest.fixture(scope="module")
def index():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 4, 4, generator=generator) * 2 - 1
    index = ReferenceIndex.build(images)
    held_out = torch.rand(600, 1, 4, 4, generator=generator) * 2 - 1
    calibrate(index, NormalizedL2(), held_out, 0.01)
    return index


def take(guidance: GuidanceSettings = GuidanceSettings()) -> GuidanceSettings:  # noqa: B008
    """Take settings.

    Args:
        guidance: them.
    """
    return guidance


def text_of(value):
    return value if isinstance(value, str) else json.dumps(value)


def test_every_name_is_classified():
    names = set(MITIGATIONS)
    assert names == {"none", *WITH_INDEX, *TEXT_ONLY} and set(TEXT_ONLY) == set(CLASSES)
    assert CLASSES.keys() <= {one.name for one in fields(GuidanceSettings)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_of_a_baseline_is_taken_from_the_command_line(name, text):
    options = getattr(GuidanceSettings(), name)
    assert is_dataclass(options)
    for one in fields(options):
        default = getattr(options, one.name)
        if isinstance(default, bool):
            value = not default
        elif isinstance(default, str):
            value = {"static": "dynamic", "search": "optimized"}[default]
        else:
            value = default + 1 if isinstance(default, int) else default * 0.8
        settings = run(
            take,
            [f"--mitigation={name}", f"--mitigation.{one.name}={text_of(value)}"],
        )
        assert getattr(getattr(settings, name), one.name) == value
        made = settings.for_text(text=text)
        assert type(made) is CLASSES[name] and made.options == getattr(settings, name)


def test_help_documents_every_option(capsys):
    for name in CLASSES:
        with pytest.raises(SystemExit):
            run(take, [f"--mitigation={name}", "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        options = type(getattr(GuidanceSettings(), name))
        source = inspect.getsource(options)
        for one in fields(options):
            assert f"--mitigation.{one.name}" in shown
            assert f"{one.name}:" in source
        if name == "ren":
            assert "multiplies the logits of the begin-of-text token" in shown


def test_a_wrong_option_is_one_line(capsys):
    with pytest.raises(SystemExit):
        run(take, ["--mitigation=wen", "--mitigation.learning_rate=-1"])
    assert "learning_rate" in capsys.readouterr().err


def test_settings_are_written_as_json():
    assert json.loads(json.dumps(asdict(GuidanceSettings())))["wen"]["learning_rate"] == 0.05


@pytest.mark.parametrize("name", ["none", *WITH_INDEX, *CLASSES])
def test_an_index_adds_detection_to_every_mitigation(name, index, text):
    made = GuidanceSettings(name).for_text(index, text)
    guidances = made.guidances()
    last = SteadyAMG if name in ("amg", "both") else Observer
    assert type(guidances[-1]) is last
    assert (name in ("multiplicity", "both")) == isinstance(guidances[0], MultiplicityGuidance)
    parts = made.mitigations if isinstance(made, Sequential) else [made]
    assert any(type(part) is CLASSES.get(name, Guided) for part in parts)
    copies = index.vectors[:2].reshape(2, 1, 4, 4)
    assert made.accept(copies).tolist() == [name != "reject"] * 2


def test_without_an_index_the_plain_ones_run_alone_and_the_others_are_refused(text):
    assert GuidanceSettings().for_text().guidances() == []
    for name in WITH_INDEX:
        with pytest.raises(ValueError, match=f"--mitigation {name} needs --index"):
            GuidanceSettings(name).for_text(text=text)
    for name in ("rt", "ren", "prss"):
        with pytest.raises(ValueError, match=f"{name} needs the model's tokenizer"):
            GuidanceSettings(name).for_text()


def test_text_mitigations_are_refused_for_a_pixel_model():
    pixels = LoadedModel(torch.nn.Identity(), None, (1, 4, 4), num_classes=None, manifest={})
    for name in TEXT_ONLY:
        with pytest.raises(ValueError, match=f"{name} needs a text-to-image model"):
            refuse_text_only(GuidanceSettings(name), pixels)
    for name in ("none", *WITH_INDEX):
        refuse_text_only(GuidanceSettings(name), pixels)


def test_rejection_keeps_what_is_not_a_copy(index):
    generator = torch.Generator().manual_seed(9)
    training = index.vectors[:3].reshape(3, 1, 4, 4)
    fresh = torch.rand(3, 1, 4, 4, generator=generator) * 2 - 1
    made = GuidanceSettings("reject").for_text(index)
    assert made.accept(torch.cat([training, fresh])).tolist() == [False] * 3 + [True] * 3
    strict = RejectAndResample(index, NormalizedL2(), -torch.inf)
    assert not strict.accept(fresh).any()


def test_text_tools_know_the_vocabulary_and_lengths(text):
    assert text.words() == ["cat", "dog", "red"] and text.words() is text.words()
    assert text.count_tokens(["cat", "red dog", "", "a b c d e f"]) == [3, 4, 2, 6]


class Doubled(Mitigation):
    """Changes every stage, and notes when it is entered and left."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def prompts(self, prompts, generators):
        return [prompt + self.name for prompt in prompts]

    def initial_noise(self, start):
        return 2 * start.noise + len(self.name)

    def guidance_scale(self, guidance_scale):
        return guidance_scale + 1

    def around(self, network):
        from contextlib import contextmanager

        @contextmanager
        def entered():
            self.log.append(f"enter {self.name}")
            yield
            self.log.append(f"leave {self.name}")

        return entered()

    def guidances(self):
        return [self.name]

    def accept(self, images):
        return images[:, 0, 0, 0] > {"a": 0.2, "bb": 0.4}[self.name]


def test_a_sequence_passes_every_stage_on():
    log = []
    both = Sequential([Doubled("a", log), Doubled("bb", log)])
    start = start_of(None)
    assert both.prompts(["x"], generators(1)) == ["xabb"]
    assert torch.equal(both.initial_noise(start), 2 * (2 * start.noise + 1) + 2)
    assert both.guidance_scale(3) == 5 and both.guidances() == ["a", "bb"]
    with both.around(None):
        log.append("inside")
    assert log == ["enter a", "enter bb", "inside", "leave bb", "leave a"]
    images = torch.tensor([0.1, 0.3, 0.5]).reshape(3, 1, 1, 1)
    assert both.accept(images).tolist() == [False, False, True]
    noise = Sequential([EmbeddingNoise(EmbeddingNoiseOptions(1.0))] * 2)
    assert not torch.equal(noise.embedding(start).embeddings, start.conditions.embeddings)
    nothing = Sequential([])
    assert nothing.embedding(start) is start.conditions
    assert bool(nothing.accept(images).all())
    assert Sequential([RepeatedWords(Insertion(0))]).prompts(["x"], generators(1)) == ["x"]
