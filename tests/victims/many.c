/* many WHAT: a lot of one thing. descriptors: more than fit into one message; mappings: thousands; everywhere: those, and others wherever a
 * kernel would put a new one; growing: more memory all the time; stack: megabytes of it; addresses: pages at places that a new process may use for itself; root: a root directory of its own; dumpable: may not be looked at by its own user. */
#include "victim.h"
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

static void descriptors(void)
{
    enum { MANY = 700 };
    static int fds[MANY];
    struct rlimit limit = {4096, 4096};
    setrlimit(RLIMIT_NOFILE, &limit);
    for (int i = 0; i < MANY; i++)
        fds[i] = i % 7 == 6 ? NEED(dup(fds[i - 1])) : NEED(eventfd(i + 1, EFD_NONBLOCK | (i % 3 ? EFD_CLOEXEC : 0)));
    ready();
    for (unsigned round = 0; beat(); round++)
        for (int n = 0; n < 50; n++) {
            int i = (round * 50 + n) % MANY, from = i % 7 == 6 ? i - 1 : i;
            uint64_t value = 0;
            CHECK(read(fds[i], &value, 8) == 8 && value == from + 1ull, "descriptor %d holds %lu", fds[i], value);
            CHECK(write(fds[from], &value, 8) == 8, "descriptor %d", fds[from]);
            CHECK(fcntl(fds[i], F_GETFD) == (i % 7 != 6 && i % 3 ? FD_CLOEXEC : 0), "flags of descriptor %d", fds[i]);
        }
}

static void mappings(void)
{
    enum { MANY = 3000 };
    char *start = NEED(mmap(NULL, 2 * MANY * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < 2 * MANY; i++)
        page_fill(start + i * PAGE, i, 1);
    for (size_t i = 0; i < MANY; i++)
        NEED(mprotect(start + 2 * i * PAGE, PAGE, PROT_READ));
    ready();
    for (size_t round = 0; beat(); round++)
        for (size_t n = 0; n < 200; n++) {
            size_t i = (round * 200 + n) % (2 * MANY);
            CHECK(page_is(start + i * PAGE, i, 1), "page %zu", i);
        }
}

/* Takes what is free in the upper part of the address space. */
static void everywhere(void)
{
    uintptr_t from = 0x7e0000000000, start, end;
    FILE *maps = fopen("/proc/self/maps", "r");
    struct { uintptr_t from, to; } gaps[200];
    unsigned found = 0;
    char line[512];
    CHECK(maps, "its mappings");
    while (fgets(line, sizeof line, maps) && found < COUNT(gaps)) {
        if (sscanf(line, "%lx-%lx", &start, &end) != 2 || end <= from)
            continue;
        bool stack = strstr(line, "[stack]");
        /* Room for the stack to grow. */
        uintptr_t to = stack ? start - (16 << 20) : start;
        if (to > from + (1 << 20)) {
            gaps[found].from = from;
            gaps[found++].to = to;
        }
        if (stack)
            break;
        from = end;
    }
    fclose(maps);
    CHECK(found, "nothing is free");
    for (unsigned i = 0; i < found; i++)
        NEED(mmap((void *)gaps[i].from, gaps[i].to - gaps[i].from, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0));
    mappings();
}

static void growing(void)
{
    enum { CHUNK = 256, MOST = 1024 };
    static char *chunks[MOST];
    ready();
    for (size_t round = 0; beat(); round++) {
        if (round < MOST) {
            chunks[round] = NEED(mmap(NULL, CHUNK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            for (size_t i = 0; i < CHUNK; i++)
                page_fill(chunks[round] + i * PAGE, i, round);
        }
        size_t n = round < MOST ? round / 2 : round % MOST;
        for (size_t i = 0; i < CHUNK; i++)
            CHECK(page_is(chunks[n] + i * PAGE, i, n), "page %zu of chunk %zu", i, n);
    }
}

/* Recursion that keeps a page in each frame, and runs its checks at the bottom of it. */
static __attribute__((noinline)) void deeper(unsigned depth)
{
    char frame[2 * PAGE];
    char *page = (char *)(((uintptr_t)frame + PAGE - 1) & ~(PAGE - 1));
    page_fill(page, depth, 5);
    if (depth == 0) {
        ready();
        while (beat())
            CHECK(page_is(page, 0, 5), "the innermost frame");
    } else {
        deeper(depth - 1);
    }
    CHECK(page_is(page, depth, 5), "frame %u", depth);
}

static void stack(void) { deeper(700); }

static void addresses(void)
{
    static const uintptr_t places[] = {0x10000, 0x400000, 0x10000000, 0x555555554000, 0x7ff000000000, 0x7ffff7ffa000, 0x7fffffffd000};
    char *got[COUNT(places)];
    for (unsigned i = 0; i < COUNT(places); i++) {
        got[i] = mmap((void *)places[i], PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (got[i] == MAP_FAILED)
            say("%lx: %s", places[i], strerror(errno));
        else
            page_fill(got[i], i, 9);
    }
    ready();
    for (unsigned round = 0; beat(); round++)
        for (unsigned i = 0; i < COUNT(places); i++)
            CHECK(got[i] == MAP_FAILED || page_is(got[i], i, 9), "the page at %lx", places[i]);
}

static void root(void)
{
    NEED(mkdir(in_dir("below"), 0755));
    NEED(chdir(in_dir("below")));
    NEED(chroot(victim_dir));
    ready();
    while (beat()) {
        char directory[64] = "";
        CHECK(access("/log", R_OK) == 0 && access("/etc", F_OK) == -1, "the root directory is another one");
        CHECK(getcwd(directory, sizeof directory) && !strcmp(directory, "/below"), "the working directory is %s", directory);
    }
}

static void dumpable(void)
{
    NEED(prctl(PR_SET_DUMPABLE, 0));
    NEED(prctl(PR_SET_PDEATHSIG, 0));
    ready();
    while (beat())
        CHECK(prctl(PR_GET_DUMPABLE) == 0, "it can be dumped");
}

void victim_many(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } kinds[] = {{"descriptors", descriptors}, {"mappings", mappings}, {"everywhere", everywhere}, {"growing", growing}, {"stack", stack}, {"addresses", addresses}, {"root", root},
                 {"dumpable", dumpable}};
    for (unsigned i = 0; victim_argc && i < COUNT(kinds); i++)
        if (!strcmp(victim_argv[0], kinds[i].name)) {
            kinds[i].run();
            return;
        }
    die("many of what?");
}
