/* Both ends of a post-copy move, without the move: a source that holds content and a program that lacks it.
 * Obeys lines on standard input and answers each with one line. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <signal.h>

#define BASE 0x600000000000ul
#define PAGE 4096ul
#define WORDS (PAGE / 8)

static uint64_t mix(uint64_t value) {
    value += 0x9e3779b97f4a7c15ul;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ul;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebul;
    return value ^ (value >> 31);
}

/* What the source has in word `word` of page `page`; one page in eight is zeros. */
static uint64_t content(uint64_t page, uint64_t word) {
    return page % 8 == 7 ? 0 : mix(page << 10 | word) | 1;
}

static double now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

/* Compares the page at `at` with page number `page` of the source; returns the number of wrong words. */
static unsigned differences(volatile uint64_t *at, uint64_t page) {
    unsigned wrong = 0;
    for (uint64_t word = 0; word < WORDS; word++)
        wrong += at[word] != content(page, word);
    return wrong;
}

static void answer_verified(uint64_t wrong, uint64_t pages) {
    if (wrong)
        printf("wrong %lu of %lu\n", wrong, pages);
    else
        printf("ok %lu\n", pages);
}

static uint64_t verify(uint64_t address, uint64_t page, uint64_t pages) {
    uint64_t wrong = 0;
    for (uint64_t index = 0; index < pages; index++)
        wrong += differences((uint64_t *)(address + index * PAGE), page + index) != 0;
    return wrong;
}

static uint64_t not_zero(uint64_t address, uint64_t pages) {
    uint64_t wrong = 0;
    for (uint64_t index = 0; index < pages; index++) {
        volatile uint64_t *at = (uint64_t *)(address + index * PAGE);
        uint64_t any = 0;
        for (uint64_t word = 0; word < WORDS; word++)
            any |= at[word];
        wrong += any != 0;
    }
    return wrong;
}

static int by_value(const void *one, const void *two) {
    double difference = *(const double *)one - *(const double *)two;
    return difference < 0 ? -1 : difference > 0;
}

/* Touches `count` pages of `pages` in random order, `pause_us` apart, and tells how long the touches took. */
static void touch(uint64_t pages, uint64_t count, uint64_t seed, uint64_t pause_us) {
    double *took = calloc(count + 1, sizeof *took);
    uint64_t wrong = 0;
    for (uint64_t index = 0; index < count; index++) {
        uint64_t page = mix(seed << 32 | index) % pages;
        double start = now_us();
        (void)*(volatile uint64_t *)(BASE + page * PAGE);
        took[index] = now_us() - start;
        wrong += differences((uint64_t *)(BASE + page * PAGE), page) != 0;
        if (pause_us)
            usleep(pause_us);
    }
    /* Touches that found the page there are no faults. */
    uint64_t faults = 0;
    for (uint64_t index = 0; index < count; index++)
        if (took[index] > 8)
            took[faults++] = took[index];
    qsort(took, faults, sizeof *took, by_value);
    printf("%s %lu faults %lu p50 %.0f p99 %.0f longest %.0f\n", wrong ? "wrong" : "ok", wrong, faults,
           faults ? took[faults / 2] : 0, faults ? took[faults * 99 / 100] : 0, faults ? took[faults - 1] : 0);
    free(took);
}

static volatile int stop_waiting;

struct waiter {
    uint64_t page;
    uint64_t wrong;
};

static void *wait_for_page(void *argument) {
    struct waiter *waiter = argument;
    waiter->wrong = differences((uint64_t *)(BASE + waiter->page * PAGE), waiter->page) != 0;
    return NULL;
}

/* Has one thread touch each of `pages` pages from `page` on, spaced out, and says so before they have them. */
static void wait_for(uint64_t page, uint64_t threads, uint64_t step) {
    struct waiter waiters[64];
    pthread_t ids[64];
    for (uint64_t index = 0; index < threads && index < 64; index++) {
        waiters[index] = (struct waiter){page + index * step, 0};
        pthread_create(&ids[index], NULL, wait_for_page, &waiters[index]);
    }
    usleep(50000);
    printf("waiting\n");
    uint64_t wrong = 0;
    for (uint64_t index = 0; index < threads && index < 64; index++) {
        pthread_join(ids[index], NULL);
        wrong += waiters[index].wrong;
    }
    answer_verified(wrong, threads);
}

static int register_memory(uint64_t length) {
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE
                                         | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_THREAD_ID};
    struct uffdio_register range = {.range = {BASE, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range)) {
        printf("failed %s\n", strerror(errno));
        exit(1);
    }
    return fd;
}

int main(int count, char **arguments) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setbuf(stdout, NULL);
    if (count != 3)
        return 2;
    uint64_t pages = strtoull(arguments[2], NULL, 0);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    char *memory = mmap((void *)BASE, pages * PAGE, protection, flags, -1, 0);
    if (memory != (char *)BASE)
        return 3;
    if (!strcmp(arguments[1], "source")) {
        for (uint64_t page = 0; page < pages; page++)
            for (uint64_t word = 0; word < WORDS; word++)
                ((uint64_t *)(BASE + page * PAGE))[word] = content(page, word);
        printf("ready\n");
        for (;;)
            pause();
    }
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    int fd = register_memory(pages * PAGE);
    printf("uffd %d\n", fd);
    char line[256], word[32];
    while (fgets(line, sizeof line, stdin)) {
        uint64_t a = 0, b = 0, c = 0, d = 0;
        if (sscanf(line, "%31s %lu %lu %lu %lu", word, &a, &b, &c, &d) < 1)
            continue;
        if (!strcmp(word, "close"))
            printf("ok %d\n", close(fd));
        else if (!strcmp(word, "verify")) /* place, page, pages */
            answer_verified(verify(BASE + a * PAGE, b, c), c);
        else if (!strcmp(word, "zeros"))
            answer_verified(not_zero(BASE + a * PAGE, b), b);
        else if (!strcmp(word, "touch"))
            touch(a, b, c, d);
        else if (!strcmp(word, "wait"))
            wait_for(a, b, c);
        else if (!strcmp(word, "discard"))
            printf("ok %d\n", madvise((void *)(BASE + a * PAGE), b * PAGE, MADV_DONTNEED));
        else if (!strcmp(word, "unmap"))
            printf("ok %d\n", munmap((void *)(BASE + a * PAGE), b * PAGE));
        else if (!strcmp(word, "remap")) { /* place, pages, new place */
            void *to = (void *)(BASE + c * PAGE);
            printf("ok %d\n", mremap((void *)(BASE + a * PAGE), b * PAGE, b * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to);
        } else if (!strcmp(word, "fork")) { /* place, page, pages: the child verifies them */
            pid_t child = fork();
            if (child == 0)
                _exit(verify(BASE + a * PAGE, b, c) != 0);
            int status = -1;
            waitpid(child, &status, 0);
            printf("ok %d\n", status);
        } else
            printf("what? %s", line);
    }
    return 0;
}
