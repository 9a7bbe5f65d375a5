"""Who waits until a queue has nothing more to answer."""

import asyncio

from headrace.batching.drain import Drain


async def test_all_are_told_at_once_and_none_twice():
    drain = Drain()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(drain.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    assert len(drain.waiting) == 3
    tasks[1].cancel()
    drain.tell()
    assert not drain.waiting
    drain.tell()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [False, True, False]
