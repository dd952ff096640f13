"""A calibration part that is too small for the default rate is said when it is made and used."""

import pytest
import torch

from memfree.commands.index import index
from memfree.commands.prepare import prepare
from memfree.data import PartSizes, split
from memfree.guidance import calibration
from memfree.guidance.settings import GuidanceSettings


def test_the_rate_that_is_advised_can_be_used():
    assert GuidanceSettings().false_positive_rate == split.DEFAULT_RATE
    assert split.too_few_images(500) is None
    for images in range(6, 500):
        line = split.too_few_images(images)
        rate = float(line.split("--false_positive_rate ")[1].split(" ")[0])
        assert rate < split.MIN_EXPECTED / images + 1e-4
        calibrated = calibration.Calibration("x", torch.arange(float(images)))
        calibrated.threshold(rate)
        with pytest.raises(ValueError, match="choose one from") as refused:
            calibrated.threshold(0.5 * split.MIN_EXPECTED / images)
        calibrated.threshold(float(str(refused.value).split("choose one from ")[1].split()[0]))
    for images in range(6):
        assert "too few for any rate" in split.too_few_images(images)
    assert "there is 1, too few" in split.too_few_images(1)


def test_index_says_it_too(tmp_path, capsys):
    prepare(tmp_path / "few", parts=PartSizes(train=60, calibration=100, test=0, fit=0))
    prepare(tmp_path / "enough", parts=PartSizes(train=60, calibration=500, test=0, fit=0))
    capsys.readouterr()
    index(tmp_path / "few", tmp_path / "index")
    lines = [line for line in capsys.readouterr().err.splitlines() if "needs 500" in line]
    assert len(lines) == 1
    assert (
        "there are 100: the smallest rate is 5 %, use memfree evaluate --false_positive_rate 0.05 "
        in lines[0]
    )
    index(tmp_path / "enough", tmp_path / "another")
    assert "needs 500" not in capsys.readouterr().err


def test_singular_in_the_index_table(tmp_path, capsys):
    prepare(tmp_path / "data", parts=PartSizes(train=60, calibration=100, test=0, fit=0))
    index(tmp_path / "data", tmp_path / "index")
    assert "records)" not in capsys.readouterr().out  # not "0 (up to 1 records)"
