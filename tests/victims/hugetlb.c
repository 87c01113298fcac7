/* hugetlb: memory from the reserved pool of huge pages, private and shared. The pool must have 8 free pages on each host. */
#include "victim.h"
#include <sys/mman.h>

#define HUGE (2 * MIB)

void victim_hugetlb(void)
{
    char *views[2];
    uint32_t versions[2][2 * HUGE / PAGE] = {0};
    for (int i = 0; i < 2; i++) {
        views[i] = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, (i ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
        if (views[i] == MAP_FAILED)
            not_here("no huge pages in the pool");
        for (size_t n = 0; n < 2 * HUGE / PAGE; n++)
            page_fill(views[i] + n * PAGE, i * 10000 + n, 0);
    }
    uint64_t random = 1;
    ready();
    while (beat())
        for (unsigned n = 0; n < 32; n++) {
            random = mix(random);
            size_t i = random >> 40 & 1, page = random % (2 * HUGE / PAGE);
            CHECK(page_is(views[i] + page * PAGE, i * 10000 + page, versions[i][page]), "page %zu of view %zu", page, i);
            page_fill(views[i] + page * PAGE, i * 10000 + page, ++versions[i][page]);
        }
}
