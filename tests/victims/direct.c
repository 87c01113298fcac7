/* direct: threads read a file past the page cache, so that a device writes into memory long after the kernel has looked at it; each
 * buffer is kept for a while and looked at again. */
#include "victim.h"
#include <fcntl.h>
#include <sys/mman.h>

#define BLOCK (1UL << 20)
#define BLOCKS 64
#define THREADS 3
#define BUFFERS 24
static int fd;

static bool is_block(const char *buffer, unsigned block)
{
    for (unsigned long at = 0; at < BLOCK; at += PAGE)
        if (!page_is(buffer + at, block, at))
            return false;
    return true;
}

static void *read_again_and_again(void *argument)
{
    uint64_t random = (uintptr_t)argument;
    char *buffers = mmap(NULL, BUFFERS * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int held[BUFFERS];
    if (buffers == MAP_FAILED)
        die("no memory");
    memset(held, -1, sizeof held);
    thread_is_set_up();
    while (!stopping()) {
        random = mix(random);
        unsigned slot = random % BUFFERS, block = random / BUFFERS % BLOCKS;
        char *buffer = buffers + slot * BLOCK;
        CHECK(held[slot] < 0 || is_block(buffer, held[slot]), "a buffer no longer holds block %d", held[slot]);
        ssize_t got = pread(fd, buffer, BLOCK, block * BLOCK);
        CHECK(got == (ssize_t)BLOCK, "pread: %zd: %s", got, strerror(errno));
        held[slot] = block;
        CHECK(is_block(buffer, block), "block %u just read", block);
    }
    for (unsigned slot = 0; slot < BUFFERS; slot++)
        CHECK(held[slot] < 0 || is_block(buffers + slot * BLOCK, held[slot]), "block %d at the end", held[slot]);
    return NULL;
}

void victim_direct(void)
{
    static char block[BLOCK] __attribute__((aligned(4096)));
    pthread_t threads[THREADS];
    fd = NEED(open(in_dir("blocks"), O_RDWR | O_CREAT, 0600));
    for (unsigned i = 0; i < BLOCKS; i++) {
        for (unsigned long at = 0; at < BLOCK; at += PAGE)
            page_fill(block + at, i, at);
        if (write(fd, block, BLOCK) != (ssize_t)BLOCK)
            die("the file: %s", strerror(errno));
    }
    NEED(fsync(fd));
    close(fd);
    fd = open(in_dir("blocks"), O_RDONLY | O_DIRECT);
    if (fd < 0)
        not_here("this file system has no O_DIRECT");
    for (uintptr_t i = 0; i < THREADS; i++)
        threads[i] = start_thread(read_again_and_again, (void *)(i + 1));
    wait_for_threads(THREADS);
    ready();
    while (beat())
        ;
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}
