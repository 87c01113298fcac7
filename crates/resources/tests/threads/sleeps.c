/* Waits in one call for a time, again and again told by its arguments how: sleeps CALL MILLISECONDS.
   Then says what the call returned and how many milliseconds it took. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static long wait_in(const char *call, int ms)
{
    struct timespec t = { ms / 1000, ms % 1000 * 1000000L }, rest = { 9, 9 };
    struct epoll_event event;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    if (!strcmp(call, "nanosleep"))
        return syscall(SYS_nanosleep, &t, NULL);
    if (!strcmp(call, "nanosleep-rest"))
        return syscall(SYS_nanosleep, &t, &rest);
    if (!strcmp(call, "clock_nanosleep"))
        return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL);
    if (!strcmp(call, "clock_nanosleep-same"))
        return syscall(SYS_clock_nanosleep, CLOCK_REALTIME, 0, &t, &t);
    if (!strcmp(call, "poll"))
        return syscall(SYS_poll, NULL, 0, ms);
    if (!strcmp(call, "ppoll"))
        return syscall(SYS_ppoll, NULL, 0, &t, NULL, 8);
    if (!strcmp(call, "select")) {
        struct timeval v = { ms / 1000, ms % 1000 * 1000L };
        return syscall(SYS_select, 0, NULL, NULL, NULL, &v);
    }
    if (!strcmp(call, "futex")) {
        static int word;
        return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
    }
    if (!strcmp(call, "futex-absolute")) {
        static int word;
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += t.tv_nsec;
        until.tv_sec += t.tv_sec + until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY);
    }
    if (!strcmp(call, "epoll_wait"))
        return syscall(SYS_epoll_wait, epoll_create1(0), &event, 1, ms);
    if (!strcmp(call, "epoll_pwait2"))
        return syscall(SYS_epoll_pwait2, epoll_create1(0), &event, 1, &t, NULL, 8);
    if (!strcmp(call, "sigtimedwait"))
        return syscall(SYS_rt_sigtimedwait, &set, NULL, &t, 8);
    if (!strcmp(call, "semtimedop")) {
        int id = semget(IPC_PRIVATE, 1, 0600);
        struct sembuf op = { 0, -1, 0 };
        long result = syscall(SYS_semtimedop, id, &op, 1, &t);
        int saved = errno;
        semctl(id, 0, IPC_RMID);
        errno = saved;
        return result;
    }
    if (!strcmp(call, "recv")) {
        int pair[2];
        char byte;
        struct timeval v = { ms / 1000, ms % 1000 * 1000L };
        socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
        setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &v, sizeof v);
        return recv(pair[0], &byte, 1, 0);
    }
    errno = ENOSYS;
    return -1;
}

int main(int argc, char **argv)
{
    (void)argc;
    setbuf(stdout, NULL);
    puts("ready");
    long before = now();
    long result = wait_in(argv[1], atoi(argv[2]));
    printf("%ld %s %ld\n", result, result < 0 ? strerrorname_np(errno) : "-", now() - before);
}
