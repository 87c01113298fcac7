/* clocks: clock_gettime through the vdso works and never goes back, on any thread; the distances between clocks stay. */
#include "victim.h"
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/time.h>

#define SLACK_NS (20 * 1000000LL)
static _Atomic int64_t latest_monotonic, latest_boottime;
static int64_t boot_minus_monotonic, real_minus_monotonic;

static void later(const char *name, _Atomic int64_t *latest, clockid_t clock)
{
    /* The value seen by anybody before this reading began must not be later than the reading. */
    int64_t before = *latest, now = now_ns(clock);
    CHECK(now >= before, "%s went back by %ld us", name, (long)((before - now) / 1000));
    while (now > before && !__atomic_compare_exchange_n(latest, &before, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
}

static int64_t by_system_call(clockid_t clock)
{
    struct timespec now;
    syscall(SYS_clock_gettime, clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void *watch(void *argument)
{
    while (!stopping()) {
        for (int i = 0; i < 500; i++) {
            later("CLOCK_MONOTONIC", &latest_monotonic, CLOCK_MONOTONIC);
            later("CLOCK_BOOTTIME", &latest_boottime, CLOCK_BOOTTIME);
        }
        usleep(1000);
    }
    return NULL;
}

static int64_t distance(clockid_t one, clockid_t two)
{
    /* The smallest of a few: a preemption between the readings only makes it larger. */
    int64_t least = INT64_MAX;
    for (int i = 0; i < 5; i++) {
        int64_t first = now_ns(two), second = now_ns(one);
        if (second - first < least)
            least = second - first;
    }
    return least;
}

void victim_clocks(void)
{
    for (int i = 0; i < 3; i++)
        start_thread(watch, NULL);
    boot_minus_monotonic = distance(CLOCK_BOOTTIME, CLOCK_MONOTONIC);
    real_minus_monotonic = distance(CLOCK_REALTIME, CLOCK_MONOTONIC);
    unsigned long vdso = getauxval(AT_SYSINFO_EHDR);
    ready();
    while (beat()) {
        CHECK(llabs(distance(CLOCK_BOOTTIME, CLOCK_MONOTONIC) - boot_minus_monotonic) < SLACK_NS, "BOOTTIME - MONOTONIC changed by %ld us",
              (long)(distance(CLOCK_BOOTTIME, CLOCK_MONOTONIC) - boot_minus_monotonic) / 1000);
        CHECK(llabs(distance(CLOCK_REALTIME, CLOCK_MONOTONIC) - real_minus_monotonic) < SLACK_NS, "REALTIME - MONOTONIC changed by %ld us",
              (long)(distance(CLOCK_REALTIME, CLOCK_MONOTONIC) - real_minus_monotonic) / 1000);
        for (clockid_t clock = CLOCK_REALTIME; clock <= CLOCK_MONOTONIC; clock++) {
            int64_t first = by_system_call(clock), second = now_ns(clock), third = by_system_call(clock);
            CHECK(first <= second && second <= third, "clock %d: vdso %ld is not between system calls %ld and %ld", clock, second, first, third);
        }
        later("CLOCK_MONOTONIC", &latest_monotonic, CLOCK_MONOTONIC);
        unsigned cpu, node;
        CHECK(getcpu(&cpu, &node) == 0, "getcpu");
        struct timeval day;
        CHECK(gettimeofday(&day, NULL) == 0 && llabs(day.tv_sec - now_ns(CLOCK_REALTIME) / 1000000000) <= 1, "gettimeofday");
        CHECK(getauxval(AT_SYSINFO_EHDR) == vdso && !memcmp((void *)vdso, "\177ELF", 4), "the vdso's image");
    }
}
