"""Takes connections that are handed over: receiver.py SOCKET HEADERS WHAT

WHAT is what it answers: accept, refuse, silent (says nothing), leave (goes before the decision).
Headers are written to a file, one a line. The label says what each connection is for, a letter each:
  e  every byte comes back
  h  what comes is compared with the pattern from its beginning; at its end the count goes back, eight bytes
  g  "done" is sent, and the connection closed
"""

import json
import os
import socket
import struct
import sys
import threading

path, headers, what = sys.argv[1:]


def pattern(position):
    return (position * 31 + (position >> 8) * 7 + (position >> 16)) & 0xFF


def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()


def compare(connection):
    position = 0
    while data := connection.recv(65536):
        if data != bytes(pattern(position + at) for at in range(len(data))):
            os._exit(3)
        position += len(data)
    connection.sendall(struct.pack("=Q", position))
    connection.close()


def finish(connection):
    connection.sendall(b"done")
    connection.close()


def serve(caller):
    line, numbers = b"", []
    while not line.endswith(b"\n"):
        data, more, _, _ = socket.recv_fds(caller, 65536, 64)
        if not data:
            return  # it was only looked whether somebody listens
        line += data
        numbers += more
    header = json.loads(line)
    connections = [socket.socket(fileno=number) for number in numbers]
    for connection in connections:
        connection.setblocking(True)
    if what == "silent":
        caller.recv(1)
        return
    caller.sendall(b"refuse not today\n" if what == "refuse" else b"accept\n")
    if what == "leave":
        caller.close()
        os._exit(0)
    committed = caller.recv(100) == b"commit\n"
    with open(headers, "a") as log:
        log.write(json.dumps({**header, "committed": committed, "sockets": len(numbers)}) + "\n")
    if not committed:
        return
    work = {"e": echo, "h": compare, "g": finish}
    for letter, connection in zip(header["label"], connections):
        threading.Thread(target=work[letter], args=[connection]).start()


listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("listening", flush=True)
while True:
    serve(listener.accept()[0])
