/* edge WHAT: rarer things, each checked for ever. An engine may move them, or refuse them by name; it may not lose them silently. */
#include "victim.h"
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <mqueue.h>

static int one, two;
static char *memory, *other;

static void hold_flock(void)
{
    one = NEED(open(in_dir("locked"), O_RDWR | O_CREAT, 0600));
    two = NEED(open(in_dir("locked"), O_RDWR));
    NEED(flock(one, LOCK_EX));
}

static void check_flock(void)
{
    CHECK(flock(two, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "the flock is gone");
}

static void hold_record_lock(void)
{
    one = NEED(open(in_dir("locked"), O_RDWR | O_CREAT, 0600));
    two = NEED(open(in_dir("locked"), O_RDWR));
    struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 20};
    NEED(fcntl(one, F_SETLK, &lock));
}

static void check_record_lock(void)
{
    struct flock lock = {.l_type = F_WRLCK, .l_start = 15, .l_len = 1};
    CHECK(fcntl(two, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_WRLCK && lock.l_start == 10 && lock.l_len == 20, "the record lock is gone");
}

/* A descriptor on its way through a socket pair. */
static void hold_rights(void)
{
    int pair[2], passed = NEED(eventfd(77, 0));
    NEED(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    char control[CMSG_SPACE(sizeof(int))] = "", byte = 'x';
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(header), &passed, sizeof passed);
    NEED(sendmsg(pair[0], &message, 0));
    close(passed);
    one = pair[1];
    two = -1;
}

static void check_rights(void)
{
    if (!told_to_go() || two >= 0)
        return;
    char control[CMSG_SPACE(sizeof(int))] = "", byte = 0;
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(one, &message, MSG_DONTWAIT);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    two = 0;
    uint64_t value = 0;
    CHECK(got == 1 && byte == 'x' && header && header->cmsg_type == SCM_RIGHTS, "no descriptor comes: %zd", got);
    if (got == 1 && header) {
        memcpy(&two, CMSG_DATA(header), sizeof two);
        CHECK(read(two, &value, 8) == 8 && value == 77, "the passed descriptor yields %lu", value);
    }
}

/* Two datagram sockets bound to names, one message waiting. */
static void hold_datagrams(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", in_dir("datagrams"));
    one = NEED(socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0));
    NEED(bind(one, (void *)&address, sizeof address));
    two = NEED(socket(AF_UNIX, SOCK_DGRAM, 0));
    NEED(connect(two, (void *)&address, sizeof address));
    NEED(send(two, "waiting", 7, 0));
}

static void check_datagrams(void)
{
    char word[16] = "";
    CHECK(recv(one, word, sizeof word, 0) == 7 && !strcmp(word, "waiting") && send(two, "waiting", 7, 0) == 7, "datagrams: %s", strerror(errno));
}

static void hold_sigio(void)
{
    int ends[2];
    NEED(pipe(ends));
    one = ends[0];
    signal(SIGRTMIN + 5, SIG_IGN);
    NEED(fcntl(one, F_SETOWN, getpid()));
    NEED(fcntl(one, F_SETSIG, SIGRTMIN + 5));
    NEED(fcntl(one, F_SETFL, O_ASYNC | O_NONBLOCK));
}

static void check_sigio(void)
{
    CHECK(fcntl(one, F_GETOWN) == getpid(), "owner %d", fcntl(one, F_GETOWN));
    CHECK(fcntl(one, F_GETSIG) == SIGRTMIN + 5, "signal %d", fcntl(one, F_GETSIG));
    CHECK(fcntl(one, F_GETFL) == (O_RDONLY | O_ASYNC | O_NONBLOCK), "flags %x", fcntl(one, F_GETFL));
}

static void hold_secret(void)
{
    one = syscall(SYS_memfd_secret, 0);
    if (one < 0)
        not_here("no memfd_secret");
    NEED(ftruncate(one, 4 * PAGE));
    memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, one, 0);
    if (memory == MAP_FAILED)
        not_here("memfd_secret cannot be mapped");
    page_fill(memory + PAGE, 1, 1);
}

static void check_secret(void) { CHECK(page_is(memory + PAGE, 1, 1), "secret memory"); }

static void hold_everything_locked(void) { NEED(mlockall(MCL_CURRENT | MCL_FUTURE)); }

static long locked_kib(void)
{
    char status[8192];
    slurp("/proc/self/status", status, sizeof status);
    char *line = strstr(status, "VmLck:");
    return line ? atol(line + 6) : -1;
}

static void check_everything_locked(void)
{
    if (!told_to_go())
        return;
    long before = locked_kib();
    char *more = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(before > 0 && locked_kib() == before + 64, "new memory is not locked: %ld KiB, then %ld", before, locked_kib());
    munmap(more, 16 * PAGE);
}

/* Threads that share less than threads do. */
static const char *apart;

static void *stand_apart(void *argument)
{
    char directory[512];
    if (!strcmp(apart, "thread_fs")) {
        NEED(unshare(CLONE_FS));
        NEED(chdir("/usr"));
    } else if (!strcmp(apart, "thread_files")) {
        NEED(unshare(CLONE_FILES));
        one = NEED(eventfd(55, 0));
        NEED(dup2(one, 300));
    } else if (!strcmp(apart, "thread_user")) {
        NEED(syscall(SYS_setresuid, -1, 1000, -1));
    } else {
        struct sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_acct, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 42),
                                     BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
        struct sock_fprog program = {COUNT(code), code};
        NEED(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
    }
    thread_is_set_up();
    while (!stopping()) {
        if (!strcmp(apart, "thread_fs"))
            CHECK(getcwd(directory, sizeof directory) && !strcmp(directory, "/usr"), "the thread's directory is %s", directory);
        else if (!strcmp(apart, "thread_files"))
            CHECK(fcntl(300, F_GETFD) == 0, "the thread's descriptor is gone");
        else if (!strcmp(apart, "thread_user"))
            CHECK(syscall(SYS_geteuid) == 1000, "the thread's user is %ld", syscall(SYS_geteuid));
        else
            CHECK(syscall(SYS_acct, NULL) == -1 && errno == 42, "the thread's filter is gone");
        usleep(10000);
    }
    return NULL;
}

static void hold_thread(void)
{
    apart = victim_argv[0];
    start_thread(stand_apart, NULL);
    wait_for_threads(1);
}

static void check_thread(void)
{
    char directory[512] = "";
    if (!strcmp(apart, "thread_fs"))
        CHECK(getcwd(directory, sizeof directory) && strcmp(directory, "/usr"), "the main thread moved to %s", directory);
    else if (!strcmp(apart, "thread_files"))
        CHECK(fcntl(300, F_GETFD) == -1, "the main thread has the other's descriptor");
    else if (!strcmp(apart, "thread_user"))
        CHECK(syscall(SYS_geteuid) == 0, "the main thread's user is %ld", syscall(SYS_geteuid));
    else
        CHECK(prctl(PR_GET_SECCOMP) == 0, "the main thread has the other's filter");
}

static void hold_queue(void)
{
    struct mq_attr attributes = {.mq_maxmsg = 4, .mq_msgsize = 64};
    mq_unlink("/godwit-victim");
    one = mq_open("/godwit-victim", O_RDWR | O_CREAT, 0600, &attributes);
    if (one < 0)
        not_here("no message queues");
    mq_unlink("/godwit-victim");
    NEED(mq_send(one, "hello", 5, 3));
}

static void check_queue(void)
{
    char word[64] = "";
    unsigned priority = 0;
    CHECK(mq_receive(one, word, sizeof word, &priority) == 5 && priority == 3 && mq_send(one, "hello", 5, 3) == 0, "the queue: %s", strerror(errno));
}

/* Mappings of a file without a name: one shared, with a descriptor, one private, without. */
static void hold_deleted_mapping(void)
{
    one = NEED(open(in_dir("mapped"), O_RDWR | O_CREAT, 0600));
    NEED(ftruncate(one, 4 * PAGE));
    memory = NEED(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, one, 0));
    page_fill(memory, 1, 1);
    two = NEED(open(in_dir("mapped too"), O_RDWR | O_CREAT, 0600));
    NEED(ftruncate(two, 4 * PAGE));
    char page[PAGE];
    page_fill(page, 2, 2);
    NEED(pwrite(two, page, PAGE, PAGE));
    other = NEED(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, two, 0));
    page_fill(other, 3, 3);
    close(two);
    NEED(unlink(in_dir("mapped")));
    NEED(unlink(in_dir("mapped too")));
}

static void check_deleted_mapping(void)
{
    char page[PAGE];
    CHECK(page_is(memory, 1, 1) && pread(one, page, PAGE, 0) == PAGE && page_is(page, 1, 1), "the shared mapping of a deleted file");
    CHECK(page_is(other + PAGE, 2, 2) && page_is(other, 3, 3), "the private mapping of a deleted file");
    static uint64_t round;
    CHECK(pwrite(one, &round, 8, 2 * PAGE) == 8 && *(uint64_t *)(memory + 2 * PAGE) == round, "the mapping is no longer that of its file");
    round++;
}

/* A connection of the process with itself. */
static void hold_own_connection(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = NEED(socket(AF_INET, SOCK_STREAM, 0));
    NEED(bind(listener, (void *)&address, length));
    NEED(listen(listener, 1));
    NEED(getsockname(listener, (void *)&address, &length));
    one = NEED(socket(AF_INET, SOCK_STREAM, 0));
    NEED(connect(one, (void *)&address, length));
    two = NEED(accept(listener, NULL, NULL));
    NEED(send(one, "waiting", 7, 0));
}

static void check_own_connection(void)
{
    char word[8] = "";
    CHECK(recv(two, word, 7, MSG_WAITALL) == 7 && !memcmp(word, "waiting", 7), "what waited in the connection is gone: %s", word);
    CHECK(send(two, "back", 4, MSG_NOSIGNAL) == 4 && recv(one, word, 4, MSG_WAITALL) == 4 && !memcmp(word, "back", 4), "the way back");
    CHECK(send(one, "waiting", 7, MSG_NOSIGNAL) == 7, "the way there: %s", strerror(errno));
}

/* A periodic timer that stands still until its signal is taken, which is only done at the end. */
static void hold_alarm(void)
{
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    NEED(sigprocmask(SIG_BLOCK, &alarm, NULL));
    struct itimerval tick = {{0, 5000}, {0, 5000}};
    NEED(setitimer(ITIMER_REAL, &tick, NULL));
    usleep(20000);
}

static void check_alarm(void)
{
    if (!told_to_go())
        return;
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    const struct timespec limit = {2, 0};
    CHECK(sigtimedwait(&alarm, NULL, &limit) == SIGALRM, "the timer has stopped");
}

static const struct {
    const char *name;
    void (*hold)(void), (*check)(void);
} things[] = {{"flock", hold_flock, check_flock}, {"record_lock", hold_record_lock, check_record_lock}, {"rights", hold_rights, check_rights},
              {"datagrams", hold_datagrams, check_datagrams}, {"sigio", hold_sigio, check_sigio}, {"secret", hold_secret, check_secret},
              {"mlockall", hold_everything_locked, check_everything_locked}, {"thread_fs", hold_thread, check_thread},
              {"thread_files", hold_thread, check_thread}, {"thread_user", hold_thread, check_thread},
              {"thread_seccomp", hold_thread, check_thread},
              {"mqueue", hold_queue, check_queue}, {"alarm", hold_alarm, check_alarm},
              {"own_connection", hold_own_connection, check_own_connection}, {"deleted_mapping", hold_deleted_mapping, check_deleted_mapping}};

void victim_edge(void)
{
    for (unsigned i = 0; victim_argc && i < COUNT(things); i++) {
        if (strcmp(victim_argv[0], things[i].name))
            continue;
        things[i].hold();
        ready();
        while (beat()) {
            checked();
            things[i].check();
        }
        return;
    }
    die("what edge?");
}
