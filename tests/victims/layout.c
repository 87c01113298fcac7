/* layout: the shape of the address space. Grow-down stacks, guard pages, locked memory, advice, PROT_NONE memory with content, the heap,
 * moved mappings: each keeps its place, its rights, its flags and its bytes. */
#include "victim.h"
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define SIZE (16 * PAGE)
static struct region {
    const char *name;
    char *start;
    size_t size;
    int protection;
    char flags[256];
} regions[16];
static unsigned count;
static char *grows_down;
static size_t grown;
static sigjmp_buf back;

static struct region *add(const char *name, void *start, size_t size, int protection)
{
    regions[count] = (struct region){.name = name, .start = start, .size = size, .protection = protection};
    return &regions[count++];
}

static char *anonymous(size_t size)
{
    char *start = NEED(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    return start;
}

static void fill(char *start, size_t size)
{
    for (size_t i = 0; i < size; i += PAGE)
        page_fill(start + i, (uintptr_t)(start + i), 7);
}

static void check_content(const char *name, char *start, size_t size)
{
    for (size_t i = 0; i < size; i += PAGE)
        CHECK(page_is(start + i, (uintptr_t)(start + i), 7), "%s: page %zu", name, i / PAGE);
}

/* The flags that a program chooses; others tell of trackers and accounting. */
static void chosen_flags(const char *line, char *flags)
{
    static const char *const chosen[] = {"rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "lo", "lf", "sr", "rr",
                                         "dc", "de", "nr", "wf", "dd", "hg", "nh", "mg"};
    flags[0] = 0;
    for (unsigned i = 0; i < COUNT(chosen); i++)
        if (strstr(line, chosen[i]) && !(i == 15))
            strcat(strcat(flags, chosen[i]), " ");
}

/* Finds, in smaps, rights and flags of the mapping around an address. */
static bool look_up(const void *address, char *flags)
{
    static char smaps[1 << 20];
    slurp("/proc/self/smaps", smaps, sizeof smaps);
    bool inside = false;
    for (char *save, *line = strtok_r(smaps, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            inside = start <= (uintptr_t)address && (uintptr_t)address < end;
        else if (inside && !strncmp(line, "VmFlags:", 8)) {
            chosen_flags(line + 8, flags);
            return true;
        }
    }
    return false;
}

static void check_flags(void)
{
    char flags[256];
    for (unsigned i = 0; i < count; i++)
        for (size_t at = 0; at < regions[i].size; at += regions[i].size - 1) {
            bool there = look_up(regions[i].start + at, flags);
            CHECK(there && !strcmp(flags, regions[i].flags), "%s at %p: flags `%s` instead of `%s`", regions[i].name,
                  (void *)(regions[i].start + at), there ? flags : "nothing there", regions[i].flags);
        }
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    siglongjmp(back, 1);
}

static bool faults(volatile char *address, bool on_write)
{
    if (sigsetjmp(back, 1))
        return true;
    if (on_write)
        *address = 1;
    else
        (void)*address;
    return false;
}

static void grow(void)
{
    /* A page further down each time; the kernel moves the mapping's start. */
    if (grown >= 64 * PAGE)
        return;
    grown += PAGE;
    page_fill(grows_down - grown, (uintptr_t)(grows_down - grown), 7);
}

static void make_regions(void)
{
    char *block = anonymous(SIZE * 3);
    fill(block + SIZE, SIZE);
    NEED(mprotect(block, SIZE, PROT_NONE));
    NEED(mprotect(block + SIZE * 2, SIZE, PROT_NONE));
    add("low guard", block, SIZE, PROT_NONE);
    add("between guards", block + SIZE, SIZE, PROT_READ | PROT_WRITE);
    add("high guard", block + SIZE * 2, SIZE, PROT_NONE);

    char *hidden = anonymous(SIZE);
    fill(hidden, SIZE);
    NEED(mprotect(hidden, SIZE, PROT_NONE));
    add("hidden content", hidden, SIZE, PROT_NONE);

    char *constant = anonymous(SIZE);
    fill(constant, SIZE);
    NEED(mprotect(constant, SIZE, PROT_READ));
    add("read-only content", constant, SIZE, PROT_READ);

    static const struct {
        const char *name;
        int advice;
    } advised[] = {{"don't fork", MADV_DONTFORK}, {"don't dump", MADV_DONTDUMP}, {"wipe on fork", MADV_WIPEONFORK},
                   {"no huge pages", MADV_NOHUGEPAGE}, {"random", MADV_RANDOM}, {"sequential", MADV_SEQUENTIAL}, {"mergeable", MADV_MERGEABLE}};
    for (unsigned i = 0; i < COUNT(advised); i++) {
        char *start = anonymous(SIZE);
        fill(start, SIZE);
        if (madvise(start, SIZE, advised[i].advice) == 0)
            add(advised[i].name, start, SIZE, PROT_READ | PROT_WRITE);
        else
            say("madvise for %s: %s", advised[i].name, strerror(errno));
    }
    char *locked = anonymous(SIZE);
    fill(locked, SIZE);
    NEED(mlock(locked, SIZE));
    add("locked", locked, SIZE, PROT_READ | PROT_WRITE);
    char *on_fault_locked = anonymous(SIZE);
    fill(on_fault_locked, SIZE / 2);
    NEED(mlock2(on_fault_locked, SIZE, MLOCK_ONFAULT));
    add("locked on fault", on_fault_locked, SIZE / 2, PROT_READ | PROT_WRITE);

    char *moved = anonymous(SIZE), *to = anonymous(SIZE * 4);
    fill(moved, SIZE);
    moved = NEED(mremap(moved, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to + SIZE));
    fill(moved, SIZE);
    add("moved", moved, SIZE, PROT_READ | PROT_WRITE);

    grows_down = (char *)NEED(mmap(NULL, 512 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) + 512 * PAGE;
    NEED(munmap(grows_down - 512 * PAGE, 512 * PAGE));
    NEED(mmap(grows_down - PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0));
    grow();
    add("grows down", grows_down - PAGE, PAGE, PROT_READ | PROT_WRITE);
    for (unsigned i = 0; i < count; i++)
        if (!look_up(regions[i].start, regions[i].flags))
            die("%s is not in smaps", regions[i].name);
}

void victim_layout(void)
{
    make_regions();
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    NEED(sigaction(SIGSEGV, &action, NULL));
    char *heap = sbrk(0), *heap_end;
    NEED(sbrk(64 * PAGE));
    heap = (char *)(((uintptr_t)heap + PAGE - 1) & ~(PAGE - 1));
    fill(heap, 32 * PAGE);
    heap_end = sbrk(0);
    char name[64] = "victim memory";
    int named = prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, regions[1].start, SIZE, name);
    say("anonymous names: %d", named);
    ready();
    for (unsigned i = 0; beat(); i++) {
        struct region *region = &regions[i % count];
        bool readable = region->protection & PROT_READ, writable = region->protection & PROT_WRITE;
        CHECK(faults(region->start, false) == !readable, "%s: reading", region->name);
        if (!writable)
            CHECK(faults(region->start, true), "%s: can be written", region->name);
        if (!strcmp(region->name, "hidden content")) {
            mprotect(region->start, SIZE, PROT_READ);
            check_content(region->name, region->start, SIZE);
            mprotect(region->start, SIZE, PROT_NONE);
        } else if (readable) {
            check_content(region->name, region->start, region->size);
        }
        check_content("heap", heap, 32 * PAGE);
        CHECK(sbrk(0) == heap_end, "the heap ends at %p instead of %p", sbrk(0), (void *)heap_end);
        check_content("grown", grows_down - grown, grown);
        if (i % 10 == 0) {
            if (told_to_go())
                check_flags();
            grow();
            CHECK(sbrk(PAGE) == heap_end, "growing the heap");
            heap_end += PAGE;
        }
    }
    check_flags();
    NEED(brk(heap + 32 * PAGE));
}
