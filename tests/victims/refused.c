/* refused THING,THING... [silent=1]: holds things that cannot be moved, any number of them at once, and checks that they go on working.
 * With `silent` nothing is said over connections, which may be left behind. */
#include "victim.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/io_uring.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

static int ends[2] = {-1, -1};
static pid_t child;

/* Connects two sockets to each other, after something was done to the one that listens and the one that connects. */
static void connect_ends(int protocol, void (*prepare)(int))
{
    int listener = NEED(socket(AF_INET, SOCK_STREAM, protocol));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    NEED(bind(listener, (void *)&address, length));
    if (prepare)
        prepare(listener);
    NEED(listen(listener, 1));
    NEED(getsockname(listener, (void *)&address, &length));
    ends[0] = NEED(socket(AF_INET, SOCK_STREAM, protocol));
    if (prepare)
        prepare(ends[0]);
    NEED(connect(ends[0], (void *)&address, length));
    ends[1] = NEED(accept(listener, NULL, NULL));
    close(listener);
}

/* Has segments to and from this host signed (TCP_MD5SIG). */
static void sign(int fd)
{
    struct tcp_md5sig key = {.tcpm_keylen = 6, .tcpm_key = "secret"};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    memcpy(&key.tcpm_addr, &address, sizeof address);
    if (setsockopt(fd, IPPROTO_TCP, TCP_MD5SIG, &key, sizeof key))
        not_here("no TCP_MD5SIG");
}

static void signed_connection(void) { connect_ends(0, sign); }

static void signed_listener(void)
{
    int fd = NEED(socket(AF_INET6, SOCK_STREAM, 0));
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(6203)};
    NEED(bind(fd, (void *)&address, sizeof address));
    struct tcp_md5sig key = {.tcpm_keylen = 6, .tcpm_key = "secret"};
    address.sin6_addr = in6addr_loopback;
    memcpy(&key.tcpm_addr, &address, sizeof address);
    if (setsockopt(fd, IPPROTO_TCP, TCP_MD5SIG, &key, sizeof key))
        not_here("no TCP_MD5SIG");
    NEED(listen(fd, 5));
}

/* A datagram that is half made. */
static void udp(void)
{
    int one = 1, fd = NEED(socket(AF_INET, SOCK_DGRAM, 0));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(6200), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    NEED(bind(fd, (void *)&address, sizeof address));
    NEED(connect(fd, (void *)&address, sizeof address));
    NEED(setsockopt(fd, IPPROTO_UDP, UDP_CORK, &one, sizeof one));
    NEED(send(fd, "half", 4, 0));
}

static void more(void)
{
    int fd = NEED(socket(AF_INET, SOCK_DGRAM, 0));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(6201), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    NEED(connect(fd, (void *)&address, sizeof address));
    NEED(send(fd, "half", 4, MSG_MORE));
}

static void ring(void)
{
    int fd = NEED(socket(AF_PACKET, SOCK_RAW, 0));
    struct tpacket_req request = {4096, 4, 2048, 8};
    NEED(setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request));
}

static void fanout(void)
{
    int with = 77, fd = NEED(socket(AF_PACKET, SOCK_RAW, htons(0x88b5)));
    NEED(setsockopt(fd, SOL_PACKET, PACKET_FANOUT, &with, sizeof with));
}

static void mptcp(void) { connect_ends(262, NULL); }

/* A program that takes all of a packet, attached to a socket. */
static void ebpf(void)
{
    struct bpf_insn program[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0xffff}, {.code = BPF_JMP | BPF_EXIT}};
    union bpf_attr attributes = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insns = (uintptr_t)program, .insn_cnt = 2, .license = (uintptr_t) "GPL"};
    int filter = syscall(SYS_bpf, BPF_PROG_LOAD, &attributes, sizeof attributes);
    if (filter < 0)
        not_here("no eBPF");
    int fd = NEED(socket(AF_INET, SOCK_DGRAM, 0));
    NEED(setsockopt(fd, SOL_SOCKET, SO_ATTACH_BPF, &filter, sizeof filter));
    close(filter);
}

/* A socket that is bound to an interface which only this host has. */
static void bound_to_device(void)
{
    int fd = NEED(socket(AF_INET, SOCK_STREAM, 0));
    NEED(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "only0", sizeof "only0"));
}

static void child_process(void)
{
    child = NEED(fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        signal(SIGTERM, SIG_DFL);
        for (;;)
            pause();
    }
}

static void io_uring(void)
{
    struct io_uring_params parameters = {0};
    if (syscall(SYS_io_uring_setup, 8, &parameters) < 0)
        not_here("no io_uring");
}

static void userfaultfd(void)
{
    NEED(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
}

static void mount_namespace(void) { NEED(unshare(CLONE_NEWNS)); }

static void netlink(void) { NEED(socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER)); }

/* An answer that nobody reads. */
static void answer(void)
{
    int fd = NEED(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
    struct {
        struct nlmsghdr header;
        struct rtgenmsg family;
    } question = {{sizeof question, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0}, {AF_UNSPEC}};
    NEED(send(fd, &question, sizeof question, 0));
}

/* Bound to an interface that only this host has; the test makes it. */
static void interface(void)
{
    int fd = NEED(socket(AF_INET, SOCK_RAW, 200));
    NEED(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "only0", 5));
}

static void pidfd(void) { NEED(syscall(SYS_pidfd_open, getpid(), 0)); }

static void fanotify(void) { NEED(fanotify_init(FAN_CLASS_NOTIF, O_RDONLY)); }

static void terminal(void)
{
    int master = NEED(posix_openpt(O_RDWR | O_NOCTTY));
    NEED(grantpt(master) | unlockpt(master));
}

static void connected_unix(void)
{
    int listener = NEED(socket(AF_UNIX, SOCK_STREAM, 0));
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "\0godwit refused"};
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + 15;
    NEED(bind(listener, (void *)&address, length));
    NEED(listen(listener, 1));
    int client = NEED(socket(AF_UNIX, SOCK_STREAM, 0));
    NEED(connect(client, (void *)&address, length));
}

/* A pipe whose other end is in another process. */
static void foreign_pipe(void)
{
    int pipe_ends[2];
    NEED(pipe(pipe_ends));
    if (!child)
        child_process();
    close(pipe_ends[0]);
}

/* A file of /dev/net/tun whose frames are filtered. */
static void filtered_tap(void)
{
    int fd = NEED(open("/dev/net/tun", O_RDWR));
    struct ifreq request = {.ifr_name = "tap7", .ifr_flags = IFF_TAP | IFF_NO_PI};
    NEED(ioctl(fd, TUNSETIFF, &request));
    static struct sock_filter all = {BPF_RET | BPF_K, 0, 0, 0xffff};
    NEED(ioctl(fd, TUNATTACHFILTER, &(struct sock_fprog){1, &all}));
}

static const struct {
    const char *name;
    void (*hold)(void);
} things[] = {{"udp", udp}, {"child", child_process}, {"io_uring", io_uring}, {"userfaultfd", userfaultfd},
              {"mount", mount_namespace}, {"netlink", netlink}, {"answer", answer}, {"more", more}, {"ring", ring},
              {"fanout", fanout}, {"mptcp", mptcp}, {"signed", signed_connection}, {"signed_listener", signed_listener}, {"ebpf", ebpf}, {"interface", interface}, {"device", bound_to_device},
              {"tap", filtered_tap}, {"pidfd", pidfd}, {"fanotify", fanotify}, {"terminal", terminal}, {"unix", connected_unix}, {"foreign_pipe", foreign_pipe}};

static void hold(const char *name)
{
    for (unsigned i = 0; i < COUNT(things); i++)
        if (!strcmp(things[i].name, name)) {
            things[i].hold();
            return;
        }
    die("nothing is called %s", name);
}

void victim_refused(void)
{
    char list[512];
    snprintf(list, sizeof list, "%s", victim_argc ? victim_argv[0] : "udp");
    for (char *save, *name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save))
        hold(name);
    ready();
    for (uint64_t round = 0; beat(); round++) {
        uint64_t back = 0;
        checked();
        if (ends[0] >= 0 && !option("silent"))
            CHECK(write(ends[0], &round, 8) == 8 && read(ends[1], &back, 8) == 8 && back == round, "the connection: %s", strerror(errno));
        if (child)
            CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child is dead");
    }
    if (child)
        kill(child, SIGKILL);
}
