/* pipes: bytes inside pipes, FIFOs and socket pairs stay in order, packets keep their borders, sizes and shut-down halves stay. */
#include "victim.h"
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

static int full[2], packets[2], half[2], fifo, stream[2], datagram[2], sequenced[2], shut[2];
static uint64_t put_next, got_next; /* the stream of numbers inside the full pipe */

static void open_all(void)
{
    NEED(pipe2(full, O_NONBLOCK));
    NEED(fcntl(full[1], F_SETPIPE_SZ, 256 * 1024));
    while (write(full[1], &put_next, 8) == 8)
        put_next++;
    NEED(pipe2(packets, O_DIRECT | O_NONBLOCK));
    NEED(pipe2(half, O_CLOEXEC));
    close(half[1]);
    NEED(mkfifo(in_dir("fifo"), 0600));
    fifo = NEED(open(in_dir("fifo"), O_RDWR | O_NONBLOCK));
    NEED(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, stream));
    NEED(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, datagram));
    NEED(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sequenced));
    NEED(socketpair(AF_UNIX, SOCK_STREAM, 0, shut));
    int size = 100000;
    NEED(setsockopt(stream[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size));
}

/* What lies inside all of them while the process moves: of different lengths, with a round number in it. */
static size_t message(char *buffer, uint64_t round, unsigned number)
{
    size_t length = 1 + mix(round * 10 + number) % 900;
    for (size_t i = 0; i < length; i++)
        buffer[i] = (char)mix(round + number * 1000 + i);
    return length;
}

static void put_all(uint64_t round)
{
    char buffer[1024];
    int ends[] = {packets[1], stream[0], stream[1], datagram[0], datagram[1], sequenced[0], sequenced[1], fifo};
    for (unsigned end = 0; end < COUNT(ends); end++)
        for (unsigned n = 0; n < 3; n++) {
            size_t length = message(buffer, round, end * 3 + n);
            ssize_t put = write(ends[end], buffer, length);
            CHECK(put == (ssize_t)length, "end %u takes %zd of %zu bytes: %s", end, put, length, strerror(errno));
        }
}

static void get_all(uint64_t round)
{
    char want[1024], got[4096];
    int ends[] = {packets[0], stream[1], stream[0], datagram[1], datagram[0], sequenced[1], sequenced[0], fifo};
    for (unsigned end = 0; end < COUNT(ends); end++)
        for (unsigned n = 0; n < 3; n++) {
            size_t length = message(want, round, end * 3 + n);
            /* Streams have no borders: ask for exactly so much. The others must keep theirs. */
            bool borders = end == 0 || (end >= 3 && end < 7);
            ssize_t came = read(ends[end], got, borders ? sizeof got : length);
            CHECK(came == (ssize_t)length && !memcmp(got, want, length), "end %u message %u: %zd bytes instead of %zu", end, n, came, length);
        }
}

static void check_still(void)
{
    int waiting = 0, size = 0;
    socklen_t length = sizeof size;
    CHECK_EQUAL(fcntl(full[1], F_GETPIPE_SZ), 256 * 1024, "size of the full pipe");
    CHECK(!ioctl(full[0], FIONREAD, &waiting) && waiting == (int)(8 * (put_next - got_next)), "%d bytes in the full pipe", waiting);
    CHECK_EQUAL(fcntl(packets[1], F_GETFL) & O_DIRECT, O_DIRECT, "packet mode");
    char byte;
    CHECK(read(half[0], &byte, 1) == 0, "a pipe without writer does not end");
    CHECK(!getsockopt(stream[0], SOL_SOCKET, SO_SNDBUF, &size, &length) && size == 200000, "buffer size %d", size);
    CHECK(recv(shut[1], &byte, 1, MSG_DONTWAIT) == 0, "the shut-down half is open again: %s", strerror(errno));
    CHECK(fcntl(stream[0], F_GETFD) == FD_CLOEXEC && (fcntl(datagram[1], F_GETFL) & O_NONBLOCK), "flags of socket pairs");
}

static void turn_full_pipe(void)
{
    /* A page out, a page in: writing needs a whole free slot. */
    uint64_t numbers[512];
    ssize_t got = read(full[0], numbers, sizeof numbers);
    for (ssize_t i = 0; i < got / 8; i++)
        CHECK(numbers[i] == got_next + i, "number %lu in the full pipe instead of %lu", numbers[i], got_next + i);
    CHECK(got == sizeof numbers, "the full pipe gave %zd bytes", got);
    got_next += got > 0 ? got / 8 : 0;
    for (unsigned i = 0; i < 512; i++)
        numbers[i] = put_next + i;
    ssize_t put = write(full[1], numbers, sizeof numbers);
    put_next += put > 0 ? put / 8 : 0;
}

void victim_pipes(void)
{
    open_all();
    NEED(shutdown(shut[0], SHUT_WR));
    uint64_t round = 0;
    put_all(round);
    ready();
    for (unsigned i = 1; beat(); i++) {
        check_still();
        if (i % 20)
            continue;
        get_all(round);
        put_all(++round);
        turn_full_pipe();
    }
    get_all(round);
    uint64_t number;
    while (read(full[0], &number, 8) == 8)
        CHECK(number == got_next++, "number in the full pipe at the end");
    CHECK(put_next == got_next, "%lu numbers went in, %lu came out", put_next, got_next);
}
