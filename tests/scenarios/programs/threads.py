"""A victim in Python: threads that keep dictionaries, lists and big numbers, check them, and talk through a queue."""

import hashlib
import os
import queue
import signal
import threading
import time

DIRECTORY = os.environ["VICTIM_DIR"]
log = open(os.path.join(DIRECTORY, "log"), "a", buffering=1)
status = os.open(os.path.join(DIRECTORY, "status"), os.O_RDWR | os.O_CREAT)
stop = threading.Event()
lock = threading.Lock()
checks = errors = 0


def check(condition, text):
    global checks, errors
    with lock:
        checks += 1
        if not condition:
            errors += 1
            log.write(f"error: {text}\n")


def keep(number, numbers):
    table = {i: hashlib.sha256(f"{number}-{i}-0".encode()).digest() for i in range(20000)}
    versions = dict.fromkeys(table, 0)
    position = 0
    while not stop.is_set():
        for _ in range(200):
            position = (position * 1103515245 + 12345) % 20000
            version = versions[position]
            check(table[position] == hashlib.sha256(f"{number}-{position}-{version}".encode()).digest(), f"entry {position}")
            versions[position] = version + 1
            table[position] = hashlib.sha256(f"{number}-{position}-{version + 1}".encode()).digest()
        numbers.put((number, position))
        time.sleep(0.002)


def main():
    numbers = queue.Queue(maxsize=64)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threads = [threading.Thread(target=keep, args=(number, numbers), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    beats, largest, last = 0, 0.0, time.time()
    time.sleep(0.3)
    log.write("ready\n")
    last = time.time()
    while not stop.is_set():
        try:
            number, position = numbers.get(timeout=1)
            check(0 <= number < 6 and 0 <= position < 20000, "the queue")
        except queue.Empty:
            check(stop.is_set(), "nobody puts anything into the queue")
        now = time.time()
        largest, last, beats = max(largest, now - last), now, beats + 1
        line = f"beats={beats} checks={checks} errors={errors} largest_gap_us={int(largest * 1e6)}"
        os.pwrite(status, f"{line:<100}\n".encode(), 0)
    log.write(f"verdict {'FAIL' if errors else 'pass'} beats={beats} checks={checks} errors={errors}\n")
    log.flush()
    os._exit(1 if errors else 0)


main()
