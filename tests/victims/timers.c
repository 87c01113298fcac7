/* timers: interval timers, POSIX timers whose ids have gaps, timerfds: they expire as often as time passes, and their far ends stay. */
#include "victim.h"
#include <signal.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>

#define TICK_MS 50
#define FAR_S 3600
/* A timer's far end is a remaining time plus a clock, read one after another, and moves by the length of a freeze at most. */
#define SLACK_NS (500 * 1000000LL)

/* The kernel's own ids, which the C library hides. */
static int kept[] = {2, 4, 5}, ids[6];
static volatile sig_atomic_t alarms, posix_ticks[6];
static int64_t far_end, started;

static void on_alarm(int signal)
{
    alarms++;
}

static void on_posix(int signal, siginfo_t *info, void *context)
{
    int number = info->si_value.sival_int;
    if (number >= 0 && number < 6)
        posix_ticks[number] += 1 + info->si_overrun;
}

static void make_posix_timers(void)
{
    for (int i = 0; i < 6; i++) {
        struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = i};
        NEED(syscall(SYS_timer_create, i == 4 ? CLOCK_BOOTTIME : CLOCK_MONOTONIC, &event, &ids[i]));
    }
    for (int i = 0; i < 6; i++) {
        bool keep = false;
        for (unsigned n = 0; n < COUNT(kept); n++)
            keep |= kept[n] == i;
        if (!keep)
            NEED(syscall(SYS_timer_delete, ids[i]));
    }
    struct itimerspec tick = {{0, TICK_MS * 1000000}, {0, TICK_MS * 1000000}}, far = {.it_value.tv_sec = FAR_S};
    NEED(syscall(SYS_timer_settime, ids[2], 0, &tick, NULL));
    NEED(syscall(SYS_timer_settime, ids[4], 0, &tick, NULL));
    NEED(syscall(SYS_timer_settime, ids[5], 0, &far, NULL));
    far_end = now_ns(CLOCK_MONOTONIC) + FAR_S * 1000000000LL;
}

static void check_end(const char *what, int64_t remaining)
{
    int64_t end = now_ns(CLOCK_MONOTONIC) + remaining;
    CHECK(llabs(end - far_end) < SLACK_NS, "%s ends %ld ms too late", what, (long)((end - far_end) / 1000000));
}

static void check_posix_timers(void)
{
    struct itimerspec now;
    for (int i = 0; i < 6; i++) {
        bool there = !syscall(SYS_timer_gettime, ids[i], &now), wanted = i == 2 || i == 4 || i == 5;
        CHECK(there == wanted, "POSIX timer with id %d: there %d", ids[i], there);
    }
    syscall(SYS_timer_gettime, ids[5], &now);
    check_end("POSIX timer", now.it_value.tv_sec * 1000000000LL + now.it_value.tv_nsec);
    syscall(SYS_timer_gettime, ids[2], &now);
    CHECK(now.it_interval.tv_nsec == TICK_MS * 1000000 && now.it_value.tv_sec == 0, "interval of the ticking POSIX timer");
}

/* Ticks must neither be lost nor made up, but for those that one freeze can swallow. */
static void check_ticks(const char *what, long ticks)
{
    long due = (now_ns(CLOCK_MONOTONIC) - started) / 1000000 / TICK_MS;
    CHECK(labs(ticks - due) <= 12, "%s: %ld ticks instead of %ld", what, ticks, due);
}

void victim_timers(void)
{
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    NEED(sigaction(SIGALRM, &action, NULL));
    NEED(sigaction(SIGVTALRM, &action, NULL));
    action = (struct sigaction){.sa_sigaction = on_posix, .sa_flags = SA_SIGINFO | SA_RESTART};
    NEED(sigaction(SIGRTMIN + 3, &action, NULL));
    make_posix_timers();
    started = now_ns(CLOCK_MONOTONIC);
    struct itimerval tick = {{0, TICK_MS * 1000}, {0, TICK_MS * 1000}}, far = {{0, 0}, {FAR_S, 0}};
    NEED(setitimer(ITIMER_REAL, &tick, NULL));
    NEED(setitimer(ITIMER_VIRTUAL, &far, NULL));

    int ticking = NEED(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)), far_fd = NEED(timerfd_create(CLOCK_BOOTTIME, 0));
    int wall = NEED(timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK)), unread = NEED(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    struct itimerspec tick_fd = {{0, TICK_MS * 1000000}, {0, TICK_MS * 1000000}}, far_spec = {.it_value.tv_sec = FAR_S};
    NEED(timerfd_settime(ticking, 0, &tick_fd, NULL));
    NEED(timerfd_settime(far_fd, 0, &far_spec, NULL));
    NEED(timerfd_settime(unread, 0, &tick_fd, NULL));
    struct itimerspec absolute = {.it_value.tv_sec = time(NULL) + FAR_S};
    NEED(timerfd_settime(wall, TFD_TIMER_ABSTIME, &absolute, NULL));
    long fd_ticks = 0;
    ready();
    while (beat()) {
        struct itimerspec spec;
        struct itimerval value;
        uint64_t expirations = 0;
        check_posix_timers();
        check_ticks("ITIMER_REAL", alarms);
        check_ticks("POSIX timer 2", posix_ticks[2]);
        check_ticks("POSIX timer 4", posix_ticks[4]);
        getitimer(ITIMER_REAL, &value);
        /* No time is left while the signal is on its way, so what is left is not looked at. */
        CHECK(value.it_interval.tv_usec == TICK_MS * 1000, "ITIMER_REAL is off");
        getitimer(ITIMER_VIRTUAL, &value);
        CHECK(value.it_value.tv_sec > FAR_S - 600 && value.it_value.tv_sec <= FAR_S, "ITIMER_VIRTUAL: %ld s", value.it_value.tv_sec);
        if (read(ticking, &expirations, 8) == 8)
            fd_ticks += expirations;
        check_ticks("timerfd", fd_ticks);
        timerfd_gettime(far_fd, &spec);
        check_end("timerfd", spec.it_value.tv_sec * 1000000000LL + spec.it_value.tv_nsec);
        timerfd_gettime(wall, &spec);
        int64_t left = absolute.it_value.tv_sec * 1000000000LL - now_ns(CLOCK_REALTIME);
        CHECK(llabs(left - (spec.it_value.tv_sec * 1000000000LL + spec.it_value.tv_nsec)) < SLACK_NS, "absolute timerfd");
    }
    /* Expirations that nobody fetched are still there. */
    uint64_t all = 0;
    CHECK(read(unread, &all, 8) == 8, "no expirations on the unread timerfd");
    check_ticks("unread timerfd", all);
}
