# SPDX-License-Identifier: Apache-2.0
"""Pieces of work side by side on a CPU, each on one thread, instead of one after the other, each on all threads.

Where all threads share every product of matrices, they wait for each other after every one of them, and the more often,
the smaller the products are (docs/performance.md).
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def side_by_side(work: Callable[[Piece], torch.Tensor], pieces: Iterable[Piece], threads: int) -> list[torch.Tensor]:
    """Compute pieces of work on a CPU without gradients, each on one thread, in the caller's precision (autocast).

    What else torch keeps for a thread (modes, its profiler, tracing) does not reach the work.

    Args:
        work (Callable): What is done with a piece.
        pieces (Iterable): The pieces.
        threads (int): How many are in work at once. One piece, or one at a time, is computed in the caller's thread.

    Returns:
        list[torch.Tensor]: Their results, in order.

    Example:
        >>> side_by_side(torch.sum, [torch.ones(2), torch.ones(3)], threads=2)
        [tensor(2.), tensor(3.)]
    """
    pieces = list(pieces)
    threads = min(threads, len(pieces))
    if threads <= 1:
        return [work(piece) for piece in pieces]
    all_threads = torch.get_num_threads()
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    prepared = Barrier(threads + 1)

    def prepare() -> None:
        # What torch keeps for each thread by itself; the threads end with this function.
        torch.get_num_threads()  # torch sets a thread's number when it is first asked for, over what was set before
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        enabled, dtype, cached = autocast
        torch.set_autocast_enabled("cpu", enabled)
        torch.set_autocast_dtype("cpu", dtype)
        torch.set_autocast_cache_enabled(cached)
        torch.autocast_increment_nesting()  # else an autocast within the work would forget the casts when it ends
        prepared.wait()

    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        try:
            results = pool.map(work, pieces)
            prepared.wait()
        except BaseException:
            prepared.abort()  # no thread waits for one that will not come
            raise
        finally:
            torch.set_num_threads(all_threads)  # the last number set is that of all threads that come to torch later
        return list(results)
