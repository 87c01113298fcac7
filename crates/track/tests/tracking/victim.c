/* A process that does to its memory what it is told, one command a line, and answers each with one number. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096ul

struct area { char *start; size_t length; unsigned seed; int shared; };

/* Writes all over the area for ever, now and then dropping pages. */
static void *scribble(void *argument)
{
	struct area *area = argument;
	uint64_t x = 88172645463325252ull * (area->seed + 1);
	for (uint64_t turn = 0;; turn++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		((volatile uint64_t *)area->start)[x % (area->length / 8)] = x;
		if (turn % 8192 == 0)
			usleep(100);
		if (turn % 16384 == 1)
			madvise(area->start + (x >> 20) % (area->length / PAGE) * PAGE, PAGE,
				area->shared && (x & 1 << 19) ? MADV_REMOVE : MADV_DONTNEED);
	}
	return 0;
}

/* Maps, writes and unmaps or moves small mappings inside a reserved range for ever. */
static void *churn(void *argument)
{
	struct area *area = argument;
	uint64_t x = 123456789ull * (area->seed + 1);
	size_t slots = area->length / (16 * PAGE);
	for (;;) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		char *slot = area->start + x % slots * 16 * PAGE, *other = area->start + (x >> 32) % slots * 16 * PAGE;
		switch (x >> 16 & 3) {
		case 0:
			munmap(slot, 16 * PAGE);
			break;
		case 1:
			if (slot != other)
				mremap(slot, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, other);
			break;
		default:
			if (mmap(slot, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED)
				for (int i = 0; i < 16; i += 1 + (x >> 40 & 3))
					*(volatile uint64_t *)(slot + i * PAGE) = x;
		}
		usleep(20);
	}
	return 0;
}

static volatile long refused;

/* Has mappings grow for ever and counts those that the kernel takes for several. */
static void *grow(void *argument)
{
	struct area *area = argument;
	uint64_t x = 987654321ull * (area->seed + 1);
	for (;;) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		size_t length = (1 + (x >> 20) % 8) * PAGE;
		char *old = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		*old = 1;
		char *new = mremap(old, length, 2 * length, MREMAP_MAYMOVE);
		if (new == MAP_FAILED && errno == EFAULT)
			__atomic_fetch_add(&refused, 1, __ATOMIC_RELAXED);
		if (new == MAP_FAILED)
			munmap(old, length);
		else
			munmap(new, 2 * length);
	}
	return 0;
}

static long spawn(void *(*body)(void *), long start, long length, long threads, int shared)
{
	for (long i = 0; i < threads; i++) {
		struct area *area = malloc(sizeof *area);
		*area = (struct area){ (char *)start, length, i, shared };
		pthread_t thread;
		pthread_create(&thread, 0, body, area);
	}
	return 0;
}

int main(void)
{
	char line[512], word[32], path[256];
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setbuf(stdout, 0);
	while (fgets(line, sizeof line, stdin)) {
		long a = 0, b = 0, c = 0, r = -1;
		*path = 0;
		sscanf(line, "%31s %ld %ld %ld %255s", word, &a, &b, &c, path);
		errno = 0;
		if (!strcmp(word, "userfaultfd"))
			r = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		else if (!strcmp(word, "anonymous")) /* pages */
			r = (long)mmap(0, a * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		else if (!strcmp(word, "anonymous-at")) /* address pages */
			r = (long)mmap((void *)a, b * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		else if (!strcmp(word, "reserve")) /* pages */
			r = (long)mmap(0, a * PAGE, 0, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		else if (!strcmp(word, "aligned")) { /* pages; at a 2 MiB boundary, huge where possible */
			r = (long)mmap(0, a * PAGE + (2 << 20), 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			r = (r + (2 << 20) - 1) & ~((2l << 20) - 1);
			madvise((void *)r, a * PAGE, MADV_HUGEPAGE);
		} else if (!strcmp(word, "file")) { /* pages flags - path */
			int fd = open(path, O_RDWR);
			r = (long)mmap(0, a * PAGE, 3, b, fd, 0);
			close(fd);
		} else if (!strcmp(word, "memfd")) /* pages */
			ftruncate(r = memfd_create("victim", 0), a * PAGE);
		else if (!strcmp(word, "shared")) /* pages fd (or -1) offset */
			r = (long)mmap(0, a * PAGE, 3, MAP_SHARED | (b < 0 ? MAP_ANONYMOUS : 0), b, c);
		else if (!strcmp(word, "sysv")) { /* pages */
			int id = shmget(IPC_PRIVATE, a * PAGE, IPC_CREAT | 0600);
			r = (long)shmat(id, 0, 0);
			shmctl(id, IPC_RMID, 0);
		} else if (!strcmp(word, "hugetlb")) /* pages flags */
			r = (long)mmap(0, a * PAGE, 3, b | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
		else if (!strcmp(word, "fill")) { /* address pages byte */
			memset((void *)a, c, b * PAGE);
			r = 0;
		} else if (!strcmp(word, "poke")) { /* address byte */
			*(volatile char *)a = b;
			r = 0;
		} else if (!strcmp(word, "peek")) /* address */
			r = *(volatile unsigned char *)a;
		else if (!strcmp(word, "kernel-write")) { /* address byte: by read(2) */
			int ends[2];
			char byte = b;
			r = pipe(ends) + write(ends[1], &byte, 1) + read(ends[0], (void *)a, 1);
			close(ends[0]), close(ends[1]);
		} else if (!strcmp(word, "pwrite")) { /* fd offset byte */
			char byte = c;
			r = pwrite(a, &byte, 1, b);
		} else if (!strcmp(word, "madvise")) /* address pages advice */
			r = madvise((void *)a, b * PAGE, c);
		else if (!strcmp(word, "munmap")) /* address pages */
			r = munmap((void *)a, b * PAGE);
		else if (!strcmp(word, "mremap")) /* address pages new-pages */
			r = (long)mremap((void *)a, b * PAGE, c * PAGE, MREMAP_MAYMOVE);
		else if (!strcmp(word, "mremap-to")) /* address pages target */
			r = (long)mremap((void *)a, b * PAGE, b * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)c);
		else if (!strcmp(word, "mprotect")) /* address pages protection */
			r = mprotect((void *)a, b * PAGE, c);
		else if (!strcmp(word, "punch")) /* fd offset length */
			r = fallocate(a, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, b, c);
		else if (!strcmp(word, "truncate")) /* fd length */
			r = ftruncate(a, b);
		else if (!strcmp(word, "scribble")) /* address pages threads */
			r = spawn(scribble, a, b * PAGE, c, 0);
		else if (!strcmp(word, "scribble-shared")) /* address pages threads */
			r = spawn(scribble, a, b * PAGE, c, 1);
		else if (!strcmp(word, "churn")) /* address pages threads */
			r = spawn(churn, a, b * PAGE, c, 0);
		else if (!strcmp(word, "grow")) /* - - threads */
			r = spawn(grow, a, b, c, 0);
		else if (!strcmp(word, "refused"))
			r = refused;
		printf("%ld %d\n", r, errno);
	}
	return 0;
}
