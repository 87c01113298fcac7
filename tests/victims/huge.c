/* huge MIB: transparent huge pages come back at the destination, whatever happened to them on the way. */
#include "victim.h"
#include <sys/mman.h>

#define HUGE (2 * MIB)

static long huge_kib(void)
{
    char rollup[8192];
    slurp("/proc/self/smaps_rollup", rollup, sizeof rollup);
    char *line = strstr(rollup, "AnonHugePages:");
    return line ? atol(line + 14) : 0;
}

void victim_huge(void)
{
    size_t size = argument(0, 32) * MIB;
    char *memory = NEED(mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memory = (char *)(((uintptr_t)memory + HUGE - 1) & ~(HUGE - 1));
    if (madvise(memory, size, MADV_HUGEPAGE))
        not_here("no transparent huge pages");
    uint32_t *versions = calloc(size / PAGE, sizeof *versions);
    for (size_t i = 0; i < size / PAGE; i++)
        page_fill(memory + i * PAGE, i, 0);
    long before = huge_kib();
    if (before < (long)(size / 1024) / 2)
        not_here("the kernel gives no transparent huge pages now");
    say("huge at first: %ld KiB", before);
    uint64_t random = 1;
    ready();
    while (beat())
        for (unsigned n = 0; n < 16; n++) {
            size_t i = (random = mix(random)) % (size / PAGE);
            CHECK(page_is(memory + i * PAGE, i, versions[i]), "page %zu", i);
            if (n < 2)
                page_fill(memory + i * PAGE, i, ++versions[i]);
        }
    for (size_t i = 0; i < size / PAGE; i++)
        CHECK(page_is(memory + i * PAGE, i, versions[i]), "page %zu", i);
    /* Pages that came one by one are collapsed again in the background. */
    for (int i = 0; i < 40 && huge_kib() < before / 10 * 9; i++)
        usleep(50000);
    say("huge at the end: %ld KiB", huge_kib());
    CHECK(huge_kib() >= before / 10 * 9, "%ld KiB in huge pages instead of %ld", huge_kib(), before);
}
