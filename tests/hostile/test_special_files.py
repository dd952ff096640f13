"""FIFOs, devices and circles of links in place of files: refused at once, wherever one is read."""

import os
import shutil
import signal
from contextlib import contextmanager

import pytest
from hostile_guard import one_line
from test_fuzz import read_checkpoint
from test_hostile_folders import READERS as FOLDERS

from memfree.commands.audit import measure
from memfree.data.prompts import read_prompts
from memfree.evaluation.agreement import ClipScorer
from memfree.folders.manifest import sha256
from memfree.folders.untrusted import check_plain_folder, read_json, read_table
from memfree.models import load_model
from memfree.models.text_pipeline import load_pipeline
from memfree.retrieval import (
    CLIPFeatures,
    LatentFeatures,
    ReferenceIndex,
    SSCDFeatures,
    TimmFeatures,
)
from memfree.retrieval.index_folder import read_salt
from memfree.training.checkpoints import verify_checkpoint


@pytest.mark.parametrize("read", [sha256, read_json])
def test_what_the_disk_does_not_give_is_named(tmp_path, read):
    (tmp_path / "x").symlink_to("/proc/self/mem")  # whose reading fails, as that of a bad sector
    with pytest.raises(OSError, match=f"{tmp_path / 'x'} cannot be read: Input"):
        read(tmp_path / "x")


@contextmanager
def at_once(seconds=20):
    """Fails where something inside waits, which a reader of a FIFO would do for ever."""

    def late(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused_at_once(read, path):
    with at_once(), pytest.raises((ValueError, OSError)) as caught:
        read()
    assert path.name in one_line(caught.value)


MODELS = {
    "model": [load_model],
    "pipe": [load_pipeline, load_model, LatentFeatures.from_folder],
}
READ = {
    "pipe": {"config.json", "model_index.json", "diffusion_pytorch_model.safetensors"}
    | {"model.safetensors", "tokenizer_config.json", "scheduler_config.json"},
    "model": {"config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"}
    | {"manifest.json"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_fifos_in_a_model_folder(copy, kind):
    folder = copy(kind)
    for path in sorted(folder.rglob("*")):
        if path.name not in READ[kind]:
            continue
        kept = path.rename(path.with_name("kept"))
        os.mkfifo(path)
        for read in MODELS[kind]:
            if read == LatentFeatures.from_folder and path.parent.name != "vae":
                continue
            with at_once(), pytest.raises((ValueError, OSError)) as caught:
                read(folder)
            assert str(folder) in one_line(caught.value)
        path.unlink()
        kept.rename(path)


@pytest.mark.parametrize("kind", [*FOLDERS, "checkpoints"])
def test_fifos_in_a_folder(copy, kind):
    folder = copy(kind)
    read = {**FOLDERS, "checkpoints": read_checkpoint}[kind]
    for path in sorted(folder.iterdir()):
        kept = path.rename(folder.parent / "kept")
        os.mkfifo(path)
        try:
            with at_once():
                read(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in one_line(error)
        path.unlink()
        kept.rename(path)


FILES = {
    "salt": read_salt,
    "prompts": read_prompts,
    "json": read_json,
    "table": read_table,
    "hash": sha256,
    "checkpoint": verify_checkpoint,
    "sscd": SSCDFeatures,
    "clip": lambda path: CLIPFeatures("RN50", path=path),
    "timm": lambda path: TimmFeatures("test_vit.r160_in1k", path=path),
}


@pytest.mark.parametrize("kind", ["fifo", "device", "circle", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(tmp_path, name, kind):
    path = tmp_path / "a.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    refused_at_once(lambda: FILES[name](path), path)


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors", "x.txt"])
def test_fifos_in_a_clip_folder(tmp_path, name):
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for read in (ClipScorer, lambda folder: CLIPFeatures(path=folder)):
        refused_at_once(lambda read=read: read(tmp_path), tmp_path)


def test_folders_in_a_circle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "file").write_text("x")
    check_plain_folder(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe")
    refused_at_once(lambda: check_plain_folder(tmp_path), tmp_path / "a" / "pipe")


def test_an_audit_of_a_fifo(whole, tmp_path):
    index = ReferenceIndex.load(whole / "index")
    for name in ("a.png", "a.tar", "a"):
        os.mkfifo(tmp_path / name)
        refused_at_once(lambda name=name: measure(index, tmp_path / name, 0.05), tmp_path / name)
    shutil.rmtree(tmp_path)


def test_a_link_to_nothing_is_no_file(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    check_plain_folder(tmp_path)
