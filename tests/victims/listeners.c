/* listeners: listening sockets of TCP over IPv4 and IPv6, of MPTCP, and of UNIX, by path and abstract. Once told to go, they accept
 * connections; those of MPTCP both kinds. And MPTCP sockets that do not listen yet, and what is left of connections whose peers have ended
 * them: by one that was accepted, and by one that had asked for its port. */
#include "victim.h"
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

static struct listener {
    const char *name;
    int fd, type;
    socklen_t length;
    struct sockaddr_storage address;
} listeners[7];
static unsigned count;

static struct listener *add(const char *name, int fd, int backlog)
{
    struct listener *new = &listeners[count++];
    *new = (struct listener){.name = name, .fd = fd, .length = sizeof new->address};
    NEED(listen(fd, backlog));
    NEED(getsockname(fd, (void *)&new->address, &new->length));
    return new;
}

static int bound_ip4(void)
{
    int one = 1, fd = NEED(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(6100), .sin_addr = {htonl(INADDR_ANY)}};
    NEED(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    NEED(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one));
    NEED(bind(fd, (void *)&address, sizeof address));
    return fd;
}

static int bound_ip6(void)
{
    int one = 1, fd = NEED(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0));
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(6100), .sin6_addr = in6addr_any};
    NEED(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one));
    NEED(bind(fd, (void *)&address, sizeof address));
    return fd;
}

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

/* MPTCP sockets that are only bound, and not even that. */
static int only_bound, unbound;

static int bound_mptcp4(int port)
{
    int one = 1, idle = 77, fd = NEED(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_MPTCP));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_ANY)}};
    NEED(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    NEED(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one));
    NEED(setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle));
    NEED(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one));
    NEED(setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
    NEED(bind(fd, (void *)&address, sizeof address));
    return fd;
}

static int bound_mptcp6(void)
{
    int one = 1, fd = NEED(socket(AF_INET6, SOCK_STREAM, IPPROTO_MPTCP));
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(6101), .sin6_addr = in6addr_any};
    NEED(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one));
    NEED(bind(fd, (void *)&address, sizeof address));
    return fd;
}

static int bound_unix(int type, const char *name, bool abstract)
{
    int fd = NEED(socket(AF_UNIX, type, 0));
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path + abstract, sizeof address.sun_path - 1, "%s", name);
    NEED(bind(fd, (void *)&address, offsetof(struct sockaddr_un, sun_path) + abstract + strlen(name) + !abstract));
    return fd;
}

static int option_of(int fd, int level, int name)
{
    int value = -1;
    socklen_t length = sizeof value;
    getsockopt(fd, level, name, &value, &length);
    return value;
}

static unsigned backlog_of(int fd)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length);
    return info.tcpi_sacked;
}

static void check_mptcp(int fd, const char *name)
{
    char algorithm[16] = "";
    socklen_t length = sizeof algorithm;
    CHECK_EQUAL(option_of(fd, SOL_SOCKET, SO_PROTOCOL), IPPROTO_MPTCP, name);
    CHECK_EQUAL(option_of(fd, SOL_SOCKET, SO_KEEPALIVE), 1, name);
    CHECK_EQUAL(option_of(fd, IPPROTO_TCP, TCP_KEEPIDLE), 77, name);
    CHECK_EQUAL(option_of(fd, IPPROTO_TCP, TCP_NODELAY), 1, name);
    CHECK(!getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, algorithm, &length) && !strncmp(algorithm, "reno", 4), "%s: congestion control %.16s", name, algorithm);
}

static void check_still(struct listener *listener)
{
    struct sockaddr_storage address = {0};
    socklen_t length = sizeof address;
    CHECK_EQUAL(option_of(listener->fd, SOL_SOCKET, SO_ACCEPTCONN), 1, listener->name);
    CHECK(!getsockname(listener->fd, (void *)&address, &length) && length == listener->length && !memcmp(&address, &listener->address, length),
          "%s: another address", listener->name);
    struct pollfd one = {.fd = listener->fd, .events = POLLIN};
    CHECK(poll(&one, 1, 0) == 0, "%s: a connection that nobody made", listener->name);
}

/* Connects to itself by a protocol, says something, and closes: nothing is left of it afterwards. */
static void check_accept(struct listener *listener, int protocol)
{
    struct sockaddr_storage address = listener->address;
    if (address.ss_family == AF_INET6)
        ((struct sockaddr_in6 *)&address)->sin6_addr = in6addr_loopback;
    int type = option_of(listener->fd, SOL_SOCKET, SO_TYPE);
    int client = socket(address.ss_family, type | SOCK_CLOEXEC, protocol);
    CHECK(connect(client, (void *)&address, listener->length) == 0, "%s: connect: %s", listener->name, strerror(errno));
    struct pollfd one = {.fd = listener->fd, .events = POLLIN};
    int came;
    while ((came = poll(&one, 1, 2000)) < 0 && errno == EINTR)
        ;
    CHECK(came == 1, "%s: no connection comes", listener->name);
    int server = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
    char word[6] = "";
    CHECK(server >= 0 && write(client, "hello", 6) == 6 && read(server, word, 6) == 6 && !strcmp(word, "hello"), "%s: accept: %s",
          listener->name, strerror(errno));
    if (address.ss_family != AF_UNIX)
        CHECK_EQUAL(option_of(server, SOL_SOCKET, SO_PROTOCOL), protocol ? protocol : IPPROTO_TCP, listener->name);
    close(client);
    close(server);
}

/* A connection that its peer has reset, as the accepting end and as the other one, which has bound itself before. And one that was refused,
 * which the program has yet to hear of: it may ask again by the same socket. */
static int reset_accepted, reset_bound, refused;

static void make_refused(void)
{
    struct sockaddr_in nobody = {.sin_family = AF_INET, .sin_port = htons(6104), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    refused = NEED(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    CHECK(connect(refused, (void *)&nobody, sizeof nobody) == -1 && errno == EINPROGRESS, "connect: %s", strerror(errno));
    struct pollfd one = {.fd = refused, .events = POLLOUT};
    NEED(poll(&one, 1, 2000));
}

static void check_refused(struct listener *listener)
{
    struct sockaddr_in to = *(struct sockaddr_in *)&listener->address;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    /* What it has not heard of may be told, once. */
    if (connect(refused, (void *)&to, sizeof to) == -1 && errno == ECONNREFUSED)
        connect(refused, (void *)&to, sizeof to);
    struct pollfd one = {.fd = refused, .events = POLLOUT};
    CHECK(poll(&one, 1, 2000) == 1 && option_of(refused, SOL_SOCKET, SO_ERROR) == 0, "asking again");
    int server = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
    CHECK(server >= 0 && write(refused, "x", 1) == 1, "it was asked for again, and is dead: %s", strerror(errno));
    close(server);
    close(refused);
    refused = -1;
}

static void make_reset(struct listener *listener)
{
    struct linger at_once = {1, 0};
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(6103), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in to = *(struct sockaddr_in *)&listener->address;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int accepted = 0; accepted < 2; accepted++) {
        int one = 1, client = NEED(socket(AF_INET, SOCK_STREAM, 0));
        NEED(setsockopt(client, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
        if (!accepted)
            NEED(bind(client, (void *)&own, sizeof own));
        NEED(connect(client, (void *)&to, sizeof to));
        int server = NEED(accept(listener->fd, NULL, NULL)), ends = accepted ? client : server, stays = accepted ? server : client;
        NEED(setsockopt(ends, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once));
        NEED(close(ends));
        char byte;
        CHECK(recv(stays, &byte, 1, 0) == -1 && errno == ECONNRESET, "it is reset");
        *(accepted ? &reset_accepted : &reset_bound) = stays;
    }
}

static void check_reset(void)
{
    char byte;
    struct sockaddr_in address = {0};
    socklen_t length = sizeof address;
    CHECK(recv(reset_accepted, &byte, 1, 0) == 0, "a connection that was reset: %s", strerror(errno));
    CHECK(getpeername(reset_accepted, (void *)&address, &length) == -1 && errno == ENOTCONN, "it has a peer");
    length = sizeof address;
    CHECK(!getsockname(reset_bound, (void *)&address, &length) && ntohs(address.sin_port) == 6103, "it was bound to port 6103, and is to %d",
          ntohs(address.sin_port));
}

void victim_listeners(void)
{
    add("TCP over IPv4", bound_ip4(), 17);
    add("TCP over IPv6", bound_ip6(), 128);
    add("MPTCP over IPv4", bound_mptcp4(6101), 19);
    add("MPTCP over IPv6", bound_mptcp6(), 5);
    only_bound = bound_mptcp4(6102);
    unbound = NEED(socket(AF_INET6, SOCK_STREAM, IPPROTO_MPTCP));
    add("UNIX stream", bound_unix(SOCK_STREAM, in_dir("stream"), false), 5);
    add("UNIX packets", bound_unix(SOCK_SEQPACKET, in_dir("packets"), false), 5);
    add("abstract UNIX", bound_unix(SOCK_STREAM | SOCK_CLOEXEC, "godwit victim", true), 5);
    make_reset(&listeners[0]);
    make_refused();
    ready();
    while (beat()) {
        check_reset();
        for (unsigned i = 0; i < count; i++)
            check_still(&listeners[i]);
        CHECK_EQUAL(option_of(listeners[0].fd, SOL_SOCKET, SO_REUSEADDR), 1, "SO_REUSEADDR");
        CHECK_EQUAL(option_of(listeners[0].fd, IPPROTO_TCP, TCP_NODELAY), 1, "TCP_NODELAY");
        CHECK_EQUAL(option_of(listeners[1].fd, IPPROTO_IPV6, IPV6_V6ONLY), 1, "IPV6_V6ONLY");
        check_mptcp(listeners[2].fd, "an MPTCP listener");
        check_mptcp(only_bound, "a bound MPTCP socket");
        CHECK_EQUAL(option_of(listeners[3].fd, IPPROTO_IPV6, IPV6_V6ONLY), 1, "IPV6_V6ONLY of MPTCP");
        CHECK_EQUAL(option_of(unbound, SOL_SOCKET, SO_PROTOCOL), IPPROTO_MPTCP, "an unbound MPTCP socket");
        CHECK_EQUAL(backlog_of(listeners[0].fd), 17, "backlog");
        CHECK_EQUAL(backlog_of(listeners[2].fd), 19, "backlog of MPTCP");
        CHECK_EQUAL(fcntl(listeners[1].fd, F_GETFL) & O_NONBLOCK, O_NONBLOCK, "non-blocking");
        CHECK_EQUAL(fcntl(listeners[0].fd, F_GETFD), FD_CLOEXEC, "close-on-exec");
        if (told_to_go() && refused >= 0)
            check_refused(&listeners[0]);
        for (unsigned i = 0; told_to_go() && i < count; i++)
            check_accept(&listeners[i], 0);
        for (unsigned i = 2; told_to_go() && i < 4; i++)
            check_accept(&listeners[i], IPPROTO_MPTCP);
    }
}
