"""Checkpoint files: written whole, verified when read, the one before used if the newest is not."""

import pytest
import torch

from memfree.folders.atomic import sync
from memfree.models.module import CHECKPOINT_KEY
from memfree.training.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    good_checkpoint,
    keep_only,
    latest_checkpoint,
    verify_checkpoint,
)
from memfree.training.claim import CHECKPOINTS, Claim, begin, claim

IDENTITY = {"seed": 0}


def claimed(folder, identity=IDENTITY, overwrite=False):
    return claim(folder.parent, identity, 4, 10, -1, overwrite)


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, as a run leaves them that is killed between saving and removing."""
    made = tmp_path / "model" / CHECKPOINTS
    for step in (2, 4):
        content = {"weight": torch.full((1000,), float(step)), CHECKPOINT_KEY: IDENTITY}
        AtomicCheckpointIO().save_checkpoint(content, made / f"step-{step:08d}.ckpt")
    return made


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path, position):
    path.write_bytes(path.read_bytes()[:position])


def test_a_checkpoint_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """Folders made for it, file, rename, folder: in this order, and nothing else is left."""
    seen = []
    monkeypatch.setattr(
        "memfree.folders.atomic.sync", lambda path: seen.append(path.name) or sync(path)
    )
    path = tmp_path / "b" / "c" / "step-00000001.ckpt"
    replace = __import__("os").replace
    monkeypatch.setattr(
        "memfree.folders.atomic.os.replace",
        lambda *names: seen.append("rename") or replace(*names),
    )
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)
    assert seen[:2] == [tmp_path.name, "b"]
    assert seen[2].startswith(".step-00000001.ckpt.") and seen[3:] == ["rename", "c"]
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))


def directory(path, offset, value):
    """Change a byte of the first entry of the archive's directory."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + offset] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, path.stat().st_size // 2),  # a bit of the weights
        lambda path: cut(path, path.stat().st_size // 2),
        lambda path: cut(path, path.stat().st_size - 1),
        lambda path: cut(path, 0),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: directory(path, 8, 1),
        lambda path: directory(path, 10, 8),
        lambda path: directory(path, 10, 12),
        lambda path: directory(path, 10, 14),
        lambda path: directory(path, 10, 99),
    ],
    ids=["bit", "half", "last byte", "empty", "zeros", "encrypted", "deflate", "bz2", "lzma", "99"],
)
def test_a_damaged_one_is_noticed(folder, capsys, damage):
    old, new = sorted(folder.iterdir())
    damage(new)
    with pytest.raises(ValueError, match=r"step-00000004\.ckpt is damaged"):
        verify_checkpoint(new)
    assert latest_checkpoint(folder) == new
    assert good_checkpoint(folder) == old
    found = claimed(folder)
    assert found == Claim("open", old)
    begin(folder.parent, found)
    printed = capsys.readouterr()
    assert f"{new} is damaged and not used" in printed.err
    assert f"resuming from {old}" in printed.out
    assert list(folder.iterdir()) == [old]
    damage(old)
    with pytest.raises(ValueError, match=r"step-00000002\.ckpt is damaged.*delete it") as refused:
        claimed(folder)
    assert "\n" not in str(refused.value)


def test_processes_that_start_together_begin_alike(folder, monkeypatch):
    """Whoever is first: no other process writes, and none resumes from what is overwritten."""
    old, new = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="--out .* seed is 0 there and 1 here"):
        claimed(folder, {"seed": 1})
    found = claimed(folder, {"seed": 1}, overwrite=True)
    monkeypatch.setenv("RANK", "1")
    assert claimed(folder, {"seed": 1}, overwrite=True) == found == Claim("other", None)
    assert claimed(folder) == Claim("open", new)
    begin(folder.parent, found)
    begin(folder.parent, claimed(folder))
    assert sorted(folder.iterdir()) == [old, new]
    monkeypatch.setenv("RANK", "0")
    begin(folder.parent, found)
    assert not folder.exists()


def test_the_newest_is_used_and_the_others_go(folder):
    old, new = sorted(folder.iterdir())
    assert good_checkpoint(folder) == new
    keep_only(new, folder)
    assert list(folder.iterdir()) == [new]
    assert good_checkpoint(folder / "nowhere") is None


def test_a_resumed_step_is_not_saved_again_while_gradients_add_up(
    make_module, make_trainer, data, tmp_path
):
    """That checkpoint would lie within a step, without the gradients that it has so far."""
    options = {"accumulate_grad_batches": 2, "plugins": [AtomicCheckpointIO()]}
    make_trainer([Checkpoints(tmp_path, 2)], max_steps=2, **options).fit(make_module(), data)
    path = latest_checkpoint(tmp_path)
    before = path.read_bytes()

    class Stop(Checkpoints):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            raise InterruptedError

    trainer = make_trainer([Stop(tmp_path, 2)], max_steps=4, **options)
    with pytest.raises(InterruptedError):
        trainer.fit(make_module(), data, ckpt_path=path, weights_only=True)
    assert path.read_bytes() == before
