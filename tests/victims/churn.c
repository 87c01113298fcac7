/* churn: mappings are made, moved, shrunk, thrown away, protected and filled again without end: the trackers' blind spots. Pages that were
 * dropped must read as zeros, all others as last written, wherever they moved to. */
#include "victim.h"
#include <sys/mman.h>

#define SLOTS 24
#define MOST 64
static struct slot {
    char *start;
    unsigned pages;
    uint32_t versions[MOST]; /* 0: never written or dropped, reads as zeros */
    uint64_t keys[MOST];
} slots[SLOTS];
static uint64_t random_state = 1, next_key = 1;

static uint64_t roll(uint64_t below)
{
    return (random_state = mix(random_state)) % below;
}

static void check_page(struct slot *slot, unsigned i)
{
    char *page = slot->start + i * PAGE;
    static const char zeros[PAGE];
    if (slot->versions[i] == 0)
        CHECK(!memcmp(page, zeros, PAGE), "page %p (slot %ld) should be zero", (void *)page, slot - slots);
    else
        CHECK(page_is(page, slot->keys[i], slot->versions[i]), "page %p (slot %ld): version %lu instead of %u", (void *)page, slot - slots,
              ((unsigned long *)page)[1], slot->versions[i]);
}

static void check_slot(struct slot *slot)
{
    for (unsigned i = 0; slot->start && i < slot->pages; i++)
        check_page(slot, i);
}

static void write_page(struct slot *slot, unsigned i)
{
    if (slot->versions[i] == 0)
        slot->keys[i] = next_key++;
    page_fill(slot->start + i * PAGE, slot->keys[i], ++slot->versions[i]);
}

static void make(struct slot *slot)
{
    slot->pages = 1 + roll(MOST);
    slot->start = mmap(NULL, slot->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (slot->start == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    memset(slot->versions, 0, sizeof slot->versions);
    for (unsigned i = 0; i < slot->pages; i++)
        if (roll(2))
            write_page(slot, i);
}

static void drop(struct slot *slot)
{
    unsigned first = roll(slot->pages), run = 1 + roll(slot->pages - first);
    CHECK_EQUAL(madvise(slot->start + first * PAGE, run * PAGE, MADV_DONTNEED), 0, "madvise");
    memset(slot->versions + first, 0, run * sizeof *slot->versions);
}

/* Moves, page by page, what is still at the old place. */
static char *move_rest(struct slot *slot, char *room)
{
    for (unsigned i = 0; i < slot->pages; i++) {
        char *from = slot->start + i * PAGE, *to = room + i * PAGE;
        unsigned char present;
        if (mincore(from, PAGE, &present) == 0 && mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
            return MAP_FAILED;
    }
    return room;
}

static void move(struct slot *slot)
{
    char *room = mmap(NULL, slot->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *to = mremap(slot->start, slot->pages * PAGE, slot->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    /* What was one mapping can be two after a move, where it had grown over the place of others. Both move as one unless a userfaultfd
     * watches either; then the kernel says EFAULT, perhaps with the first of them moved already. */
    if (to == MAP_FAILED && errno == EFAULT)
        to = move_rest(slot, room);
    CHECK(to == room, "mremap: %s", strerror(errno));
    if (to != MAP_FAILED)
        slot->start = to;
}

static void resize(struct slot *slot)
{
    unsigned pages = 1 + roll(MOST);
    char *to = mremap(slot->start, slot->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
    /* Growing over a boundary between tracked and untracked memory is EINVAL while a tracker is at work; a program may try again. */
    if (to == MAP_FAILED)
        return;
    for (unsigned i = slot->pages; i < pages; i++)
        slot->versions[i] = 0;
    slot->start = to;
    slot->pages = pages;
}

static void protect(struct slot *slot)
{
    unsigned first = roll(slot->pages);
    size_t size = (slot->pages - first) * PAGE;
    CHECK_EQUAL(mprotect(slot->start + first * PAGE, size, PROT_READ), 0, "mprotect");
    for (unsigned i = first; i < slot->pages; i++)
        check_page(slot, i);
    CHECK_EQUAL(mprotect(slot->start + first * PAGE, size, PROT_READ | PROT_WRITE), 0, "mprotect");
}

static void step(void)
{
    struct slot *slot = &slots[roll(SLOTS)];
    if (!slot->start) {
        make(slot);
        return;
    }
    switch (roll(8)) {
    case 0:
        check_slot(slot);
        munmap(slot->start, slot->pages * PAGE);
        slot->start = NULL;
        break;
    case 1:
        move(slot);
        break;
    case 2:
        resize(slot);
        break;
    case 3:
        drop(slot);
        break;
    case 4:
        protect(slot);
        break;
    default:
        for (unsigned n = 0; n < 8; n++)
            write_page(slot, roll(slot->pages));
    }
}

void victim_churn(void)
{
    for (unsigned i = 0; i < SLOTS; i++)
        make(&slots[i]);
    ready();
    while (beat()) {
        for (unsigned i = 0; i < 100; i++)
            step();
        check_slot(&slots[roll(SLOTS)]);
    }
    for (unsigned i = 0; i < SLOTS; i++)
        check_slot(&slots[i]);
}
