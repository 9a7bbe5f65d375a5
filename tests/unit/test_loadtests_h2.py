"""The load tests' own gRPC client, against grpcio's server: large messages, many at a time, refusals, endings."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from loadtests.grpc_message import METHOD
from loadtests.h2_client import H2Client
from loadtests.h2_connection import H2Connection
from loadtests.http_message import BadResponse

_, SERVICE, NAME = METHOD.split("/")
UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@asynccontextmanager
async def served(infer):
    """The port of a server that gives every message to ``infer``, and the server."""
    server = grpc.aio.server(options=UNBOUNDED)
    handler = grpc.unary_unary_rpc_method_handler(infer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {NAME: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port, server
    finally:
        await server.stop(0)


async def echo(message, context):
    return message


async def connected(port, message):
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: H2Connection(f"127.0.0.1:{port}", METHOD, message), "127.0.0.1", port
    )
    await connection.ready
    return connection


async def answers_of(connection, count):
    """What so many calls at a time are told."""
    told = []
    done = asyncio.Event()

    def answered(message, problem):
        told.append((message, problem))
        if len(told) == count:
            done.set()

    for _ in range(count):
        connection.call(answered)
    async with asyncio.timeout(60):
        await done.wait()
    return told


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 70_000, 3_000_000])
async def test_messages_of_every_size_come_back(size):
    message = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with served(echo) as (port, _):
        connection = await connected(port, message)
        for _ in range(3):
            assert await answers_of(connection, 4) == [(message, None)] * 4
        connection.close()


async def test_refusals_are_told_and_the_connection_goes_on():
    seen = 0

    async def infer(message, context):
        nonlocal seen
        seen += 1
        if seen % 2:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
        return message

    async with served(infer) as (port, _):
        connection = await connected(port, b"abc")
        told = [one for _ in range(6) for one in await answers_of(connection, 1)]
        connection.close()
    assert {problem for _, problem in told} == {None, "gRPC status 8: too much"}
    assert [message for message, problem in told if problem is None] == [b"abc"] * 3


async def test_a_server_that_ends_fails_what_is_under_way():
    async def hang(message, context):
        await asyncio.sleep(60)

    async with served(hang) as (port, server):
        connection = await connected(port, b"abc")
        told = asyncio.create_task(answers_of(connection, 2))
        await asyncio.sleep(0.05)
        await server.stop(0)
        problems = {problem for _, problem in await told}
        assert None not in problems
        async with asyncio.timeout(60):
            while connection.usable:
                await asyncio.sleep(0.02)


async def test_slots_connect_anew_when_a_server_is_back():
    told = asyncio.Queue()
    async with served(echo) as (port, _):
        client = H2Client("127.0.0.1", port, b"abc", 3, check=lambda message: None)
        await client.open(lambda slot, problem: told.put_nowait((slot, problem)))
        for slot in range(3):
            client.send(slot)
        assert sorted([await told.get() for _ in range(3)]) == [(0, None), (1, None), (2, None)]
        for connection in client._connections:
            connection.close()
        await asyncio.sleep(0)
        for slot in range(3):
            client.send(slot)
        async with asyncio.timeout(60):
            assert sorted([await told.get() for _ in range(3)]) == [(0, None), (1, None), (2, None)]
    for connection in client._connections:
        connection.close()
    client.send(0)
    async with asyncio.timeout(60):
        slot, problem = await told.get()
    assert (slot, problem.split(":")[0]) == (0, "cannot connect")
    await client.close()


async def test_a_first_answer_that_is_an_error_stops_the_run():
    async def refuse(message, context):
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")

    async with served(refuse) as (port, _):
        client = H2Client("127.0.0.1", port, b"abc", 1)
        with pytest.raises(BadResponse, match="gRPC status 5: no such model"):
            await client.open(lambda slot, problem: None)
        await client.close()
