/* threads STANDING: threads are born and die without end beside standing ones; a move must catch them all in the act. */
#include "victim.h"
#include <sys/syscall.h>

static uint64_t shared_sum, wanted_sum;
static volatile uint64_t standing_counts[1024];

static void *brief(void *argument)
{
    uint64_t value = mix((uintptr_t)argument);
    volatile uint64_t local[64];
    for (unsigned i = 0; i < 64; i++)
        local[i] = value + i;
    for (unsigned i = 0; i < 64; i++)
        CHECK(local[i] == value + i, "stack of a brief thread");
    __atomic_fetch_add(&shared_sum, value, __ATOMIC_SEQ_CST);
    return (void *)value;
}

static void *breed(void *argument)
{
    for (uint64_t i = 0; !stopping(); i++) {
        pthread_t ids[8];
        for (uint64_t n = 0; n < 8; n++)
            ids[n] = start_thread(brief, (void *)(i * 8 + n));
        for (uint64_t n = 0; n < 8; n++) {
            void *result;
            pthread_join(ids[n], &result);
            CHECK(result == (void *)mix(i * 8 + n), "result of a brief thread");
            wanted_sum += mix(i * 8 + n);
        }
        CHECK(shared_sum == wanted_sum, "sum over all threads");
    }
    return NULL;
}

static void *stand(void *argument)
{
    uint64_t number = (uintptr_t)argument;
    pid_t tid = gettid();
    while (!stopping()) {
        standing_counts[number]++;
        CHECK(syscall(SYS_gettid) == tid, "tid %ld instead of %d", syscall(SYS_gettid), tid);
        usleep(2000);
    }
    return NULL;
}

void victim_threads(void)
{
    long standing = argument(0, 32);
    if (standing > 1024)
        standing = 1024;
    pid_t pid = getpid();
    start_thread(breed, NULL);
    for (long i = 0; i < standing; i++)
        start_thread(stand, (void *)(uintptr_t)i);
    static uint64_t last[1024];
    ready();
    for (int i = 1; beat(); i++) {
        CHECK(syscall(SYS_getpid) == pid, "pid %ld instead of %d", syscall(SYS_getpid), pid);
        if (i % 100)
            continue;
        for (long n = 0; n < standing; n++) {
            CHECK(standing_counts[n] > last[n], "thread %ld stands still", n);
            last[n] = standing_counts[n];
        }
    }
}
