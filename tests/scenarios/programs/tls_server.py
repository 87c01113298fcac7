"""A TLS server on asyncio: it answers every line with a digest of all lines of the connection so far. ADDRESS PORT CERTIFICATE KEY"""

import asyncio
import hashlib
import ssl
import sys


async def serve(reader, writer):
    digest = hashlib.sha256()
    try:
        while line := await reader.readline():
            digest.update(line)
            writer.write(f"{digest.hexdigest()} {len(line)}\n".encode() * 20)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def main(address, port, certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(serve, address, int(port), ssl=context)
    async with server:
        await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
