/* robust: robust futexes, the address cleared at a thread's end, and restartable sequences stay registered for every thread. */
#include "victim.h"
#include <linux/futex.h>
#include <linux/rseq.h>
#include <sched.h>
#include <sys/rseq.h>
#include <sys/syscall.h>

static pthread_mutex_t held;
static volatile bool holding;

static volatile struct rseq *own_rseq(void)
{
    return (volatile struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

struct registration {
    void *head;
    size_t size;
    volatile struct rseq *rseq;
};

static struct registration registered(void)
{
    struct registration now = {.rseq = own_rseq()};
    syscall(SYS_get_robust_list, 0, &now.head, &now.size);
    return now;
}

/* An unregistered area keeps its last value; moving between CPUs unmasks it. */
static void check_rseq(const char *who, bool wander)
{
    cpu_set_t all, one;
    sched_getaffinity(0, sizeof all, &all);
    for (int cpu = 0; cpu < 64; cpu++) {
        if (!CPU_ISSET(cpu, &all))
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (wander && sched_setaffinity(0, sizeof one, &one))
            continue;
        bool equal = false;
        unsigned now = 0;
        for (int tries = 0; tries < 100 && !equal; tries++) {
            syscall(SYS_getcpu, &now, NULL, NULL);
            equal = own_rseq()->cpu_id == now && own_rseq()->cpu_id_start == now;
        }
        CHECK(equal, "%s: rseq says CPU %d, getcpu %u", who, (int)own_rseq()->cpu_id, now);
        if (!wander)
            break;
    }
    if (wander)
        sched_setaffinity(0, sizeof all, &all);
}

static void check_registration(const char *who, struct registration before)
{
    struct registration now = registered();
    CHECK(now.head == before.head && now.size == before.size, "%s: robust list %p %zu instead of %p %zu", who, now.head, now.size,
          before.head, before.size);
    /* Registering once more where it is registered already: EBUSY. Elsewhere it would be EINVAL. */
    long result = syscall(SYS_rseq, own_rseq(), 32, 0, RSEQ_SIG);
    CHECK(result == -1 && errno == EBUSY, "%s: rseq is not registered: %ld %s", who, result, strerror(errno));
}

static void *hold_to_the_end(void *argument)
{
    struct registration before = registered();
    pthread_mutex_lock(&held);
    holding = true;
    while (!stopping()) {
        check_registration("holder", before);
        check_rseq("holder", false);
        usleep(10000);
    }
    return (void *)0x1234;
}

static void *die_with_lock(void *argument)
{
    pthread_mutex_lock(argument);
    return NULL;
}

static void expect_dead_owner(pthread_mutex_t *mutex, const char *who)
{
    struct timespec until = {.tv_sec = time(NULL) + 5};
    int error = pthread_mutex_timedlock(mutex, &until);
    CHECK(error == EOWNERDEAD, "%s: %s instead of a dead owner", who, strerror(error));
    if (error == EOWNERDEAD)
        pthread_mutex_consistent(mutex);
    if (error == EOWNERDEAD || error == 0)
        pthread_mutex_unlock(mutex);
}

void victim_robust(void)
{
    static pthread_mutex_t passing;
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&held, &attributes);
    pthread_mutex_init(&passing, &attributes);
    if (__rseq_size == 0)
        not_here("the C library has not registered restartable sequences");
    pthread_t holder = start_thread(hold_to_the_end, NULL);
    while (!holding)
        usleep(1000);
    struct registration before = registered();
    ready();
    for (int i = 0; beat(); i++) {
        check_registration("main", before);
        if (i % 10 == 0)
            check_rseq("main", true);
        CHECK(pthread_mutex_trylock(&held) == EBUSY, "the held mutex is free");
        if (i % 20 == 0) {
            pthread_join(start_thread(die_with_lock, &passing), NULL);
            expect_dead_owner(&passing, "a thread born here");
        }
    }
    /* The kernel clears the thread's tid at its end and wakes pthread_join: were the address lost, this would hang. */
    void *result = NULL;
    pthread_join(holder, &result);
    CHECK(result == (void *)0x1234, "result of a joined thread");
    expect_dead_owner(&held, "the thread that was moved");
}
