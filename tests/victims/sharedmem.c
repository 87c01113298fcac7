/* sharedmem: anonymous shared memory, memfd with seals mapped twice, memfd written with write(2) while mapped, System V segments attached
 * twice: every view shows the same bytes, seals and ids stay. */
#include "victim.h"
#include <fcntl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>

#define PAGES 256
#define SEALS (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)

/* One object: two views of the same bytes, a descriptor for writing if there is one. */
static struct object {
    const char *name;
    char *one, *two;
    int fd;
    uint32_t versions[PAGES];
} objects[4];

static void write_page(struct object *object, unsigned i, uint64_t random)
{
    uint64_t key = (object - objects) * 10000 + i, version = ++object->versions[i];
    char page[PAGE];
    switch (random % (object->fd >= 0 ? 3 : 2)) {
    case 0:
        page_fill(object->one + i * PAGE, key, version);
        break;
    case 1:
        page_fill(object->two + i * PAGE, key, version);
        break;
    default:
        page_fill(page, key, version);
        CHECK(pwrite(object->fd, page, PAGE, i * PAGE) == PAGE, "%s: write: %s", object->name, strerror(errno));
    }
}

static void check_page(struct object *object, unsigned i)
{
    uint64_t key = (object - objects) * 10000 + i;
    CHECK(page_is(object->one + i * PAGE, key, object->versions[i]), "%s: page %u in its first view: version %lu, want %u", object->name, i,
          ((unsigned long *)(object->one + i * PAGE))[1], object->versions[i]);
    CHECK(page_is(object->two + i * PAGE, key, object->versions[i]), "%s: page %u in its second view", object->name, i);
    char page[PAGE];
    if (object->fd >= 0)
        CHECK(pread(object->fd, page, PAGE, i * PAGE) == PAGE && page_is(page, key, object->versions[i]), "%s: page %u read", object->name, i);
}

static char *map(int fd, int flags)
{
    return NEED(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, 0));
}

void victim_sharedmem(void)
{
    char *anonymous = map(-1, MAP_ANONYMOUS);
    /* A second view of anonymous shared memory: mremap with an old size of nothing. */
    char *again = NEED(mremap(anonymous, 0, PAGES * PAGE, MREMAP_MAYMOVE));
    objects[0] = (struct object){.name = "anonymous", .one = anonymous, .two = again, .fd = -1};

    int sealed = NEED(memfd_create("victim sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC));
    NEED(ftruncate(sealed, PAGES * PAGE));
    NEED(fcntl(sealed, F_ADD_SEALS, SEALS));
    objects[1] = (struct object){.name = "sealed memfd", .one = map(sealed, 0), .two = map(sealed, 0), .fd = sealed};

    int unmapped = NEED(memfd_create("victim", 0));
    NEED(ftruncate(unmapped, (PAGES + 3) * PAGE));
    objects[2] = (struct object){.name = "memfd", .one = map(unmapped, 0), .two = map(unmapped, 0), .fd = unmapped};

    int id = NEED(shmget(IPC_PRIVATE, PAGES * PAGE, IPC_CREAT | 0640));
    objects[3] = (struct object){.name = "System V", .one = NEED(shmat(id, NULL, 0)), .two = NEED(shmat(id, NULL, 0)), .fd = -1};
    NEED(lseek(unmapped, 12345, SEEK_SET));
    for (unsigned o = 0; o < COUNT(objects); o++)
        for (unsigned i = 0; i < PAGES; i++)
            write_page(&objects[o], i, i);
    uint64_t random = 1;
    ready();
    while (beat()) {
        for (unsigned i = 0; i < 24; i++) {
            random = mix(random);
            struct object *object = &objects[random % COUNT(objects)];
            check_page(object, random / 8 % PAGES);
            write_page(object, random / 8 % PAGES, random >> 32);
        }
        CHECK_EQUAL(fcntl(sealed, F_GET_SEALS), SEALS, "seals");
        CHECK(ftruncate(sealed, 0) == -1 && errno == EPERM, "a sealed memfd shrinks");
        CHECK_EQUAL(lseek(unmapped, 0, SEEK_CUR), 12345, "offset of a memfd");
        CHECK_EQUAL(lseek(unmapped, 0, SEEK_END), (PAGES + 3) * PAGE, "size of a memfd");
        lseek(unmapped, 12345, SEEK_SET);
        struct shmid_ds segment;
        CHECK(shmctl(id, IPC_STAT, &segment) == 0 && segment.shm_nattch == 2 && segment.shm_segsz == PAGES * PAGE &&
                  (segment.shm_perm.mode & 0777) == 0640,
              "System V segment %d: %s, %lu attached", id, strerror(errno), (unsigned long)segment.shm_nattch);
    }
    for (unsigned o = 0; o < COUNT(objects); o++)
        for (unsigned i = 0; i < PAGES; i++)
            check_page(&objects[o], i);
    shmctl(id, IPC_RMID, NULL);
}
