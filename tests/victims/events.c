/* events: eventfd and its semaphore kind, epoll inside epoll (level, edge, one-shot), timerfd and signalfd in them, inotify: states stay
 * and events still come. */
#include "victim.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

static int counter, semaphore, idle, outer, inner, timer, signals, watcher, pipe_ends[2], edge;
static int watch_one, watch_two;

static void watch(int instance, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    NEED(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event));
}

static void open_all(void)
{
    counter = NEED(eventfd(7, EFD_NONBLOCK | EFD_CLOEXEC));
    semaphore = NEED(eventfd(1000000, EFD_SEMAPHORE | EFD_NONBLOCK));
    idle = NEED(eventfd(0, EFD_NONBLOCK));
    timer = NEED(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    struct itimerspec tick = {{0, 30000000}, {0, 30000000}};
    NEED(timerfd_settime(timer, 0, &tick, NULL));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGRTMIN + 1);
    NEED(pthread_sigmask(SIG_BLOCK, &set, NULL));
    signals = NEED(signalfd(-1, &set, SFD_NONBLOCK));
    NEED(pipe2(pipe_ends, O_NONBLOCK));
    edge = NEED(eventfd(1, EFD_NONBLOCK));

    inner = NEED(epoll_create1(EPOLL_CLOEXEC));
    watch(inner, timer, EPOLLIN, 0x1111222233334444);
    watch(inner, signals, EPOLLIN, mix(2));
    watch(inner, pipe_ends[0], EPOLLIN | EPOLLONESHOT, mix(3));
    outer = NEED(epoll_create1(0));
    watch(outer, inner, EPOLLIN, mix(4));
    watch(outer, idle, EPOLLIN | EPOLLPRI, mix(5));
    watch(outer, edge, EPOLLIN | EPOLLET, mix(6));
    /* A descriptor watched under a number that it does not have any more. */
    int gone = NEED(dup(idle));
    close(gone);

    watcher = NEED(inotify_init1(IN_NONBLOCK));
    NEED(inotify_rm_watch(watcher, NEED(inotify_add_watch(watcher, victim_dir, IN_DELETE))));
    watch_one = NEED(inotify_add_watch(watcher, victim_dir, IN_CREATE | IN_DELETE | IN_ONLYDIR));
    close(NEED(open(in_dir("watched"), O_WRONLY | O_CREAT, 0600)));
    watch_two = NEED(inotify_add_watch(watcher, in_dir("watched"), IN_MODIFY));
    char drained[4096];
    while (read(watcher, drained, sizeof drained) > 0)
        ;
}

static bool fires(int instance, uint64_t data)
{
    struct epoll_event events[8];
    int count = epoll_wait(instance, events, 8, 0);
    for (int i = 0; i < count; i++)
        if (events[i].data.u64 == data)
            return true;
    return false;
}

static void check_eventfds(unsigned round)
{
    uint64_t value = 0, one = 1;
    CHECK(read(counter, &value, 8) == 8 && value == 7 + round, "eventfd %lu instead of %u", value, 7 + round);
    value = 7 + round + 1;
    CHECK(write(counter, &value, 8) == 8, "eventfd");
    CHECK(read(semaphore, &value, 8) == 8 && value == 1 && write(semaphore, &one, 8) == 8, "the semaphore yields %lu", value);
    CHECK(read(idle, &value, 8) == -1 && errno == EAGAIN, "the idle eventfd has a value");
}

static void check_epoll(void)
{
    uint64_t expirations;
    struct pollfd one = {.fd = inner, .events = POLLIN};
    struct timespec limit = {2, 0};
    /* The timer fires every 30 ms, through two levels. */
    int result;
    do
        result = ppoll(&one, 1, &limit, NULL);
    while (result == -1 && errno == EINTR && stopping());
    CHECK(result == 1, "the nested epoll never fires: %s", strerror(errno));
    CHECK(fires(outer, mix(4)), "the outer epoll does not see the inner one");
    CHECK(fires(inner, 0x1111222233334444), "the timer is no longer watched");
    CHECK(read(timer, &expirations, 8) == 8, "the timer has not expired");
    CHECK(!fires(outer, mix(5)), "the idle eventfd fires");

    CHECK(write(pipe_ends[1], "x", 1) == 1 && fires(inner, mix(3)), "the one-shot watch does not fire");
    CHECK(!fires(inner, mix(3)), "the one-shot watch fires twice");
    char byte;
    CHECK(read(pipe_ends[0], &byte, 1) == 1 && byte == 'x', "the watched pipe");
    struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = mix(3)};
    CHECK(!epoll_ctl(inner, EPOLL_CTL_MOD, pipe_ends[0], &again), "arming again: %s", strerror(errno));

    uint64_t more = 1;
    CHECK(write(edge, &more, 8) == 8 && fires(outer, mix(6)), "the edge-triggered watch does not fire");
}

static void check_signalfd(unsigned round)
{
    struct signalfd_siginfo info;
    union sigval value = {.sival_int = (int)round};
    CHECK(!sigqueue(getpid(), SIGRTMIN + 1, value) && fires(inner, mix(2)), "signalfd does not fire");
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == (unsigned)SIGRTMIN + 1 && info.ssi_int == (int)round,
          "signalfd: signal %u with %d", info.ssi_signo, info.ssi_int);
}

static bool reported(int watch, uint32_t mask, const char *name)
{
    char buffer[4096] __attribute__((aligned(8)));
    ssize_t got = read(watcher, buffer, sizeof buffer);
    for (ssize_t at = 0; at < got;) {
        struct inotify_event *event = (void *)(buffer + at);
        if (event->wd == watch && (event->mask & mask) && (!name || (event->len && !strcmp(event->name, name))))
            return true;
        at += sizeof *event + event->len;
    }
    return false;
}

static void check_inotify(void)
{
    int fd = open(in_dir("born"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    close(fd);
    CHECK(fd >= 0 && reported(watch_one, IN_CREATE, "born"), "inotify: no event of the directory");
    unlink(in_dir("born"));
    CHECK(reported(watch_one, IN_DELETE, "born"), "inotify: no event of a deletion");
    fd = open(in_dir("watched"), O_WRONLY | O_APPEND | O_CLOEXEC);
    CHECK(fd >= 0 && write(fd, "x", 1) == 1 && reported(watch_two, IN_MODIFY, NULL), "inotify: no event of the file");
    close(fd);
    int next = inotify_add_watch(watcher, "/proc", IN_CREATE);
    static int last;
    CHECK(next > watch_two && next > last, "inotify: watch descriptor %d is not new", next);
    last = next;
    inotify_rm_watch(watcher, next);
    char drained[4096];
    while (read(watcher, drained, sizeof drained) > 0)
        ;
}

void victim_events(void)
{
    open_all();
    ready();
    for (unsigned round = 0; beat(); round++) {
        check_eventfds(round);
        check_epoll();
        check_signalfd(round);
        if (round % 4 == 0)
            check_inotify();
    }
}
