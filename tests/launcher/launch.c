/* launch PROGRAM [ARGUMENT...]: runs a program without anything of the one who started the tests: no descriptors but the standard streams,
 * a session of its own, default signal handling. A victim with a stray pipe to a test runner could not be moved. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: launch PROGRAM [ARGUMENT...]\n");
        return 2;
    }
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    /* The program is no group leader yet, or has a session of its own already. */
    setsid();
    syscall(SYS_close_range, 3, ~0U, 0);
    execvp(argv[1], argv + 1);
    fprintf(stderr, "%s: %s\n", argv[1], strerror(errno));
    return 127;
}
