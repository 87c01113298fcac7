"""Clients of tls_server.py that know every answer; they keep the protocol of victims. COUNT ADDRESS PORT CERTIFICATE"""

import asyncio
import hashlib
import os
import signal
import ssl
import sys
import time

DIRECTORY = os.environ["VICTIM_DIR"]
log = open(os.path.join(DIRECTORY, "log"), "a", buffering=1)
status = os.open(os.path.join(DIRECTORY, "status"), os.O_RDWR | os.O_CREAT)
checks = errors = 0
stop = False


def check(condition, text):
    global checks, errors
    checks += 1
    if not condition:
        errors += 1
        if errors < 10:
            log.write(f"error: {text}\n")


async def talk(number, address, port, context, connected):
    try:
        reader, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname="godwit")
        connected.release()
        digest = hashlib.sha256()
        round = 0
        while not stop:
            line = f"client {number} says {round} {'x' * (round * 97 % 3000)}\n".encode()
            digest.update(line)
            writer.write(line)
            expected = f"{digest.hexdigest()} {len(line)}\n".encode()
            for part in range(20):
                answer = await asyncio.wait_for(reader.readline(), 20)
                check(answer == expected, f"client {number}, round {round}, line {part}: {answer!r}")
            round += 1
            await asyncio.sleep(0.01)
        check(round > 0, f"client {number} got nothing done")
    except Exception as error:
        check(False, f"client {number}: {error!r}")
        connected.release()


async def main(count, address, port, certificate):
    context = ssl.create_default_context(cafile=certificate)
    connected = asyncio.Semaphore(0)
    clients = [asyncio.create_task(talk(number, address, int(port), context, connected)) for number in range(int(count))]
    for _ in clients:
        await connected.acquire()
    log.write("ready\n")
    beats, largest, last = 0, 0.0, time.time()
    while not stop:
        await asyncio.sleep(0.01)
        now = time.time()
        largest, last, beats = max(largest, now - last), now, beats + 1
        line = f"beats={beats} checks={checks} errors={errors} largest_gap_us={int(largest * 1e6)}"
        os.pwrite(status, f"{line:<100}\n".encode(), 0)
    await asyncio.wait(clients)
    log.write(f"verdict {'FAIL' if errors else 'pass'} beats={beats} checks={checks} errors={errors}\n")


def end(*_):
    global stop
    stop = True


signal.signal(signal.SIGTERM, end)
asyncio.run(main(*sys.argv[1:]))
