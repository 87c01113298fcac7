/* credentials [uid=N] [seccomp=1] [nnp=1] [drop=1]: compares a snapshot of everything that the kernel keeps about a process's identity
 * and limits with one taken now, for ever. */
#include "victim.h"
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/ioprio.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static bool filtered;

static void add(char *text, size_t size, const char *format, ...)
{
    size_t length = strlen(text);
    va_list list;
    va_start(list, format);
    vsnprintf(text + length, size - length, format, list);
    va_end(list);
}

static void add_link(char *text, size_t size, const char *name)
{
    char target[512] = "";
    char path[64];
    snprintf(path, sizeof path, "/proc/self/%s", name);
    if (readlink(path, target, sizeof target - 1) < 0)
        snprintf(target, sizeof target, "errno %d", errno);
    add(text, size, "%s %s\n", name, target);
}

static void add_status(char *text, size_t size)
{
    static const char *const keys[] = {"Umask:", "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:",
                                       "NoNewPrivs:", "Seccomp:", "Seccomp_filters:", "THP_enabled:"};
    char status[8192];
    slurp("/proc/self/status", status, sizeof status);
    for (char *save, *line = strtok_r(status, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        for (unsigned i = 0; i < COUNT(keys); i++)
            if (!strncmp(line, keys[i], strlen(keys[i])))
                add(text, size, "%s\n", line);
}

/* What one thread has for itself. */
static void thread_snapshot(char *text, size_t size)
{
    struct sched_param parameters;
    char name[17] = "";
    cpu_set_t set;
    CPU_ZERO(&set);
    prctl(PR_GET_NAME, name);
    sched_getparam(0, &parameters);
    sched_getaffinity(0, sizeof set, &set);
    add(text, size, "name %s policy %d priority %d nice %d affinity %lx slack %d io %ld\n", name, sched_getscheduler(0),
        parameters.sched_priority, getpriority(PRIO_PROCESS, 0), set.__bits[0], prctl(PR_GET_TIMERSLACK),
        syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0));
}

static void process_snapshot(char *text, size_t size)
{
    uid_t r, e, s;
    gid_t groups[64];
    getresuid(&r, &e, &s);
    add(text, size, "uid %u %u %u\n", r, e, s);
    getresgid(&r, &e, &s);
    add(text, size, "gid %u %u %u groups", r, e, s);
    int count = getgroups(64, groups);
    for (int i = 0; i < count; i++)
        add(text, size, " %u", groups[i]);
    int signal = -1, reaper = -1;
    prctl(PR_GET_PDEATHSIG, &signal);
    prctl(PR_GET_CHILD_SUBREAPER, &reaper);
    add(text, size, "\nbits %x keep %d dumpable %d death %d reaper %d thp %d personality %x session %d group %d\n", prctl(PR_GET_SECUREBITS),
        prctl(PR_GET_KEEPCAPS), prctl(PR_GET_DUMPABLE), signal, reaper, prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), personality(0xffffffff),
        getsid(0), getpgid(0));
    for (int i = 0; i < RLIM_NLIMITS; i++) {
        struct rlimit limit;
        getrlimit(i, &limit);
        add(text, size, "limit %d %lx %lx\n", i, limit.rlim_cur, limit.rlim_max);
    }
    char directory[512] = "";
    add(text, size, "cwd %s\n", getcwd(directory, sizeof directory) ? directory : "?");
    /* Links in /proc/self belong to the superuser once the process cannot be dumped. */
    if (geteuid() == 0) {
        add_link(text, size, "exe");
        add_link(text, size, "root");
    }
    thread_snapshot(text, size);
}

/* What only /proc tells. */
static void proc_snapshot(char *text, size_t size)
{
    char file[256];
    slurp("/proc/self/oom_score_adj", file, sizeof file);
    add(text, size, "oom %s", file);
    add_status(text, size);
}

static void report_difference(const char *who, char *before, char *now)
{
    char *one, *two, *a = strtok_r(before, "\n", &one), *b = strtok_r(now, "\n", &two);
    for (; a && b; a = strtok_r(NULL, "\n", &one), b = strtok_r(NULL, "\n", &two))
        if (strcmp(a, b)) {
            wrong("%s: `%s` became `%s`", who, a, b);
            return;
        }
    wrong("%s: the snapshots differ", who);
}

static void compare(const char *who, const char *before, void (*take)(char *, size_t))
{
    static _Thread_local char now[16384], copy[16384];
    now[0] = 0;
    take(now, sizeof now);
    checked();
    if (strcmp(before, now)) {
        strcpy(copy, before);
        report_difference(who, copy, now);
    }
}

static void *other_thread(void *argument)
{
    char before[1024] = "";
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(1 % sysconf(_SC_NPROCESSORS_ONLN), &one);
    sched_setaffinity(0, sizeof one, &one);
    pthread_setname_np(pthread_self(), "odd name) S 1");
    sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0});
    setpriority(PRIO_PROCESS, 0, 3);
    prctl(PR_SET_TIMERSLACK, 123456);
    thread_snapshot(before, sizeof before);
    thread_is_set_up();
    while (!stopping()) {
        compare("thread", before, thread_snapshot);
        usleep(10000);
    }
    return NULL;
}

static void set_limits(void)
{
    struct rlimit files = {512, 1000}, core = {0, 1 << 20};
    NEED(setrlimit(RLIMIT_NOFILE, &files));
    NEED(setrlimit(RLIMIT_CORE, &core));
    umask(027);
    NEED(setpriority(PRIO_PROCESS, 0, 5));
    NEED(personality(ADDR_NO_RANDOMIZE));
    NEED(prctl(PR_SET_NAME, "victim (x) 1 2"));
    prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 6));
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "500", 3) != 3)
        say("oom_score_adj stays as it is");
    close(fd);
}

static void become(uid_t uid)
{
    gid_t groups[] = {uid + 1, uid + 2, uid + 77};
    NEED(setgroups(3, groups));
    NEED(setresgid(uid, uid + 5, uid));
    NEED(setresuid(uid, uid, uid));
    prctl(PR_SET_DUMPABLE, 1);
}

static void drop_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    NEED(prctl(PR_CAPBSET_DROP, CAP_SYS_TIME, 0, 0, 0));
    NEED(syscall(SYS_capget, &header, data));
    data[0].effective &= ~(1u << CAP_NET_RAW);
    data[0].permitted &= ~(1u << CAP_SYS_TIME | 1u << CAP_MKNOD);
    data[0].effective &= data[0].permitted;
    data[0].inheritable = 1u << CAP_NET_BIND_SERVICE;
    NEED(syscall(SYS_capset, &header, data));
    NEED(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
}

static void filter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_acct, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 42),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ptrace, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        /* What no ordinary program calls, and a remote call well may, kills. */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {COUNT(code), code};
    NEED(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    NEED(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
    filtered = true;
}

void victim_credentials(void)
{
    static char before[16384], before_in_proc[16384];
    set_limits();
    if (option("drop"))
        drop_capabilities();
    if (option("uid"))
        become(atoi(option("uid")));
    if (option("nnp"))
        NEED(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    start_thread(other_thread, NULL);
    wait_for_threads(1);
    if (option("seccomp"))
        filter();
    process_snapshot(before, sizeof before);
    proc_snapshot(before_in_proc, sizeof before_in_proc);
    say("%s%s", before, before_in_proc);
    ready();
    while (beat()) {
        compare("process", before, process_snapshot);
        if (told_to_go())
            compare("/proc", before_in_proc, proc_snapshot);
        if (filtered)
            CHECK(syscall(SYS_acct, NULL) == -1 && errno == 42, "the filter is off: errno %d", errno);
    }
}
