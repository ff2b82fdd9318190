"""Many short connections to an echo server, both of asyncio: churn.py ADDRESS COUNT.
Each has its own number of exchanges, some too few to be accelerated. Prints how many
came out well."""

import asyncio
import random
import sys

address, count = sys.argv[1], int(sys.argv[2])
chance = random.Random(count)
good = 0


async def echo(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


async def connection(port, gate):
    global good
    async with gate:
        reader, writer = await asyncio.open_connection(address, port)
        for _ in range(chance.choice([1, 3, 30, 60])):
            message = chance.randbytes(chance.choice([1, 100, 5000]))
            writer.write(message)
            assert await reader.readexactly(len(message)) == message
        # Some leave the end to the server, some reset.
        if chance.random() < 0.2:
            writer.transport.abort()
        else:
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
        good += 1


async def main():
    server = await asyncio.start_server(echo, address, 0)
    port = server.sockets[0].getsockname()[1]
    gate = asyncio.Semaphore(40)
    await asyncio.gather(*(connection(port, gate) for _ in range(count)))
    print(good)


asyncio.run(main())
