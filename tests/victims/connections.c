/* connections ADDRESS [reuse=1] [mptcp=1]: a server of TCP connections on port 6200, which may listen by MPTCP. The first byte that a client sends says what its connection is for:
 *   e  every byte comes back
 *   g  bytes of the pattern come for ever
 *   c  what comes is compared with the pattern; at its end the count goes back, eight bytes
 *   h  as c, but nothing is read before the go
 *   x  a part of the pattern comes, all at once, and the connection closes
 *   w  nothing more is sent from the start; what comes is compared, and after its end the connection closes
 * Options of each connection are set when it is accepted and looked at all the time. */
#include "victim.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#define MOST 2000

static struct connection {
    int fd;
    char what;
    uint64_t position;
    unsigned char waiting[4096];
    size_t first, end;
} *connections;
static unsigned count;

static unsigned char pattern(uint64_t position)
{
    return (unsigned char)(position * 31 + (position >> 8) * 7 + (position >> 16));
}

static const struct {
    int level, name, value;
} options[] = {
    {IPPROTO_TCP, TCP_NODELAY, 1},      {SOL_SOCKET, SO_KEEPALIVE, 1},   {IPPROTO_TCP, TCP_KEEPIDLE, 77},
    {IPPROTO_TCP, TCP_KEEPINTVL, 11},   {IPPROTO_TCP, TCP_KEEPCNT, 5},   {IPPROTO_TCP, TCP_USER_TIMEOUT, 123456},
    {IPPROTO_TCP, TCP_LINGER2, 33},     {SOL_SOCKET, SO_PRIORITY, 4},    {SOL_SOCKET, SO_MARK, 0x1234},
    {SOL_SOCKET, SO_OOBINLINE, 1},      {SOL_SOCKET, SO_RCVLOWAT, 1},    {IPPROTO_TCP, TCP_NOTSENT_LOWAT, 1 << 20},
    {IPPROTO_TCP, TCP_QUICKACK, -1},    {SOL_SOCKET, SO_REUSEADDR, -1},  {SOL_SOCKET, SO_SNDBUF, -1},
    {IPPROTO_TCP, TCP_WINDOW_CLAMP, -1},
};
static int expected[COUNT(options)];

static int option_of(int fd, unsigned i)
{
    int value = -1;
    socklen_t length = sizeof value;
    getsockopt(fd, options[i].level, options[i].name, &value, &length);
    return value;
}

static void check_options(int fd)
{
    for (unsigned i = 0; i < COUNT(options); i++)
        if (options[i].value != -1 || options[i].name == SO_REUSEADDR)
            /* A socket in repair mode has its own idea of sharing: for an instant when an agent is killed. */
            CHECK(option_of(fd, i) == expected[i] || (options[i].name == SO_REUSEADDR && option_of(fd, i) == 2), "option %d:%d is %d instead of %d", options[i].level, options[i].name, option_of(fd, i), expected[i]);
    char name[16] = "";
    socklen_t length = sizeof name;
    CHECK(!getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length) && !strncmp(name, "reno", 4), "congestion control %.16s", name);
}

static void welcome(int fd)
{
    for (unsigned i = 0; i < COUNT(options); i++) {
        if (options[i].value != -1)
            NEED(setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof options[i].value));
        expected[i] = option_of(fd, i);
    }
    NEED(setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
    if (count == MOST)
        die("too many clients");
    connections[count++] = (struct connection){.fd = fd};
}

static void leave(struct connection *it)
{
    close(it->fd);
    *it = connections[--count];
}

static bool failed(ssize_t got)
{
    if (got >= 0 || errno == EAGAIN || errno == EINTR)
        return false;
    CHECK(false, "a connection broke: %s", strerror(errno));
    return true;
}

static void generate(struct connection *it)
{
    unsigned char bytes[16384];
    for (int round = 0; round < 16; round++) {
        for (unsigned i = 0; i < sizeof bytes; i++)
            bytes[i] = pattern(it->position + i);
        ssize_t sent = send(it->fd, bytes, sizeof bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EPIPE || errno == ECONNRESET) /* the client has had enough */
                leave(it);
            else
                failed(sent);
            return;
        }
        it->position += sent;
    }
}

static void echo(struct connection *it)
{
    if (it->first == it->end) {
        ssize_t got = recv(it->fd, it->waiting, sizeof it->waiting, MSG_DONTWAIT);
        if (failed(got) || got < 0)
            return;
        if (got == 0) {
            leave(it);
            return;
        }
        it->first = 0;
        it->end = got;
    }
    ssize_t sent = send(it->fd, it->waiting + it->first, it->end - it->first, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (!failed(sent) && sent > 0)
        it->first += sent;
}

static void compare(struct connection *it)
{
    static unsigned char bytes[65536];
    ssize_t got = recv(it->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (failed(got) || got < 0)
        return;
    for (ssize_t i = 0; i < got; i++)
        if (bytes[i] != pattern(it->position + i)) {
            CHECK(false, "byte %lu of a connection is wrong", (unsigned long)(it->position + i));
            break;
        }
    it->position += got;
    if (got == 0) {
        if (it->what != 'w')
            CHECK(send(it->fd, &it->position, 8, MSG_NOSIGNAL) == 8, "the count: %s", strerror(errno));
        leave(it);
    }
}

static void send_and_leave(struct connection *it)
{
    unsigned char bytes[256 << 10];
    for (unsigned i = 0; i < sizeof bytes; i++)
        bytes[i] = pattern(i);
    failed(send(it->fd, bytes, sizeof bytes, MSG_NOSIGNAL | MSG_DONTWAIT));
    leave(it);
}

static void begin(struct connection *it)
{
    ssize_t got = recv(it->fd, &it->what, 1, MSG_DONTWAIT);
    if (got == 0)
        leave(it);
    else if (got == 1 && it->what == 'w')
        NEED(shutdown(it->fd, SHUT_WR));
    else if (got == 1 && it->what == 'x')
        send_and_leave(it);
    else
        failed(got);
}

static void serve(struct connection *it, bool going)
{
    switch (it->what) {
    case 0: begin(it); break;
    case 'e': echo(it); break;
    case 'g': generate(it); break;
    case 'h': if (going) compare(it); break;
    default: compare(it);
    }
}

void victim_connections(void)
{
    const char *text = victim_argc ? victim_argv[0] : "127.0.0.1";
    bool wide = strchr(text, ':');
    struct sockaddr_in6 address6 = {.sin6_family = AF_INET6, .sin6_port = htons(6200)};
    struct sockaddr_in address4 = {.sin_family = AF_INET, .sin_port = htons(6200)};
    NEED(inet_pton(wide ? AF_INET6 : AF_INET, text, wide ? (void *)&address6.sin6_addr : (void *)&address4.sin_addr));
    int protocol = option("mptcp") ? 262 : 0;
    int listener = NEED(socket(wide ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK, protocol));
    int one = 1;
    if (option("reuse"))
        NEED(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    NEED(bind(listener, wide ? (void *)&address6 : (void *)&address4, wide ? sizeof address6 : sizeof address4));
    NEED(listen(listener, 128));
    struct pollfd *polled = calloc(MOST + 1, sizeof *polled);
    connections = calloc(MOST, sizeof *connections);
    if (!polled || !connections)
        die("no memory");
    ready();
    while (beat()) {
        bool going = told_to_go();
        polled[0] = (struct pollfd){listener, POLLIN, 0};
        unsigned now = count;
        for (unsigned i = 0; i < now; i++) {
            struct connection *it = &connections[i];
            short events = it->what == 'g' || it->first < it->end ? POLLOUT : it->what == 'h' && !going ? 0 : POLLIN;
            polled[i + 1] = (struct pollfd){it->fd, events, 0};
            check_options(it->fd);
        }
        checked();
        if (poll(polled, now + 1, 2) < 0)
            continue;
        /* From the last: one that leaves is replaced by the one behind. */
        for (unsigned i = now; i-- > 0;)
            if (polled[i + 1].revents)
                serve(&connections[i], going);
        int fd;
        while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0)
            welcome(fd);
    }
}
