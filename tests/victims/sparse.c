/* sparse GIB: an address space with few pages in it. Holes must stay holes: the resident set and the page tables do not grow. */
#include "victim.h"
#include <sys/mman.h>

#define STEP (64 * MIB)

static long status_kib(const char *key)
{
    char status[8192];
    slurp("/proc/self/status", status, sizeof status);
    char *line = strstr(status, key);
    return line ? atol(line + strlen(key)) : -1;
}

void victim_sparse(void)
{
    size_t size = (size_t)argument(0, 16) << 30;
    char *memory = NEED(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    madvise(memory, size, MADV_NOHUGEPAGE);
    uint32_t *versions = calloc(size / STEP, sizeof *versions);
    for (size_t i = 0; i < size / STEP; i++)
        page_fill(memory + i * STEP, i, 0);
    long resident = status_kib("VmRSS:"), tables = status_kib("VmPTE:");
    say("resident %ld KiB, page tables %ld KiB", resident, tables);
    uint64_t random = 1;
    ready();
    for (unsigned round = 0; beat(); round++) {
        size_t i = (random = mix(random)) % (size / STEP);
        CHECK(page_is(memory + i * STEP, i, versions[i]), "page %zu", i);
        page_fill(memory + i * STEP, i, ++versions[i]);
        if (round % 20 == 0 && told_to_go())
            CHECK(status_kib("VmRSS:") < resident + 4096 && status_kib("VmPTE:") < tables + 2048, "resident %ld KiB, page tables %ld KiB",
                  status_kib("VmRSS:"), status_kib("VmPTE:"));
    }
    CHECK(status_kib("VmRSS:") < resident + 4096, "resident %ld KiB at the end", status_kib("VmRSS:"));
    unsigned char present[2];
    for (size_t i = 0; i < size / STEP; i++) {
        CHECK(page_is(memory + i * STEP, i, versions[i]), "page %zu", i);
        CHECK(!mincore(memory + i * STEP, 2 * PAGE, present) && !(present[1] & 1), "the hole behind page %zu is filled", i);
    }
}
