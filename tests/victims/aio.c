/* aio: asynchronous I/O contexts with reads past the page cache under way, polls that wait, synchronisations, and events that are
 * fetched late or by reading the ring itself. Every request must end, once, and with the right content. */
#include "victim.h"
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define BLOCK (256UL << 10)
#define BLOCKS 128
#define DEPTH 24

struct ring {
    unsigned id, nr, head, tail, magic, compatible, incompatible, header;
    struct io_event events[];
};

static int fd, bell;
static aio_context_t reads, polls, late, small;

static aio_context_t context(unsigned events)
{
    aio_context_t made = 0;
    NEED(syscall(SYS_io_setup, events, &made));
    return made;
}

static void submit(aio_context_t where, struct iocb *block)
{
    long got = syscall(SYS_io_submit, where, 1, &block);
    CHECK(got == 1, "io_submit: %ld: %s", got, strerror(errno));
}

static long fetch(aio_context_t where, long least, long most, struct io_event *events, struct timespec *timeout)
{
    long got;
    do
        got = syscall(SYS_io_getevents, where, least, most, events, timeout);
    while (got < 0 && errno == EINTR);
    CHECK(got >= 0, "io_getevents: %s", strerror(errno));
    return got;
}

static bool is_block(const char *buffer, unsigned block)
{
    for (unsigned long at = 0; at < BLOCK; at += PAGE)
        if (!page_is(buffer + at, block, at))
            return false;
    return true;
}

/* Keeps DEPTH reads under way; a buffer is looked at when its read has ended and once more before the next one. */
static void *read_ahead(void *argument)
{
    char *buffers = mmap(NULL, DEPTH * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static struct iocb blocks[DEPTH];
    static unsigned ended[DEPTH], begun[DEPTH];
    struct io_event events[DEPTH];
    uint64_t random = 3;
    if (buffers == MAP_FAILED)
        die("no memory");
    for (unsigned i = 0; i < DEPTH; i++) {
        blocks[i] = (struct iocb){.aio_data = i, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = fd, .aio_nbytes = BLOCK,
                                  .aio_buf = (uintptr_t)buffers + i * BLOCK, .aio_offset = i * BLOCK};
        begun[i]++;
        submit(reads, &blocks[i]);
    }
    thread_is_set_up();
    while (!stopping()) {
        struct timespec patience = {.tv_sec = 5};
        long count = fetch(reads, 1, DEPTH, events, &patience);
        CHECK(count > 0, "no read ends");
        for (long n = 0; n < count; n++) {
            unsigned i = events[n].data;
            if (i >= DEPTH) {
                wrong("an event of nobody: %u", i);
                continue;
            }
            unsigned block = blocks[i].aio_offset / BLOCK;
            CHECK_EQUAL(events[n].res, BLOCK, "bytes read");
            CHECK_EQUAL(events[n].obj, (uintptr_t)&blocks[i], "control block");
            CHECK(is_block(buffers + i * BLOCK, block), "block %u as read", block);
            ended[i]++;
            CHECK_EQUAL(ended[i], begun[i], "reads ended");
        }
        /* Some rest for a while: what was read must stay. */
        random = mix(random);
        for (long n = 0; n < count; n++) {
            unsigned i = events[n].data % DEPTH, block = blocks[i].aio_offset / BLOCK;
            CHECK(is_block(buffers + i * BLOCK, block), "block %u later", block);
            blocks[i].aio_offset = (random >> n) % BLOCKS * BLOCK;
            begun[i]++;
            submit(reads, &blocks[i]);
        }
    }
    return NULL;
}

static struct iocb waiting = {.aio_data = 77, .aio_lio_opcode = IOCB_CMD_POLL, .aio_buf = POLLIN};
static atomic_uint rung, heard;

/* A poll that sees nothing for many beats, and the synchronisations of a file. */
static void *wait_for_bell(void *argument)
{
    waiting.aio_fildes = bell;
    submit(polls, &waiting);
    thread_is_set_up();
    while (!stopping()) {
        struct timespec patience = {.tv_nsec = 300 * 1000 * 1000};
        struct io_event event;
        uint64_t count;
        if (fetch(polls, 1, 1, &event, &patience) != 1)
            continue;
        CHECK_EQUAL(event.data, 77, "data of the poll");
        CHECK_EQUAL(event.res, POLLIN, "what the poll saw");
        CHECK(read(bell, &count, sizeof count) == sizeof count && count == 1, "the bell");
        heard++;
        submit(polls, &waiting);
    }
    return NULL;
}

void victim_aio(void)
{
    static char block[BLOCK] __attribute__((aligned(4096)));
    static char byte[1];
    struct io_event events[16];
    int plain = fd = NEED(open(in_dir("blocks"), O_RDWR | O_CREAT, 0600));
    for (unsigned i = 0; i < BLOCKS; i++) {
        for (unsigned long at = 0; at < BLOCK; at += PAGE)
            page_fill(block + at, i, at);
        if (write(fd, block, BLOCK) != (ssize_t)BLOCK)
            die("the file: %s", strerror(errno));
    }
    NEED(fsync(fd));
    fd = open(in_dir("blocks"), O_RDONLY | O_DIRECT);
    if (fd < 0)
        not_here("this file system has no O_DIRECT");
    bell = NEED(eventfd(0, EFD_NONBLOCK));
    reads = context(DEPTH);
    polls = context(1);
    late = context(400);
    small = context(8);
    start_thread(read_ahead, NULL);
    start_thread(wait_for_bell, NULL);
    wait_for_threads(2);
    struct ring *ring = (struct ring *)late;
    struct iocb sync = {.aio_lio_opcode = IOCB_CMD_FSYNC, .aio_fildes = plain};
    struct iocb one = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = plain, .aio_buf = (uintptr_t)byte, .aio_nbytes = 1};
    ready();
    for (unsigned i = 0; beat(); i++) {
        /* Five events a round, fetched only 20 rounds later, so that a move comes upon many of them; half of them by hand. */
        unsigned at = i % 40;
        if (at < 20)
            for (unsigned n = 0; n < 5; n++) {
                one.aio_data = at * 5 + n;
                submit(late, &one);
            }
        else if (at == 20)
            for (unsigned n = 0; n < 50; n++) {
                CHECK(ring->head != ring->tail && ring->events[ring->head].data == n && ring->events[ring->head].res == 1,
                      "event %u in the ring: %llu, %lld", n, ring->events[ring->head].data, ring->events[ring->head].res);
                ring->head = (ring->head + 1) % ring->nr;
            }
        else if (at == 39) {
            struct timespec none = {0};
            for (unsigned n = 50; n < 100; n++)
                CHECK(fetch(late, 1, 1, events, &none) == 1 && events[0].data == n, "event %u: %llu", n, events[0].data);
            CHECK_EQUAL(fetch(late, 0, 1, events, &none), 0, "an event too many");
        }
        if (i % 10 == 0) {
            sync.aio_data = i;
            submit(small, &sync);
            CHECK(fetch(small, 1, 1, events, NULL) == 1 && events[0].data == i && events[0].res == 0, "fsync: %lld", events[0].res);
        }
        if (i % 25 == 24) {
            struct timespec moment = {.tv_nsec = 1000 * 1000};
            uint64_t count = 1;
            CHECK(write(bell, &count, sizeof count) == sizeof count, "ringing");
            rung++;
            for (unsigned wait = 0; heard < rung && wait < 2000; wait++)
                nanosleep(&moment, NULL);
            CHECK_EQUAL(heard, rung, "bells heard");
        }
    }
}
