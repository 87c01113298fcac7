/* forker MIB: once told to go, forks children that check all of the memory, while the parent unmaps, moves and drops parts of it: what
 * may happen while the destination still fetches pages. */
#include "victim.h"
#include <sys/mman.h>
#include <sys/wait.h>

static char *memory;
static size_t pages;

static void check_all(const char *who)
{
    for (size_t i = 0; i < pages; i++)
        if (!page_is(memory + i * PAGE, i, 3)) {
            wrong("%s: page %zu", who, i);
            return;
        }
}

static void fork_and_check(void)
{
    pid_t child = fork();
    if (child == 0) {
        static const char zeros[PAGE];
        for (size_t i = 0; i < pages; i++)
            if (!page_is(memory + i * PAGE, i, 3))
                _exit(memcmp(memory + i * PAGE, zeros, PAGE) ? 3 : 4);
        _exit(0);
    }
    int status = -1;
    pid_t ended;
    do
        ended = waitpid(child, &status, 0);
    while (ended == -1 && errno == EINTR);
    CHECK(child > 0 && ended == child && status == 0, "the child's status is %x (%s)", status,
          WEXITSTATUS(status) == 4 ? "it read zeros" : "a wrong page");
}

static void move_block(char *block, size_t size)
{
    char *room = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *to = mremap(block, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    CHECK(to == room, "mremap: %s", strerror(errno));
    if (to == room)
        for (size_t i = 0; i < size / PAGE; i++)
            if (!page_is(to + i * PAGE, pages + i, 3)) {
                wrong("moved page %zu", i);
                break;
            }
}

static void drop_block(char *block, size_t size)
{
    static const char zeros[PAGE];
    CHECK_EQUAL(madvise(block, size, MADV_DONTNEED), 0, "madvise");
    for (size_t i = 0; i < size; i += PAGE)
        if (memcmp(block + i, zeros, PAGE)) {
            wrong("dropped page %zu is not zero", i / PAGE);
            break;
        }
}

void victim_forker(void)
{
    size_t size = argument(0, 32) * MIB, block = size / 4;
    pages = size / PAGE;
    memory = NEED(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < pages; i++)
        page_fill(memory + i * PAGE, i, 3);
    char *blocks[3];
    for (int n = 0; n < 3; n++) {
        blocks[n] = NEED(mmap(NULL, block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        for (size_t i = 0; i < block / PAGE; i++)
            page_fill(blocks[n] + i * PAGE, pages + i, 3);
    }
    bool gone = false;
    ready();
    while (beat()) {
        checked();
        if (!told_to_go())
            continue;
        if (!gone) {
            gone = true;
            fork_and_check();
            drop_block(blocks[0], block);
            move_block(blocks[1], block);
            CHECK_EQUAL(munmap(blocks[2], block), 0, "munmap");
        }
        fork_and_check();
        check_all("parent");
    }
}
