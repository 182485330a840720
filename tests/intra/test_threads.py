# SPDX-License-Identifier: Apache-2.0
"""Windows inpainted side by side on a CPU: the same reconstruction, within the same memory, in the same precision."""

import threading
import time
import warnings

import pytest
import torch

from anomalib_intra.intra.threads import side_by_side
from anomalib_intra.intra.torch_model import InpaintingTransformer

pytestmark = [pytest.mark.usefixtures("torch_threads"), pytest.mark.parametrize("torch_threads", [3], indirect=True)]


def small_model(**options) -> InpaintingTransformer:
    torch.manual_seed(0)
    return InpaintingTransformer((64, 96), window_size=3, embed_dim=64, depth=3, num_heads=4, **options).eval()


class InFlight:
    """Watches how many windows a model inpaints at once, and on which threads."""

    def __init__(self, model: InpaintingTransformer, monkeypatch) -> None:
        self.now = self.most = 0
        self.threads: set[int] = set()
        self.sizes: list[int] = []
        lock, inpaint = threading.Lock(), model._inpaint

        def watched(inputs, place):
            with lock:
                self.now += len(place)
                self.most = max(self.most, self.now)
                self.threads.add(threading.get_ident())
                self.sizes.append(len(place))
            result = inpaint(inputs, place)
            with lock:
                self.now -= len(place)
            return result

        monkeypatch.setattr(model, "_inpaint", watched)


@pytest.mark.parametrize("window_batch_size", [None, 1, 2, 4, 7, 100])
@pytest.mark.parametrize(
    "options", [{}, {"position": "local", "attention": "msa"}, {"readout": "token", "window_shift": 1}]
)
def test_reconstructs_as_one_thread_does(options, window_batch_size, monkeypatch) -> None:
    model = small_model(**options)
    images = torch.rand(2, 3, 64, 96)
    with torch.enable_grad():  # with gradients, it is one piece of work after the other
        plain = model.reconstruct(images, window_batch_size).detach()
    watch = InFlight(model, monkeypatch)
    with torch.inference_mode():
        fast = model.reconstruct(images, window_batch_size)
    assert (fast - plain).abs().max() < 1e-5
    assert window_batch_size is None or watch.most <= window_batch_size
    assert (threading.get_ident() in watch.threads) == (window_batch_size == 1)  # one at a time needs no other thread


def test_all_threads_get_as_many_windows(monkeypatch) -> None:
    model = small_model()
    watch = InFlight(model, monkeypatch)
    with torch.no_grad():
        model.reconstruct(torch.rand(1, 3, 64, 96))  # 24 windows: one batch for one thread, if not shared out
        model.reconstruct(torch.rand(1, 3, 64, 96), 15)  # at most five each at once
    assert watch.sizes == [8] * 3 + [4] * 6


def test_is_as_precise_as_one_thread() -> None:
    model = small_model()
    images = torch.rand(1, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fast = model.reconstruct(images)
        torch.set_num_threads(1)
        with torch.no_grad():
            plain = model.reconstruct(images)
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert torch.allclose(fast, plain, atol=0.02 * plain.abs().max())


def test_compiled_blocks_keep_to_one_thread(monkeypatch) -> None:
    model = small_model()
    model.compile_blocks()
    for block in model.blocks[1:]:
        block._compiled_call_impl = block._call_impl  # nothing need be compiled for this
    watch = InFlight(model, monkeypatch)
    with torch.no_grad():
        model.reconstruct(torch.rand(1, 3, 64, 96))
    assert watch.threads == {threading.get_ident()}


@pytest.mark.parametrize("of", ["weights", "images"])
def test_gradients_reach_what_asks_for_them(of) -> None:
    model, images = small_model(), torch.rand(1, 3, 64, 96)
    wanted = model.to_pixels.weight if of == "weights" else images
    model.requires_grad_(False)
    assert not model.reconstruct(images).requires_grad
    wanted.requires_grad_(True)
    model.reconstruct(images).sum().backward()
    assert wanted.grad.abs().sum() > 0


def test_a_trace_computes_what_it_is_given() -> None:
    model = small_model()
    images, others = torch.rand(2, 1, 3, 64, 96)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that checks of the input become constants, which is known
        traced = torch.jit.trace(model, images)
        _, reconstruction = traced(others)
        assert torch.allclose(reconstruction, model.reconstruct(others), atol=1e-5)


def test_work_takes_one_thread_each_and_no_gradients() -> None:
    def look(_: int) -> torch.Tensor:
        weight = torch.ones(1, requires_grad=True)
        return torch.tensor([torch.get_num_threads(), (2 * weight).requires_grad])

    assert [seen.tolist() for seen in side_by_side(look, range(5), threads=3)] == [[1, 0]] * 5
    assert torch.get_num_threads() == 3


def test_a_thread_that_comes_to_torch_while_others_work_gets_all_threads() -> None:
    seen: list[int] = []

    def look(_: int) -> torch.Tensor:
        time.sleep(0.1)  # until all have begun
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return torch.zeros(1)

    side_by_side(look, range(3), threads=3)
    assert seen == [3] * 3


def test_an_error_comes_through_and_ends_the_work() -> None:
    done = []

    def work(piece: int) -> torch.Tensor:
        if piece == 1:
            msg = "a piece that cannot be computed"
            raise ValueError(msg)
        time.sleep(0.002)
        done.append(piece)
        return torch.zeros(1)

    with pytest.raises(ValueError, match="cannot be computed"):
        side_by_side(work, range(500), threads=2)
    assert len(done) < 250
    assert torch.get_num_threads() == 3
