/* Gives itself a bit of every kind of state that threads have, says "ready", and waits. */
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/membarrier.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define MUST(x) do { if ((x) < 0) { printf("failed: %s: %s\n", #x, strerror(errno)); exit(1); } } while (0)

static pthread_barrier_t barrier;
static pid_t second;

static void handler(int signal, siginfo_t *info, void *context) { (void)signal; (void)info; (void)context; }

static void add_filter(unsigned denied)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, denied, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { .len = 4, .filter = code };
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

static void queue(int whole, int signal, int value)
{
    siginfo_t info = { .si_signo = signal, .si_code = SI_QUEUE };
    info.si_pid = getpid();
    info.si_value.sival_int = value;
    if (whole)
        MUST(syscall(SYS_rt_sigqueueinfo, getpid(), signal, &info));
    else
        MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), signal, &info));
}

static void *other(void *unused)
{
    (void)unused;
    second = syscall(SYS_gettid);
    MUST(prctl(PR_SET_NAME, "second thread"));
    add_filter(SYS_sysinfo);
    MUST(syscall(SYS_setresuid, 1111, 1111, 1111));
    MUST(setpriority(PRIO_PROCESS, second, 7));
    MUST(prctl(PR_SET_TIMERSLACK, 123456));
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(0, &cpus);
    MUST(sched_setaffinity(0, sizeof cpus, &cpus));
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    queue(0, SIGRTMIN + 3, 33);
    queue(0, SIGRTMIN + 3, 34);
    queue(0, SIGUSR2, 35);
    pthread_barrier_wait(&barrier);
    for (;;)
        pause();
}

int main(void)
{
    static char stack[65536];
    setbuf(stdout, NULL);
    MUST(setsid());
    MUST(chdir("/tmp"));
    umask(027);
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
    sigaddset(&action.sa_mask, SIGHUP);
    MUST(sigaction(SIGUSR1, &action, NULL));
    MUST(sigaction(SIGRTMIN + 3, &action, NULL));
    signal(SIGPIPE, SIG_IGN);
    signal(SIGQUIT, SIG_IGN);
    stack_t ss = { .ss_sp = stack, .ss_size = sizeof stack };
    MUST(sigaltstack(&ss, NULL));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 5);
    sigaddset(&set, SIGALRM);
    sigaddset(&set, SIGCHLD);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    queue(1, SIGRTMIN + 5, 55);
    queue(1, SIGRTMIN + 5, 56);
    queue(1, SIGCHLD, 57);
    struct itimerval real = { .it_value = { 1000, 500 }, .it_interval = { 7, 8 } };
    MUST(setitimer(ITIMER_REAL, &real, NULL));
    struct itimerval virtual = { .it_value = { 50, 0 }, .it_interval = { 1, 0 } };
    MUST(setitimer(ITIMER_VIRTUAL, &virtual, NULL));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    MUST(syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0));
    MUST(personality(ADDR_NO_RANDOMIZE));
    struct rlimit limit = { 333, 444 };
    MUST(setrlimit(RLIMIT_NOFILE, &limit));
    limit.rlim_cur = 1 << 20;
    limit.rlim_max = RLIM_INFINITY;
    MUST(setrlimit(RLIMIT_CORE, &limit));
    struct sched_param parameter = { 0 };
    MUST(sched_setscheduler(0, SCHED_BATCH | SCHED_RESET_ON_FORK, &parameter));
    MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 3));
    add_filter(SYS_swapon);

    timer_t ids[6];
    for (int i = 0; i < 6; i++) {
        struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 5, .sigev_value.sival_int = i };
        if (i == 5)
            event.sigev_notify = SIGEV_NONE;
        MUST(timer_create(i == 3 ? CLOCK_PROCESS_CPUTIME_ID : i == 4 ? CLOCK_REALTIME : CLOCK_MONOTONIC, &event, &ids[i]));
        struct itimerspec setting = { .it_value = { 500 + i, 5 }, .it_interval = { i, 9 } };
        MUST(timer_settime(ids[i], 0, &setting, NULL));
    }
    MUST(timer_delete(ids[0]));
    MUST(timer_delete(ids[2]));

    pthread_barrier_init(&barrier, NULL, 2);
    pthread_t thread;
    pthread_create(&thread, NULL, other, NULL);
    pthread_barrier_wait(&barrier);
    struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 6 };
    event._sigev_un._tid = second;
    MUST(timer_create(CLOCK_BOOTTIME, &event, &ids[0]));
    struct itimerspec setting = { .it_value = { 900, 0 } };
    MUST(timer_settime(ids[0], 0, &setting, NULL));

    /* Credentials: user 1234 who keeps two capabilities, one of them ambient, and whose bounding set has lost one. */
    gid_t groups[] = { 7, 77, 777 };
    MUST(syscall(SYS_setgroups, 3, groups));
    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT));
    MUST(syscall(SYS_setresgid, 2001, 2002, 2003));
    MUST(prctl(PR_SET_KEEPCAPS, 1));
    MUST(syscall(SYS_setresuid, 1001, 1002, 1003));
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    unsigned net = 1 << CAP_NET_ADMIN, setuid = 1 << CAP_SETUID;
    struct __user_cap_data_struct data[2] = { { .effective = setuid, .permitted = net | setuid, .inheritable = net } };
    MUST(syscall(SYS_capset, &header, data));
    MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_ADMIN, 0, 0));
    syscall(SYS_setfsuid, 1003);
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_DUMPABLE, 1));
    MUST(prctl(PR_SET_PDEATHSIG, SIGUSR1));
    MUST(prctl(PR_SET_NAME, "first"));
    puts("ready");
    for (;;)
        pause();
}
