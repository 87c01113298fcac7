// An HTTP server that keeps connections, counts the requests of each, and speaks WebSocket (RFC 6455) on /talk: it counts by
// itself and repeats what it is told. node node_server.js ADDRESS PORT
'use strict';
const { createHash } = require('node:crypto');
const http = require('node:http');

const [address, port] = process.argv.slice(2);

const server = http.createServer((request, response) => {
    const socket = request.socket;
    socket.requests = (socket.requests || 0) + 1;
    const parts = [];
    request.on('data', (part) => parts.push(part));
    request.on('end', () => {
        let answer;
        if (request.method === 'GET') {
            const [one, two] = request.url.split('?')[1].split('&').map(Number);
            answer = String(one + two);
        } else {
            answer = [...Buffer.concat(parts).toString()].reverse().join('');
        }
        const body = `${socket.requests} ${answer}`;
        response.writeHead(200, { 'Content-Length': Buffer.byteLength(body) });
        response.end(body);
    });
});
server.keepAliveTimeout = 0;
server.requestTimeout = 0;

function frame(text) {
    return Buffer.concat([Buffer.from([0x81, text.length]), Buffer.from(text)]);
}

server.on('upgrade', (request, socket, head) => {
    const key = request.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11';
    const proof = createHash('sha1').update(key).digest('base64');
    socket.write('HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n' +
        `Sec-WebSocket-Accept: ${proof}\r\n\r\n`);
    let ticks = 0;
    const timer = setInterval(() => socket.write(frame(`tick ${++ticks}`)), 10);
    let waiting = head;
    socket.on('data', (bytes) => {
        waiting = Buffer.concat([waiting, bytes]);
        while (waiting.length >= 2 && waiting.length >= 6 + (waiting[1] & 127)) {
            const length = waiting[1] & 127;
            const mask = waiting.subarray(2, 6);
            const text = Buffer.from(waiting.subarray(6, 6 + length)).map((byte, at) => byte ^ mask[at % 4]);
            socket.write(frame(text.toString()));
            waiting = waiting.subarray(6 + length);
        }
    });
    const end = () => clearInterval(timer);
    socket.on('close', end);
    socket.on('error', end);
});

server.listen(Number(port), address);
