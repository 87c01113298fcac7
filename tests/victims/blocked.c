/* blocked: threads are moved while they block for ever in a call; each must wake as if nothing had happened when its turn comes. */
#include "victim.h"
#include <fcntl.h>
#include <linux/futex.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>

static int pipe_ends[2], full_ends[2], events[2], pair[2];
static uint32_t word;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static unsigned turn, counts[6];

static void *in_read(void *argument)
{
    for (unsigned i = 1; !stopping(); i++) {
        char buffer[PAGE];
        ssize_t got = read(pipe_ends[0], buffer, sizeof buffer);
        CHECK(got == 8 && *(uint64_t *)buffer == mix(i), "read from a pipe yields %zd: %s", got, strerror(errno));
        __atomic_store_n(&counts[0], i, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *in_eventfd(void *argument)
{
    for (unsigned i = 1; !stopping(); i++) {
        uint64_t value = 0;
        CHECK(read(events[0], &value, 8) == 8 && value == 3, "read from an eventfd: value %lu: %s", value, strerror(errno));
        __atomic_store_n(&counts[1], i, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *in_futex(void *argument)
{
    for (unsigned i = 1; !stopping(); i++) {
        while (__atomic_load_n(&word, __ATOMIC_SEQ_CST) != i) {
            long result = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, i - 1, NULL, NULL, 0);
            CHECK(result == 0 || errno == EAGAIN, "futex yields %ld: %s", result, strerror(errno));
        }
        __atomic_store_n(&counts[2], i, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *in_condition(void *argument)
{
    for (unsigned i = 1; !stopping(); i++) {
        pthread_mutex_lock(&mutex);
        while (turn != i)
            pthread_cond_wait(&condition, &mutex);
        pthread_mutex_unlock(&mutex);
        __atomic_store_n(&counts[3], i, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *in_recv(void *argument)
{
    for (unsigned i = 1; !stopping(); i++) {
        char buffer[64];
        ssize_t got = recv(pair[0], buffer, sizeof buffer, 0);
        CHECK(got == 8 && *(uint64_t *)buffer == mix(i), "recv yields %zd: %s", got, strerror(errno));
        __atomic_store_n(&counts[4], i, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *in_poll(void *argument)
{
    for (unsigned i = 1; !stopping(); i++) {
        struct pollfd one = {.fd = events[1], .events = POLLIN};
        int result = poll(&one, 1, -1);
        uint64_t value = 0;
        CHECK(result == 1 && read(events[1], &value, 8) == 8 && value == 5, "poll yields %d: %s", result, strerror(errno));
        __atomic_store_n(&counts[5], i, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* Writes more than a pipe holds: the thread is stopped with a part written, in the middle of one call. */
static void *in_write(void *argument)
{
    static char block[256 * 1024];
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = (char)mix(i);
    while (!stopping()) {
        size_t done = 0;
        while (done < sizeof block) {
            ssize_t wrote = write(full_ends[1], block + done, sizeof block - done);
            CHECK(wrote > 0, "write to a full pipe yields %zd: %s", wrote, strerror(errno));
            done += wrote > 0 ? wrote : 0;
        }
    }
    return NULL;
}

void victim_blocked(void)
{
    NEED(pipe(pipe_ends));
    NEED(pipe(full_ends));
    NEED(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    events[0] = NEED(eventfd(0, 0));
    events[1] = NEED(eventfd(0, 0));
    void *(*bodies[])(void *) = {in_read, in_eventfd, in_futex, in_condition, in_recv, in_poll, in_write};
    for (unsigned i = 0; i < COUNT(bodies); i++)
        start_thread(bodies[i], NULL);
    size_t taken = 0;
    unsigned round = 0;
    ready();
    for (unsigned i = 1; beat(); i++) {
        char some[4096];
        ssize_t got = read(full_ends[0], some, sizeof some);
        for (ssize_t n = 0; n < got; n++)
            if (some[n] != (char)mix((taken + n) % (256 * 1024))) {
                wrong("byte %zu of the pipe", taken + n);
                break;
            }
        taken += got > 0 ? got : 0;
        if (i % 60)
            continue;
        if (round)
            for (unsigned n = 0; n < COUNT(counts); n++)
                CHECK(counts[n] == round, "waiter %u woke %u times instead of %u", n, counts[n], round);
        round++;
        uint64_t token = mix(round), three = 3, five = 5;
        CHECK(write(pipe_ends[1], &token, 8) == 8 && send(pair[1], &token, 8, 0) == 8 && write(events[0], &three, 8) == 8 &&
                  write(events[1], &five, 8) == 8, "waking: %s", strerror(errno));
        __atomic_store_n(&word, round, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        pthread_mutex_lock(&mutex);
        turn = round;
        pthread_cond_broadcast(&condition);
        pthread_mutex_unlock(&mutex);
    }
}
