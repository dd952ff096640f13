"""An index without names."""

import hashlib
import hmac
import json
import stat

import pyarrow.parquet as pq
import pytest
import torch
from changed_indexes import Averages, a_batch, images_of

from memfree.retrieval import ReferenceIndex
from memfree.retrieval.index_folder import hashed_key, read_salt

SALT = "sixteen characters and more"


def test_a_hashed_index_names_nothing(tmp_path):
    batch = a_batch()
    index = ReferenceIndex.build(**batch, features=Averages(), num_classes=3)
    index.items.shards = ["train-000.tar"] * len(index)
    index.calibrations["cosine"] = {"kept": True}
    hidden = index.hashed(SALT)
    assert torch.equal(hidden.vectors, index.vectors)
    assert torch.equal(hidden.group, index.group)
    assert torch.equal(hidden.label_counts, index.label_counts)
    assert hidden.calibrations == index.calibrations
    assert hidden.captions is None
    hidden.save(tmp_path / "hidden")
    for path in (tmp_path / "hidden").iterdir():
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = json.dumps(pq.read_table(path).to_pylist()).encode()
        secrets = [b"key 1", b"caption", b"train-000", SALT.encode()]
        secrets.append((index.items.contents[0] or "").encode())
        assert not any(secret in content.replace(b'"caption"', b"") for secret in secrets), path
    queries = images_of(4, 5)
    assert torch.equal(hidden.search(queries, 2).rows, index.search(queries, 2).rows)
    # The owner finds out what was hit.
    expected = hmac.new(SALT.encode(), b"key 4", hashlib.sha256).hexdigest()
    assert hidden.keys[4] == hashed_key("key 4", SALT) == expected
    assert index.hashed(SALT + "!").keys[4] != expected
    asked = index.hashed(SALT, keep_captions=True, keep_shards=True)
    assert asked.captions == index.captions
    assert asked.items.shards == index.items.shards
    with pytest.raises(ValueError, match="keys are hashed"):
        hidden.add(images_of(1, 3), labels=torch.tensor([0]))
    assert hidden.remove([expected]).keys == hidden.keys[:4] + hidden.keys[5:]


def test_hashing_does_not_hide_what_shows(tmp_path):
    with pytest.raises(ValueError, match="pixels features shows its images"):
        ReferenceIndex.build(images_of(3)).hashed(SALT)
    with pytest.raises(ValueError, match="5 characters"):
        ReferenceIndex.build(images_of(3), Averages()).hashed("short")
    salt = read_salt(tmp_path / "new" / "salt")
    assert len(salt) == 64 and read_salt(tmp_path / "new" / "salt") == salt
    assert stat.S_IMODE((tmp_path / "new" / "salt").stat().st_mode) == 0o600
