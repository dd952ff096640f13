"""Products in IEEE float32: the setting is restored, also by threads that overlap."""

import threading

import pytest
import torch

from memfree.data.duplicates import near_pairs
from memfree.full_precision import full_precision

CPU = torch.device("cpu")
MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_holds_inside_and_is_restored_also_after_an_error(device):
    matmul = torch.backends.cuda.matmul if device == "cuda" else MATMUL
    before = matmul.fp32_precision
    assert before != "ieee"
    with pytest.raises(KeyError), full_precision(torch.device(device)):
        assert matmul.fp32_precision == "ieee"
        with full_precision(torch.device(device)):
            pass
        assert matmul.fp32_precision == "ieee"
        raise KeyError
    assert matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_last_of_several_threads_restores_it():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with full_precision(CPU):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with full_precision(CPU):
        leave.set()
        thread.join()
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == "bf16"


def test_who_sets_another_precision_meanwhile_keeps_it():
    with full_precision(CPU):
        MATMUL.fp32_precision = "tf32"
    assert MATMUL.fp32_precision == "tf32"


def test_near_copies_do_not_depend_on_it():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 3, 8, 8, generator=generator) * 2 - 1
    images[150:] = (images[:150] + 0.04 * torch.randn(150, 3, 8, 8, generator=generator)).clamp(
        -1, 1
    )
    images[200:] = (images[:100] + 0.01 * torch.randn(100, 3, 8, 8, generator=generator)).clamp(
        -1, 1
    )
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
    fast = near_pairs(pixels, 0.15)
    torch.set_float32_matmul_precision("highest")
    assert (near_pairs(pixels, 0.15) == fast).all() and len(fast)
