"""Folders of models run no code and ask no network, whatever their files say."""

import json
import shutil
import socket
import sys

import open_clip
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from hostile_guard import one_line
from hostile_payloads import pickled
from open_clip.model import CLIP
from spoiling import edit
from transformers import CLIPConfig, CLIPImageProcessor

from memfree.evaluation.agreement import ClipScorer
from memfree.models.options import ScratchOptions
from memfree.models.text_pipeline import load_pipeline
from memfree.offline.stable_diffusion import train_tokenizer
from memfree.retrieval import CLIPFeatures, TimmFeatures
from memfree.retrieval.features.make import features_from

MODULE = """
import pathlib

pathlib.Path("canary").write_text("run")

from transformers import CLIPTextModel, CLIPTokenizer


class Tokenizer(CLIPTokenizer):
    pass


class Net(CLIPTextModel):
    pass
"""
CLIP_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 32, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Hosts that were looked up or connected to, while every attempt fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    hosts = []

    def refuse(*address, **_):
        hosts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return hosts


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory):
    """A tiny CLIP with open_clip's own tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG}))
    torch.manual_seed(0)
    weights = {name: value.contiguous() for name, value in CLIP(**CLIP_CONFIG).state_dict().items()}
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def clip(whole_clip, tmp_path):
    """A copy of it to be spoilt."""
    return shutil.copytree(whole_clip, tmp_path / "clip")


def check_refused(read, folder, hosts, tmp_path):
    """``read`` refuses the folder by name, without code and without network."""
    with pytest.raises((ValueError, OSError)) as caught:
        read()
    assert str(folder) in one_line(caught.value)
    assert hosts == []
    assert not (tmp_path / "canary").exists() and "evil" not in sys.modules


def set_option(*keys_and_value):
    return lambda folder: edit(folder / "open_clip_config.json", "model_cfg", *keys_and_value)


def remote_tokenizer(folder):
    """What ran code: the tokenizer's own options are handed on to transformers."""
    text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    _tokenizer_of_a_module(folder, text)


def local_tokenizer(folder):
    """The same without the permission."""
    _tokenizer_of_a_module(folder, {"hf_tokenizer_name": "x"})


def _tokenizer_of_a_module(folder, text):
    text = {**CLIP_CONFIG["text_cfg"], **text}
    set_option("text_cfg", text)(folder)
    train_tokenizer(["red"], ScratchOptions()).save_pretrained(folder)
    (folder / "evil.py").write_text(MODULE)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    path.write_text(json.dumps({**config, "tokenizer_class": "Tokenizer"}))


def tokenizer_named(**config):
    """A tokenizer of the folder whose configuration says this."""

    def spoil(folder):
        set_option("text_cfg", {**CLIP_CONFIG["text_cfg"], "hf_tokenizer_name": "x"})(folder)
        train_tokenizer(["red"], ScratchOptions()).save_pretrained(folder)
        for key, value in config.items():
            edit(folder / "tokenizer_config.json", key, value)

    return spoil


def text_option(key, value):
    return set_option("text_cfg", {**CLIP_CONFIG["text_cfg"], key: value})


def trunk(name):
    return set_option("vision_cfg", {"timm_model_name": name, "image_size": 32})


CLIPS = {
    "trust_remote_code": remote_tokenizer,
    "auto_map of a tokenizer": local_tokenizer,
    "tokenizer of another class": tokenizer_named(tokenizer_class="RagTokenizer"),
    "tokenizer of no class": tokenizer_named(tokenizer_class=None),
    "no tokenizer": text_option("hf_tokenizer_name", "bert-base-uncased"),
    "vocabulary elsewhere": tokenizer_named(vocab_file="/etc/hostname"),
    "vocabulary of SimpleTokenizer": text_option("tokenizer_kwargs", {"bpe_path": "/etc/hostname"}),
    "options that are a list": text_option("tokenizer_kwargs", [1]),
    "text tower of the hub": text_option("hf_model_name", "evil/bert"),
    "text tower of no slash": text_option("hf_model_name", "bert-base-uncased"),
    "trunk of the hub": trunk("hf-hub:evil/net"),
    "trunk of a folder": trunk("local-dir:/etc"),
    "trunk with a slash": trunk("evil/net"),
    "unknown trunk": trunk("evil"),
    "unknown option": text_option("hook", "evil.Net"),
    "unknown option of the model": set_option("hook", "evil.Net"),
    "decoder of the hub": set_option("multimodal_cfg", {"hf_model_name": "evil/bert"}),
    "width of gigabytes": text_option("width", 1 << 14),
    "layers without end": text_option("layers", 1 << 30),
    "no text": set_option("text_cfg", None),
    "a list": lambda folder: (folder / "open_clip_config.json").write_text("[1]"),
    "pickles that run": lambda folder: [
        (folder / "open_clip_model.safetensors").unlink(),
        (folder / "open_clip_pytorch_model.bin").write_bytes(pickled("canary")),
    ],
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_runs_and_downloads_nothing(clip, asked, tmp_path, name):
    CLIPS[name](clip)
    check_refused(lambda: ClipScorer(clip), clip, asked, tmp_path)


@pytest.mark.parametrize("name", ["text tower of the hub", "trunk of the hub", "pickles that run"])
def test_nor_as_features(clip, asked, tmp_path, name):
    CLIPS[name](clip)
    check_refused(lambda: CLIPFeatures(path=clip), clip, asked, tmp_path)
    with pytest.raises(ValueError, match="extractor.path"):
        CLIPFeatures(f"local-dir:{clip}", path=clip / "open_clip_config.json")


def test_a_clip_of_others_is_read_as_open_clip_reads_it(clip, asked):
    scorer = ClipScorer(clip)
    name = f"local-dir:{clip}"
    model, tokenizer = open_clip.create_model(name), open_clip.get_tokenizer(name)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_text(tokenizer(["a red bus"])), dim=1)
    assert scorer.texts(["a red bus"])[0] == pytest.approx(expected[0].numpy(), abs=1e-6)
    assert asked == []


def test_a_tokenizer_beside_the_weights_is_used(clip, asked):
    text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "canonicalize"}}
    set_option("text_cfg", {**CLIP_CONFIG["text_cfg"], **text})(clip)
    train_tokenizer(["a red bus"], ScratchOptions()).save_pretrained(clip)
    expected = open_clip.get_tokenizer(f"local-dir:{clip}")(["A red bus!"])
    assert (ClipScorer(clip)._tokenizer(["A red bus!"]) == expected).all()
    assert asked == []


def config(part, *keys_and_value):
    return lambda folder: edit(folder / part, *keys_and_value)


def module_beside(part, *keys_and_value):
    """A key that names a class of a module, which lies in the folder."""

    def spoil(folder):
        for place in (folder, folder / part.split("/")[0]):
            (place / "evil.py").write_text(MODULE)
        edit(folder / part, *keys_and_value)

    return spoil


def written(part, **value):
    def spoil(folder):
        (folder / part).parent.mkdir(exist_ok=True)
        (folder / part).write_text(json.dumps(value))

    return spoil


def of_a_backbone(folder):
    """A text encoder that asks the hub for its backbone while it is built."""
    edit(folder / "model_index.json", "text_encoder", ["transformers", "DetrForObjectDetection"])
    backbone = {"backbone": "microsoft/resnet-50", "use_timm_backbone": False}
    written("text_encoder/config.json", **backbone, use_pretrained_backbone=True)(folder)


CODE = {"AutoModel": "evil.Net", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
TEXT, TOKENIZER = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
PIPES = {
    "encoder with a backbone": of_a_backbone,
    "encoder of another class": config(
        "model_index.json", "text_encoder", ["transformers", "VisionEncoderDecoderModel"]
    ),
    "tokenizer of another class": config(
        "model_index.json", "tokenizer", ["transformers", "RagTokenizer"]
    ),
    "network of another class": config("model_index.json", "unet", ["diffusers", "AutoModel"]),
    "scheduler that is a network": config(
        "model_index.json", "scheduler", ["diffusers", "UNet2DModel"]
    ),
    "part of an unknown name": config("model_index.json", "evil", ["diffusers", "AutoencoderKL"]),
    "pipeline that connects others": config(
        "model_index.json", "_class_name", "KandinskyCombinedPipeline"
    ),
    "safety checker of another class": config(
        "model_index.json", "safety_checker", ["stable_diffusion", "os"]
    ),
    "attention of the hub": config(TEXT, "attn_implementation", "evil/attention"),
    "attention of the hub, hidden": config(TEXT, "_attn_implementation_internal", "flash_x"),
    "attention of the hub, inside": config(TEXT, "a", {"_attn_implementation": "evil/attention"}),
    "code of an encoder": module_beside(TEXT, "auto_map", CODE),
    "code of a tokenizer": module_beside(TOKENIZER, "auto_map", CODE),
    "code inside": module_beside(TEXT, "text_config", {"auto_map": CODE}),
    "tokenizer that names another": config(TOKENIZER, "tokenizer_class", "evil.Tokenizer"),
    "vocabulary elsewhere": config(TOKENIZER, "vocab_file", "/etc/hostname"),
    "repository in a configuration": config(TEXT, "backbone", "evil/net"),
    "weights elsewhere": config(TEXT, "transformers_weights", "../../model.safetensors"),
    "tokenizer nested deeply": lambda folder: (folder / TOKENIZER).write_text(
        '{"a":' * 900 + "1" + "}" * 900
    ),
    "adapters and their base model": written(
        "text_encoder/adapter_config.json", base_model_name_or_path="evil/net", peft_type="LORA"
    ),
    "adapters of a module": written(
        "unet/adapter_config.json",
        auto_mapping={"base_model_class": "Net", "parent_library": "evil"},
    ),
    "weights listed elsewhere": written(
        "unet/diffusion_pytorch_model.safetensors.index.json",
        weight_map={"conv_in.weight": "../../../model.safetensors"},
    ),
    "pickles listed": lambda folder: [
        written("text_encoder/pytorch_model.bin.index.json", weight_map={"a": "pytorch_model.bin"})(
            folder
        ),
        (folder / "text_encoder" / "model.safetensors").unlink(),
        (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickled("canary")),
    ],
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipeline_runs_and_downloads_nothing(copy, asked, tmp_path, name):
    folder = copy("pipe")
    PIPES[name](folder)
    check_refused(lambda: load_pipeline(folder), folder, asked, tmp_path)


def test_a_whole_pipeline_asks_no_network(copy, asked):
    folder = copy("pipe")
    load_pipeline(folder)
    edit(folder / TOKENIZER, "model_max_length", int(1e30))  # as transformers writes for no limit
    load_pipeline(folder)
    assert asked == []


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (TOKENIZER, "trust_remote_code", False),
        (TOKENIZER, "tokenizer_file", None),
        ("text_encoder/config.json", "use_kernels", False),
        ("unet/config.json", "trust_remote_code", False),
    ],
)
def test_keys_that_name_no_code_do_no_harm(copy, part, key, value):
    folder = copy("pipe")
    edit(folder / part, key, value)
    load_pipeline(folder)


def test_a_safety_checker_and_an_image_processor_are_loaded(copy, asked):
    folder = copy("pipe")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    options = CLIPConfig(vision_config=vision, projection_dim=8)
    StableDiffusionSafetyChecker(options).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / "model_index.json", "safety_checker", checker)
    edit(folder / "model_index.json", "feature_extractor", ["transformers", "CLIPImageProcessor"])
    pipe = load_pipeline(folder)
    assert pipe.safety_checker is not None and pipe.feature_extractor is not None
    assert asked == []
    edit(folder / "safety_checker" / "config.json", "auto_map", CODE)
    with pytest.raises(ValueError, match="safety_checker.*auto_map"):
        load_pipeline(folder)


def test_a_pipeline_from_the_hub_is_checked_before_it_is_built(copy, tmp_path, monkeypatch):
    folder = copy("pipe")
    module_beside(TOKENIZER, "auto_map", CODE)(folder)
    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name: index)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **_: folder)

    def built(*_, **__):
        raise AssertionError("it was built")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", built)
    with pytest.raises(ValueError, match="some/pipeline .*auto_map"):
        load_pipeline("some/pipeline")


HUB_NAMES = {
    "timm": {"name": "timm", "model": "hf-hub:evil/net", "pretrained": True},
    "timm's old prefix": {"name": "timm", "model": "hf_hub:evil/net", "pretrained": False},
    "open_clip": {"name": "clip", "model": "hf-hub:evil/net", "pretrained": "x"},
}


@pytest.mark.parametrize("name", HUB_NAMES)
def test_an_index_that_names_a_repository_downloads_nothing(asked, tmp_path, name):
    description = {"dtype": "float32", "path": None, "seed": 0, **HUB_NAMES[name]}
    check_refused(lambda: features_from(description, {}), "evil/net", asked, tmp_path)


def test_a_repository_that_the_user_names_is_asked_for(asked):
    """The instrument itself: the network is refused here, and the attempt is seen."""
    with pytest.raises((ValueError, OSError)):
        TimmFeatures("hf-hub:some/net")
    assert asked
