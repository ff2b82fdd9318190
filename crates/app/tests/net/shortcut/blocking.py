"""Programs that wait inside of recv and sendall: blocking.py ADDRESS ROUNDS. Prints
whether what was exchanged is the same, and how often recv said EAGAIN."""

import hashlib
import random
import socket
import sys
import threading

address, rounds = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, 0), family=family)
again = 0


def receive(end, length):
    global again
    pieces = []
    while length:
        try:
            piece = end.recv(min(length, 100_000))
        except BlockingIOError:
            again += 1
            continue
        assert piece, "it ended early"
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def run(end, first, sent, received):
    chance = random.Random(first)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for number in range(rounds):
        for sends in (first, not first):
            # Small for long enough to be accelerated, then some that are large.
            size = 20_000_000 if number % 50 == 49 else 1000
            if sends:
                message = chance.randbytes(1000) * (size // 1000)
                sent.update(message)
                end.sendall(message)
            else:
                received.update(receive(end, size))


hashes = [hashlib.sha256() for _ in range(4)]
client = socket.create_connection(listener.getsockname()[:2])
other = threading.Thread(target=run, args=(client, True, hashes[0], hashes[1]))
other.start()
run(listener.accept()[0], False, hashes[2], hashes[3])
other.join()
digests = [one.digest() for one in hashes]
print(digests[0] == digests[3] and digests[2] == digests[1], again)
