/* filemap: private and shared mappings of files; private pages written (copies) and thrown away again with MADV_DONTNEED, which no tracker
 * reports: what is read then must be the file's content once more. */
#include "victim.h"
#include <fcntl.h>
#include <sys/mman.h>

#define PAGES 512
static char *private_map, *shared_map, *read_only;
static uint32_t versions[PAGES], shared_versions[PAGES];
static int shared_fd;

static int make_file(const char *name, uint64_t key)
{
    char page[PAGE];
    int fd = NEED(open(in_dir(name), O_RDWR | O_CREAT | O_TRUNC, 0644));
    for (unsigned i = 0; i < PAGES; i++) {
        page_fill(page, key + i, 0);
        if (pwrite(fd, page, PAGE, i * PAGE) != PAGE)
            die("writing %s", name);
    }
    return fd;
}

/* Version 0 is the file's own page. */
static void check_private(unsigned i)
{
    CHECK(page_is(private_map + i * PAGE, 1000 + i, versions[i]), "private page %u: version %lu instead of %u", i,
          ((unsigned long *)(private_map + i * PAGE))[1], versions[i]);
}

static void step(uint64_t random)
{
    unsigned i = random % PAGES, run = 1 + random / PAGES % 8;
    if (i + run > PAGES)
        run = PAGES - i;
    switch (random >> 32 & 3) {
    case 0: /* back to the file */
        CHECK_EQUAL(madvise(private_map + i * PAGE, run * PAGE, MADV_DONTNEED), 0, "madvise");
        memset(versions + i, 0, run * sizeof *versions);
        break;
    case 1:
        check_private(i);
        page_fill(private_map + i * PAGE, 1000 + i, ++versions[i]);
        break;
    case 2:
        page_fill(shared_map + i * PAGE, 2000 + i, ++shared_versions[i]);
        break;
    default:
        for (unsigned n = 0; n < run; n++)
            check_private(i + n);
    }
}

static void check_shared(unsigned i)
{
    char page[PAGE];
    CHECK(page_is(shared_map + i * PAGE, 2000 + i, shared_versions[i]), "shared page %u", i);
    CHECK(pread(shared_fd, page, PAGE, i * PAGE) == PAGE && page_is(page, 2000 + i, shared_versions[i]), "shared page %u read from its file", i);
}

void victim_filemap(void)
{
    int fd = make_file("private", 1000);
    private_map = NEED(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    close(fd);
    shared_fd = make_file("shared", 2000);
    shared_map = NEED(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0));
    fd = make_file("readonly", 3000);
    /* An offset inside the file, and one page beyond its end, which nobody may touch. */
    read_only = NEED(mmap(NULL, (PAGES - 7) * PAGE, PROT_READ, MAP_PRIVATE, fd, 8 * PAGE));
    close(fd);
    uint64_t random = 1;
    ready();
    while (beat()) {
        for (unsigned i = 0; i < 40; i++)
            step(random = mix(random));
        check_shared(random % PAGES);
        CHECK(page_is(read_only + random % (PAGES - 8) * PAGE, 3008 + random % (PAGES - 8), 0), "read-only page");
    }
    for (unsigned i = 0; i < PAGES; i++) {
        check_private(i);
        check_shared(i);
    }
}
