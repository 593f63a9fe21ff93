"""The cache of mapping tables: bounded, but never without a table that was changed."""

from __future__ import annotations

import random
import threading

import pytest

from nbdserve.block.tables import TableCache


def test_a_table_is_loaded_once_while_it_is_used() -> None:
    loaded: list[int] = []

    def load(key: int) -> list[int]:
        loaded.append(key)
        return [key]

    cache = TableCache[list[int]](8)
    assert cache.get(1) is None
    for key in (1, 2, 3, 1, 2, 3):
        assert cache.get_or_load(key, load) == [key]
    assert loaded == [1, 2, 3]
    for key in range(10, 40):
        cache.get_or_load(key, load)
        assert cache.get(1) == [1]
    assert loaded.count(1) == 1


def test_memory_is_bounded() -> None:
    cache = TableCache[int](8)
    for key in range(1, 1000):
        cache.get_or_load(key, lambda key: key)
        assert len(cache.recent) + len(cache._older) <= 8
    assert cache.get(1) is None


def test_pinned_tables_stay() -> None:
    cache = TableCache[list[int]](4)
    changed = cache.pin(1, lambda key: [key])
    changed.append(2)
    for key in range(10, 100):
        cache.get_or_load(key, lambda key: [key])
    assert cache.get(1) is changed
    cache.unpin(1)
    for key in range(10, 100):
        cache.get_or_load(key, lambda key: [key])
    assert cache.get(1) is None


def test_a_table_that_cannot_be_loaded_is_not_pinned() -> None:
    def fail(key: int) -> int:
        raise OSError(5, "no")

    cache = TableCache[int](4)
    with pytest.raises(OSError, match="no"):
        cache.pin(1, fail)
    assert not cache.pinned
    assert cache.pin(1, lambda key: 7) == 7


def test_threads_see_one_object_for_each_key() -> None:
    """Counters that live in tables: an increment is lost if two objects ever stand for one key."""
    cache = TableCache[list[int]](6)
    disk = dict.fromkeys(range(40), 0)
    locks = {key: threading.Lock() for key in range(40)}
    done = dict.fromkeys(range(40), 0)

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(2000):
            key = chosen.randrange(40)
            if seed:
                cache.get_or_load(key, lambda key: [disk[key]])
                continue
            with locks[key]:
                table = cache.pin(key, lambda key: [disk[key]])
                table[0] += 1
                done[key] += 1
                assert cache.get(key) is table
                disk[key] = table[0]
                cache.unpin(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disk == done
