/* memory THREADS MIB RATE: threads rewrite and check pages whose content tells address and version.
 *
 * RATE is in MiB/s over all threads; 0 only reads, negative writes without pause. A lost write, a stale page and a page of
 * another address are all seen: versions are kept elsewhere, and their sum in the thread's own registers and stack. */
#include "victim.h"
#include <sys/mman.h>

struct share {
    unsigned number;
    char *pages;
    size_t count;
    long rate_kib; /* per millisecond-ish tick, in pages x 1024 */
};

static void check_page(struct share *share, const uint32_t *version, size_t i)
{
    char *page = share->pages + i * PAGE;
    if (!page_is(page, (uintptr_t)page, version[i]))
        wrong("thread %u page %zu at %p: holds key %lx version %lu, want version %u", share->number, i, (void *)page,
              ((unsigned long *)page)[0], ((unsigned long *)page)[1], version[i]);
}

static void *hammer(void *argument)
{
    struct share *share = argument;
    uint32_t *version = calloc(share->count, sizeof *version);
    thread_is_set_up();
    uint64_t seed = share->number, sum = 0, swept = 0;
    int64_t started = now_ns(CLOCK_MONOTONIC), written = 0;
    while (!stopping()) {
        int64_t elapsed_us = (now_ns(CLOCK_MONOTONIC) - started) / 1000;
        int64_t due = share->rate_kib < 0 ? written + 64 : elapsed_us * share->rate_kib / 4 / 1000000;
        /* After a pause the missed writes are not made up for: the rate is a rate. */
        if (share->rate_kib >= 0 && due - written > 4096)
            started += (due - written - 4096) * 4000000000LL / share->rate_kib;
        for (int n = 0; n < 64 && written < due; n++, written++) {
            size_t i = (seed = mix(seed)) % share->count;
            check_page(share, version, i);
            version[i]++;
            sum++;
            page_fill(share->pages + i * PAGE, (uintptr_t)(share->pages + i * PAGE), version[i]);
        }
        for (int n = 0; n < 64; n++)
            check_page(share, version, swept++ % share->count);
        if (written >= due)
            usleep(1000);
    }
    uint64_t total = 0;
    for (size_t i = 0; i < share->count; i++) {
        check_page(share, version, i);
        total += version[i];
    }
    CHECK(total == sum, "thread %u: its versions add up to %lu instead of %lu", share->number, total, sum);
    return NULL;
}

static struct share *shares;
static pthread_t *ids;
static long hammering;

void start_hammering(long threads, long mib, long rate)
{
    size_t count = mib * MIB / PAGE / threads;
    if (count == 0)
        die("less than a page for a thread");
    char *pages = NEED(mmap(NULL, count * threads * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < count * threads; i++)
        page_fill(pages + i * PAGE, (uintptr_t)(pages + i * PAGE), 0);
    shares = calloc(threads, sizeof *shares);
    ids = calloc(threads, sizeof *ids);
    for (long i = 0; i < threads; i++) {
        shares[i] = (struct share){i, pages + i * count * PAGE, count, rate < 0 ? -1 : rate * 1024 / threads};
        ids[i] = start_thread(hammer, &shares[i]);
    }
    wait_for_threads(threads);
    hammering = threads;
}

void end_hammering(void)
{
    for (long i = 0; i < hammering; i++)
        pthread_join(ids[i], NULL);
}

void victim_memory(void)
{
    start_hammering(argument(0, 4), argument(1, 16), argument(2, 20));
    ready();
    while (beat())
        ;
    end_hammering();
}
