"""Attributes that are computed at their first use."""

import os
import threading

from forks import FORK_WARNING, FORKS, in_child
from fusedrnn.lazy import cached_property


class Square:
    computed = 0

    def __init__(self, number):
        self.number = number

    @cached_property
    def area(self):
        """The area."""
        self.computed += 1
        return self.number**2


def test_it_is_computed_once_for_each_instance():
    first, second = Square(2), Square(3)
    assert [first.area, second.area, first.area, second.area] == [4, 9, 4, 9]
    assert first.computed == second.computed == 1
    assert Square.area.__doc__ == "The area."


def test_all_threads_get_the_first_value():
    both_compute = threading.Barrier(2, timeout=30)

    class Slow:
        @cached_property
        def value(self):
            both_compute.wait()
            return object()

    slow, values = Slow(), []
    threads = [threading.Thread(target=lambda: values.append(slow.value)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values[0] is values[1] is slow.value


@FORKS
@FORK_WARNING
def test_fork_while_another_thread_computes():
    parent, computes, end = os.getpid(), threading.Event(), threading.Event()

    class Waits:
        @cached_property
        def value(self):
            if os.getpid() == parent:
                computes.set()
                end.wait()
            return b"computed"

    thread = threading.Thread(target=lambda: Waits().value)
    thread.start()
    try:
        computes.wait()
        assert in_child(lambda: Waits().value) == b"computed"
    finally:
        end.set()
        thread.join()
