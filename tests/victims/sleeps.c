/* sleeps LENGTH_MS SLACK_MS: threads wait with every call that has a timeout. No wait may end early, end with a false result, or begin
 * anew after a move. CLOCK_MONOTONIC is the judge. */
#include "victim.h"
#include <linux/futex.h>
#include <limits.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/syscall.h>

static long length_ms, slack_ms;
static int silent;
static struct timespec length;

static int by_nanosleep(void) { return nanosleep(&length, NULL); }

static int by_clock_nanosleep(void) { return clock_nanosleep(CLOCK_BOOTTIME, 0, &length, NULL); }

static int by_absolute_sleep(void)
{
    int64_t end = now_ns(CLOCK_MONOTONIC) + length_ms * 1000000;
    struct timespec until = {end / 1000000000, end % 1000000000};
    return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

static int by_poll(void)
{
    struct pollfd one = {.fd = silent, .events = POLLIN};
    return poll(&one, 1, length_ms);
}

static int by_ppoll(void)
{
    struct pollfd one = {.fd = silent, .events = POLLIN};
    struct timespec copy = length;
    return ppoll(&one, 1, &copy, NULL);
}

static int by_select(void)
{
    fd_set set;
    struct timeval copy = {length_ms / 1000, length_ms % 1000 * 1000};
    FD_ZERO(&set);
    FD_SET(silent, &set);
    return select(silent + 1, &set, NULL, NULL, &copy);
}

static int by_futex(void)
{
    static uint32_t word;
    return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &length, NULL, 0) == -1 && errno == ETIMEDOUT ? 0 : -1;
}

static int by_absolute_futex(void)
{
    static uint32_t word;
    int64_t end = now_ns(CLOCK_MONOTONIC) + length_ms * 1000000;
    struct timespec until = {end / 1000000000, end % 1000000000};
    return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY) == -1 && errno == ETIMEDOUT
               ? 0 : -1;
}

static int by_semaphore(void)
{
    static sem_t semaphore;
    int64_t end = now_ns(CLOCK_REALTIME) + length_ms * 1000000;
    struct timespec until = {end / 1000000000, end % 1000000000};
    return sem_timedwait(&semaphore, &until) == -1 && errno == ETIMEDOUT ? 0 : -1;
}

/* The following two end with EINTR after any stop of the thread, man signal(7) says; they try again for the rest themselves. */
static int by_epoll(void)
{
    static int instance;
    if (!instance)
        instance = epoll_create1(0);
    int64_t end = now_ns(CLOCK_MONOTONIC) + length_ms * 1000000;
    int result;
    do {
        int64_t left = end - now_ns(CLOCK_MONOTONIC);
        struct epoll_event event;
        result = left <= 0 ? 0 : epoll_wait(instance, &event, 1, (left + 999999) / 1000000);
    } while (result == -1 && errno == EINTR);
    return result;
}

static int by_sigtimedwait(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 9);
    int64_t end = now_ns(CLOCK_MONOTONIC) + length_ms * 1000000;
    int result;
    do {
        int64_t left = end - now_ns(CLOCK_MONOTONIC);
        struct timespec rest = {left / 1000000000, left % 1000000000};
        result = left <= 0 ? 0 : sigtimedwait(&set, NULL, &rest) == -1 && errno == EAGAIN ? 0 : -1;
    } while (result == -1 && errno == EINTR);
    return result;
}

static const struct {
    const char *name;
    int (*wait)(void);
} kinds[] = {{"nanosleep", by_nanosleep}, {"clock_nanosleep", by_clock_nanosleep}, {"absolute clock_nanosleep", by_absolute_sleep},
             {"poll", by_poll}, {"ppoll", by_ppoll}, {"select", by_select}, {"futex", by_futex},
             {"absolute futex", by_absolute_futex}, {"sem_timedwait", by_semaphore}, {"epoll_wait", by_epoll},
             {"sigtimedwait", by_sigtimedwait}};

static void *wait_again_and_again(void *argument)
{
    unsigned kind = (uintptr_t)argument;
    /* Waits begin at different times: a move catches each at another place. */
    usleep(kind * length_ms * 1000 / COUNT(kinds));
    while (!stopping()) {
        int64_t began = now_ns(CLOCK_MONOTONIC);
        int result = kinds[kind].wait(), error = errno;
        long took_us = (now_ns(CLOCK_MONOTONIC) - began) / 1000;
        CHECK(result == 0, "%s yields %d: %s", kinds[kind].name, result, strerror(error));
        /* Two hosts' clocks are joined to within 2 ms, and CLOCK_MONOTONIC is the judge. */
        CHECK(took_us >= length_ms * 1000 - 3000, "%s came back after %ld us", kinds[kind].name, took_us);
        CHECK(took_us <= (length_ms + slack_ms) * 1000, "%s came back after %ld us only", kinds[kind].name, took_us);
    }
    return NULL;
}

void victim_sleeps(void)
{
    length_ms = argument(0, 1500);
    slack_ms = argument(1, 450);
    length = (struct timespec){length_ms / 1000, length_ms % 1000 * 1000000};
    silent = NEED(eventfd(0, 0));
    for (unsigned i = 0; i < COUNT(kinds); i++)
        start_thread(wait_again_and_again, (void *)(uintptr_t)i);
    ready();
    while (beat())
        ;
}
