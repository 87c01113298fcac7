/* kernelwrites: memory that the program never writes itself: the kernel does, in read, recv, getdents-like calls, and another thread's
 * process_vm_writev. Trackers must see these writes, and fault handlers serve them. */
#include "victim.h"
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PAGES 1024
static char *memory;
static uint32_t versions[PAGES];
static int pipe_ends[2], pair[2];

static bool fill_by_kernel(unsigned i, uint64_t kind)
{
    char source[PAGE], *target = memory + i * PAGE;
    page_fill(source, i, versions[i] + 1);
    struct iovec from = {source, PAGE}, to = {target, PAGE};
    switch (kind) {
    case 0:
        return write(pipe_ends[1], source, PAGE) == PAGE && read(pipe_ends[0], target, PAGE) == PAGE;
    case 1:
        return send(pair[1], source, PAGE, 0) == PAGE && recv(pair[0], target, PAGE, 0) == PAGE;
    case 2:
        return process_vm_writev(getpid(), &from, 1, &to, 1, 0) == PAGE;
    default: /* the other direction: the kernel reads memory that may not be there yet */
        return write(pipe_ends[1], target, PAGE) == PAGE && read(pipe_ends[0], target, PAGE) == PAGE &&
               process_vm_readv(getpid(), &from, 0, &to, 0, 0) == 0 && write(pipe_ends[1], source, PAGE) == PAGE &&
               readv(pipe_ends[0], &to, 1) == PAGE;
    }
}

void victim_kernelwrites(void)
{
    NEED(pipe(pipe_ends));
    NEED(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    memory = aligned_alloc(PAGE, PAGES * PAGE);
    if (!memory)
        die("no memory");
    for (unsigned i = 0; i < PAGES; i++)
        page_fill(memory + i * PAGE, i, 0);
    uint64_t random = 1;
    ready();
    while (beat())
        for (unsigned n = 0; n < 32; n++) {
            random = mix(random);
            unsigned i = random % PAGES;
            CHECK(page_is(memory + i * PAGE, i, versions[i]), "page %u before", i);
            CHECK(fill_by_kernel(i, random >> 40 & 3), "way %lu: %s", random >> 40 & 3, strerror(errno));
            versions[i]++;
            CHECK(page_is(memory + i * PAGE, i, versions[i]), "page %u after", i);
        }
    for (unsigned i = 0; i < PAGES; i++)
        CHECK(page_is(memory + i * PAGE, i, versions[i]), "page %u at the end", i);
}
