"""Two asyncio programs that exchange random messages of random sizes, and print what
they sent and received: exchange.py server|client ADDRESS PORT ROUNDS MAX_SIZE SEED"""

import asyncio
import hashlib
import random
import socket
import struct
import sys

role, address, port, rounds, max_size, seed = sys.argv[1:7]
port, rounds, max_size = int(port), int(rounds), int(max_size)
chance = random.Random(role + seed)
sent, received = hashlib.sha256(), hashlib.sha256()


async def send(writer):
    # The logarithm of the size is even, so that there are many of each kind.
    message = chance.randbytes(int(max_size ** chance.random()))
    sent.update(message)
    writer.write(struct.pack(">I", len(message)))
    for piece in range(0, len(message), 100_000):
        writer.write(message[piece:piece + 100_000])
    await writer.drain()


async def receive(reader):
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    received.update(await reader.readexactly(length))


async def serve(reader, writer):
    for _ in range(rounds):
        await receive(reader)
        await send(writer)
    assert await reader.read() == b""
    writer.close()
    done.set_result(None)


async def main():
    global done
    done = asyncio.get_running_loop().create_future()
    if role == "server":
        both = address == "::"
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, dualstack_ipv6=both)
        # asyncio sets it only where it made the socket itself.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = await asyncio.start_server(serve, sock=listener)
        print(server.sockets[0].getsockname()[1], flush=True)
        await done
    else:
        source = (address, int(sys.argv[7])) if len(sys.argv) > 7 else None
        reader, writer = await asyncio.open_connection(address, port, local_addr=source)
        for _ in range(rounds):
            await send(writer)
            await receive(reader)
        writer.write_eof()
        assert await reader.read() == b""
    print(sent.hexdigest(), received.hexdigest(), flush=True)


asyncio.run(main())
