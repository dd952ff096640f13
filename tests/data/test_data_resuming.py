"""Which stopped epochs go on, and with which batches."""

import pytest

from memfree.data.batches import batches_per_epoch, global_slice
from memfree.data.datamodule import check_resumable, epoch_order


def order(records, ranks, size, workers=None):
    return epoch_order(batches_per_epoch(records, size, ranks), ranks * size, ranks, workers)


def progress(trained):
    return {"ready": trained, "started": trained, "processed": trained, "completed": trained - 1}


def test_the_same_product_is_not_always_the_same_epoch():
    """No rank may be left without a record, so 101 records are 12 batches on eight ranks."""
    eight, one = order(101, 8, 1), order(101, 1, 8)
    assert (eight["batches"], one["batches"]) == (12, 13)
    assert eight["global_batch_size"] == one["global_batch_size"]
    seen = [global_slice(101, 12, 6)[1], global_slice(101, 13, 7)[0]]
    assert seen[0] > seen[1], "records would come twice"
    with pytest.raises(ValueError, match="epoch of 12 batches of at most 8 records, now .* 13 bat"):
        check_resumable(progress(7), eight, one)


@pytest.mark.parametrize("trained", [1, 2, 11])
def test_the_same_batches_go_on_where_they_were(trained):
    counts = progress(trained)
    check_resumable(counts, order(88, 2, 4), order(88, 1, 8))
    assert counts == progress(trained)
    with pytest.raises(ValueError, match="--data.batch_size and --trainer.devices") as refused:
        check_resumable(counts, order(96, 2, 4), order(96, 1, 7))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2), (1, 3)])
def test_other_readers_of_foreign_shards(ranks, workers):
    stopped = order(24, 2, 4, 1)
    now = order(24, ranks, 8 // ranks, workers)
    with pytest.raises(
        ValueError, match="2 ranks with 1 worker each read, now .* would"
    ) as refused:
        check_resumable(progress(1), stopped, now)
    assert "--data.num_workers" in str(refused.value) and "\n" not in str(refused.value)
    check_resumable(progress(3), stopped, now)
    check_resumable(progress(1), stopped, order(24, 2, 4, 0))  # without a worker it reads itself


def test_at_the_end_of_an_epoch_anything_goes_on():
    """Lightning's counts become those of an epoch of the new length at its end."""
    counts = progress(12)
    check_resumable(counts, order(101, 8, 1), order(101, 1, 4))
    assert counts == progress(26)
