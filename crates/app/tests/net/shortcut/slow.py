"""A reader that falls behind: slow.py ADDRESS MEGABYTES. After some exchanges the
client sends all at once, and the server reads it bit by bit, pausing. Prints whether
the same arrived, and how much the kernel held for the reader at most."""

import asyncio
import hashlib
import socket
import sys
import time

address, size = sys.argv[1], int(sys.argv[2]) << 20
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, 0), family=family)
client = socket.create_connection(listener.getsockname()[:2])
server = listener.accept()[0]
for end in (client, server):
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def main():
    loop = asyncio.get_running_loop()
    for _ in range(200):
        for a, b in ((client, server), (server, client)):
            await loop.sock_sendall(a, b"?")
            assert await loop.sock_recv(b, 10) == b"?"
        await asyncio.sleep(0.001)
    message = bytes(range(251)) * (size // 251)
    sent = most = received = 0
    digest = hashlib.sha256()
    while received < len(message):
        while sent < len(message):
            try:
                sent += client.send(message[sent:sent + 100_000])
            except BlockingIOError:
                break
        most = max(most, sent - received)
        for _ in range(20):
            # A read of uneven size now and then, then a pause.
            piece = await loop.sock_recv(server, 77_777)
            assert piece, "it ended early"
            digest.update(piece)
            received += len(piece)
            if received == sent:
                break
        time.sleep(0.002)
    # The connection still works both ways.
    await loop.sock_sendall(server, b"done")
    assert await loop.sock_recv(client, 10) == b"done"
    print(digest.digest() == hashlib.sha256(message).digest(), most)


asyncio.run(main())
