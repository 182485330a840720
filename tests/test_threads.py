# SPDX-License-Identifier: Apache-2.0
"""Windows inpainted side by side on a CPU: the same reconstruction, within the same memory, in the same precision."""

import threading
from collections.abc import Iterator

import pytest
import torch

from anomalib_intra.threads import side_by_side
from anomalib_intra.torch_model import InpaintingTransformer


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_is_as_precise_as_one_thread(cache_enabled) -> None:
    model = small_model()
    images = torch.rand(1, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
        with torch.no_grad():
            fast = model.reconstruct(images)
        torch.set_num_threads(1)
        with torch.no_grad():
            plain = model.reconstruct(images)
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert torch.allclose(fast, plain, atol=0.02 * plain.abs().max())


def test_compiled_blocks_keep_to_one_thread(monkeypatch) -> None:
    model = small_model()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)
    model.compile_blocks()
    watch = InFlight(model, monkeypatch)
    with torch.no_grad():
        model.reconstruct(torch.rand(1, 3, 64, 96))
    assert watch.threads == {threading.get_ident()}


def test_work_takes_one_thread_each_and_no_gradients() -> None:
    def look(_: int) -> torch.Tensor:
        weight = torch.ones(1, requires_grad=True)
        return torch.tensor([torch.get_num_threads(), (2 * weight).requires_grad])

    assert [seen.tolist() for seen in side_by_side(look, range(5), threads=3)] == [[1, 0]] * 5
    assert torch.get_num_threads() == 3
    assert threading_of_torch_in_a_new_thread() == 3


def threading_of_torch_in_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_an_error_comes_through_and_ends_the_work() -> None:
    done = []

    def work(piece: int) -> torch.Tensor:
        if piece == 1:
            msg = "a piece that cannot be computed"
            raise ValueError(msg)
        done.append(piece)
        return torch.zeros(1)

    with pytest.raises(ValueError, match="cannot be computed"):
        side_by_side(work, range(10_000), threads=2)
    assert len(done) < 9_000
    assert torch.get_num_threads() == 3
