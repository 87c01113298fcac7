// Up to four threads that would notice if a register, a byte of memory, a signal or a wait of theirs went wrong.
// argv[1]: a file of 64-bit words that is mapped: beats of the threads, failures, signals handled. argv[2]: how many threads.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { FAILURES = 4, SIGNALS = 5, CONTINUES = 6 };
static volatile unsigned long *words;

static void count(int signal) {
    __atomic_add_fetch(&words[signal == SIGCONT ? CONTINUES : SIGNALS], 1, __ATOMIC_SEQ_CST);
}

// Counts in four registers and in memory, and compares.
static int registers_and_memory(void) {
    unsigned long a, b, c, memory = 0, different = 0;
    __asm__ volatile(
        "xor %0, %0\n xor %1, %1\n xor %2, %2\n mov $20000, %%rcx\n"
        "1: inc %0\n inc %1\n inc %2\n incq %3\n"
        "cmp %0, %1\n jne 2f\n cmp %1, %2\n jne 2f\n cmp %2, %3\n jne 2f\n"
        "dec %%rcx\n jnz 1b\n jmp 3f\n"
        "2: movq $1, %4\n 3:"
        : "=&r"(a), "=&r"(b), "=&r"(c), "+m"(memory), "+m"(different)
        :
        : "rcx", "cc", "memory");
    return different || memory != 20000;
}

static void *work(void *number) {
    long which = (long)number;
    for (;;) {
        if (which % 2) {
            struct timespec millisecond = {0, 1000000};
            if (nanosleep(&millisecond, NULL) && errno != EINTR)
                words[FAILURES]++;
        } else if (registers_and_memory()) {
            words[FAILURES]++;
        }
        sigset_t mask;
        pthread_sigmask(SIG_SETMASK, NULL, &mask);
        if (sigismember(&mask, SIGUSR1) || sigismember(&mask, SIGTERM))
            words[FAILURES]++;
        words[which]++;
    }
    return NULL;
}

int main(int argc, char **argv) {
    int file = open(argv[1], O_RDWR);
    words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (words == MAP_FAILED)
        return 1;
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGCONT, &action, NULL);
    for (long number = 1; number < atol(argv[argc - 1]); number++) {
        pthread_t thread;
        pthread_create(&thread, NULL, work, (void *)number);
    }
    puts("ready");
    fflush(stdout);
    work((void *)0);
}
