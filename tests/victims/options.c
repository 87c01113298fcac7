/* options [PAIRS]: every option that a program can set on a TCP socket, on sockets that are made, listen, are connected and were accepted.
 * Each is set to something else than a new socket has, where that is allowed in this state; all of them have to stay as they were. So many
 * more pairs of connections stand beside them. With the word turn=1, options are set to something else all the time. */
#include "victim.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#define MOST 48 /* bytes of a value */

/* Numbers that older headers do not have. */
enum {
    PREFER_BUSY_POLL = 69, BUSY_POLL_BUDGET = 70, BUF_LOCK = 72, TXREHASH = 74, RCVMARK = 75, RCVPRIORITY = 82,
    RECVERR_RFC4884 = 26, LOCAL_PORT_RANGE = 51, IPV6_RFC4884 = 31, RTO_MAX_MS = 44, RTO_MIN_US = 45, DELACK_MAX_US = 46,
};
/* What an option is not set on, or not compared on. */
enum { CONNECTED = 1, ACCEPTED = 2, LISTENING = 4, MADE = 8, IP4 = 16, IP6 = 32, PEERED = CONNECTED | ACCEPTED };

#define NUMBER(level, name, value, except) {level, name, #name, except, {value}, sizeof(int)}
#define WORDS(level, name, except, ...) {level, name, #name, except, {__VA_ARGS__}, sizeof (int[]){__VA_ARGS__}}

static const struct option {
    int level, name;
    const char *text;
    int except;
    int value[4];
    socklen_t length;
} options[] = {
    NUMBER(SOL_SOCKET, SO_DEBUG, 1, 0),
    NUMBER(SOL_SOCKET, SO_REUSEADDR, 1, 0),
    NUMBER(SOL_SOCKET, SO_REUSEPORT, 1, 0),
    NUMBER(SOL_SOCKET, SO_KEEPALIVE, 1, 0),
    NUMBER(SOL_SOCKET, SO_OOBINLINE, 1, 0),
    NUMBER(SOL_SOCKET, SO_DONTROUTE, 1, 0),
    NUMBER(SOL_SOCKET, SO_BROADCAST, 1, 0),
    NUMBER(SOL_SOCKET, SO_RCVLOWAT, 3, 0),
    NUMBER(SOL_SOCKET, SO_SNDBUF, 70000, 0),
    NUMBER(SOL_SOCKET, SO_RCVBUF, 90000, 0),
    NUMBER(SOL_SOCKET, BUF_LOCK, 3, 0),
    NUMBER(SOL_SOCKET, SO_MARK, 0x4321, 0),
    NUMBER(SOL_SOCKET, RCVMARK, 1, 0),
    NUMBER(SOL_SOCKET, RCVPRIORITY, 1, 0),
    NUMBER(SOL_SOCKET, SO_RXQ_OVFL, 1, 0),
    NUMBER(SOL_SOCKET, SO_WIFI_STATUS, 1, 0),
    NUMBER(SOL_SOCKET, SO_PEEK_OFF, 2, 0),
    NUMBER(SOL_SOCKET, SO_SELECT_ERR_QUEUE, 1, 0),
    NUMBER(SOL_SOCKET, SO_BUSY_POLL, 60, 0),
    NUMBER(SOL_SOCKET, PREFER_BUSY_POLL, 1, 0),
    NUMBER(SOL_SOCKET, BUSY_POLL_BUDGET, 4, 0),
    /* Of a connection the kernel sets it with each packet. */
    NUMBER(SOL_SOCKET, SO_INCOMING_CPU, 0, PEERED),
    NUMBER(SOL_SOCKET, SO_ZEROCOPY, 1, 0),
    NUMBER(SOL_SOCKET, TXREHASH, 0, 0),
    NUMBER(SOL_SOCKET, 64 /* SO_TIMESTAMPNS_NEW */, 1, 0),
    WORDS(SOL_SOCKET, 65 /* SO_TIMESTAMPING_NEW */, 0, (1 << 3) | (1 << 4)), /* software, on arrival */
    WORDS(SOL_SOCKET, 65 /* the same */, LISTENING | MADE, (1 << 3) | (1 << 4) | (1 << 7)), /* and numbered */
    WORDS(SOL_SOCKET, SO_LINGER, 0, 1, 7),
    WORDS(SOL_SOCKET, SO_RCVTIMEO, 0, 3, 0, 400000, 0),
    WORDS(SOL_SOCKET, SO_SNDTIMEO, 0, 4, 0, 500000, 0),
    WORDS(SOL_SOCKET, SO_MAX_PACING_RATE, 0, 123456789, 0),
    WORDS(SOL_SOCKET, SO_TXTIME, 0, CLOCK_MONOTONIC, 2), /* reports errors */
    WORDS(SOL_SOCKET, SO_BINDTODEVICE, 0, 'l' | 'o' << 8),
    NUMBER(IPPROTO_IP, IP_TOS, 0x48, 0),
    NUMBER(IPPROTO_IP, IP_TTL, 33, 0),
    NUMBER(IPPROTO_IP, IP_MINTTL, 5, 0),
    NUMBER(IPPROTO_IP, IP_FREEBIND, 1, 0),
    NUMBER(IPPROTO_IP, IP_TRANSPARENT, 1, 0),
    NUMBER(IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO, 0),
    NUMBER(IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1, 0),
    NUMBER(IPPROTO_IP, IP_PKTINFO, 1, 0),
    NUMBER(IPPROTO_IP, IP_RECVTTL, 1, 0),
    NUMBER(IPPROTO_IP, IP_RECVTOS, 1, 0),
    NUMBER(IPPROTO_IP, IP_RECVOPTS, 1, 0),
    NUMBER(IPPROTO_IP, IP_RETOPTS, 1, 0),
    NUMBER(IPPROTO_IP, IP_RECVERR, 1, 0),
    NUMBER(IPPROTO_IP, RECVERR_RFC4884, 1, 0),
    NUMBER(IPPROTO_IP, IP_RECVORIGDSTADDR, 1, 0),
    NUMBER(IPPROTO_IP, IP_CHECKSUM, 1, 0),
    NUMBER(IPPROTO_IP, IP_RECVFRAGSIZE, 1, 0),
    NUMBER(IPPROTO_IP, IP_PASSSEC, 1, 0),
    NUMBER(IPPROTO_IP, LOCAL_PORT_RANGE, 30000 | 60000 << 16, 0),
    WORDS(IPPROTO_IP, IP_OPTIONS, IP6, 0x01010101), /* nothing, four times */
    /* Whoever binds to an address of IPv6 gets it, and nothing takes it away again. */
    NUMBER(IPPROTO_IPV6, IPV6_V6ONLY, 1, IP4 | CONNECTED),
    NUMBER(IPPROTO_IPV6, IPV6_TCLASS, 0x68, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_UNICAST_HOPS, 44, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_MINHOPCOUNT, 4, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_TRANSPARENT, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_FREEBIND, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_DONTFRAG, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVERR, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RFC4884, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVPKTINFO, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVTCLASS, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVRTHDR, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVHOPOPTS, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVDSTOPTS, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVPATHMTU, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_RECVFRAGSIZE, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_2292PKTINFO, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_2292HOPLIMIT, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_2292HOPOPTS, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_2292DSTOPTS, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, 0, IP4),
    NUMBER(IPPROTO_IPV6, 33 /* IPV6_FLOWINFO_SEND */, 1, IP4),
    NUMBER(IPPROTO_IPV6, 11 /* IPV6_FLOWINFO */, 1, IP4),
    NUMBER(IPPROTO_IPV6, IPV6_ADDR_PREFERENCES, 2, IP4),
    NUMBER(IPPROTO_TCP, TCP_NODELAY, 1, 0),
    NUMBER(IPPROTO_TCP, TCP_CORK, 1, 0),
    /* Of a connection it is what was agreed on. */
    NUMBER(IPPROTO_TCP, TCP_MAXSEG, 1000, PEERED),
    NUMBER(IPPROTO_TCP, TCP_KEEPIDLE, 71, 0),
    NUMBER(IPPROTO_TCP, TCP_KEEPINTVL, 12, 0),
    NUMBER(IPPROTO_TCP, TCP_KEEPCNT, 6, 0),
    NUMBER(IPPROTO_TCP, TCP_SYNCNT, 3, 0),
    NUMBER(IPPROTO_TCP, TCP_LINGER2, 34, 0),
    NUMBER(IPPROTO_TCP, TCP_DEFER_ACCEPT, 5, 0),
    NUMBER(IPPROTO_TCP, TCP_WINDOW_CLAMP, 40000, 0),
    NUMBER(IPPROTO_TCP, TCP_USER_TIMEOUT, 65432, 0),
    NUMBER(IPPROTO_TCP, TCP_FASTOPEN, 17, 0),
    NUMBER(IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1, 0),
    NUMBER(IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1, 0),
    WORDS(IPPROTO_TCP, TCP_FASTOPEN_KEY, PEERED, 0x11223344, 0x55667788, 0x12345678, 0x7abcdef0),
    NUMBER(IPPROTO_TCP, TCP_NOTSENT_LOWAT, 54321, 0),
    NUMBER(IPPROTO_TCP, TCP_SAVE_SYN, 1, 0),
    NUMBER(IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1, 0),
    NUMBER(IPPROTO_TCP, TCP_THIN_DUPACK, 1, 0),
    NUMBER(IPPROTO_TCP, TCP_INQ, 1, 0),
    NUMBER(IPPROTO_TCP, TCP_QUICKACK, 0, LISTENING), /* listen(2) forgets it */
    NUMBER(IPPROTO_TCP, TCP_TX_DELAY, 77, 0),
    NUMBER(IPPROTO_TCP, RTO_MAX_MS, 30000, 0),
    NUMBER(IPPROTO_TCP, RTO_MIN_US, 150000, 0),
    NUMBER(IPPROTO_TCP, DELACK_MAX_US, 30000, 0),
    WORDS(IPPROTO_TCP, TCP_CONGESTION, 0, 'r' | 'e' << 8 | 'n' << 16 | 'o' << 24),
    /* N.B. last: the type of service changes it. */
    NUMBER(SOL_SOCKET, SO_PRIORITY, 3, 0),
};

static struct subject {
    int fd, kind;
    const char *text;
    struct { unsigned char bytes[MOST]; socklen_t length; } before[COUNT(options)];
} subjects[8];
static unsigned count, set;

static socklen_t look(int fd, const struct option *it, unsigned char *bytes)
{
    socklen_t length = MOST;
    memset(bytes, 0, MOST);
    /* Only as much as fits is told of some. */
    return getsockopt(fd, it->level, it->name, bytes, &length) ? 0 : length;
}

static bool same_kind(const struct subject *it, const struct option *option)
{
    /* A socket of one family has the options of its own. */
    return !(it->kind & option->except);
}

static void add(int fd, int kind, const char *text)
{
    struct subject *it = &subjects[count++];
    *it = (struct subject){.fd = fd, .kind = kind, .text = text};
    for (unsigned i = 0; i < COUNT(options); i++) {
        const struct option *option = &options[i];
        if (!same_kind(it, option))
            continue;
        if (setsockopt(fd, option->level, option->name, option->value, option->length) == 0)
            set++;
        else
            say("%s: %s cannot be set: %s", text, option->text, strerror(errno));
    }
    for (unsigned i = 0; i < COUNT(options); i++)
        it->before[i].length = look(fd, &options[i], it->before[i].bytes);
}

static void check(struct subject *it)
{
    for (unsigned i = 0; i < COUNT(options); i++) {
        unsigned char now[MOST];
        if (!same_kind(it, &options[i]))
            continue;
        socklen_t length = look(it->fd, &options[i], now);
        CHECK(length == it->before[i].length && !memcmp(now, it->before[i].bytes, MOST), "%s: %s is %d, %d instead of %d, %d", it->text,
              options[i].text, ((int *)now)[0], ((int *)now)[1], ((int *)it->before[i].bytes)[0], ((int *)it->before[i].bytes)[1]);
    }
}

static void family(bool wide, const char *texts[4])
{
    struct sockaddr_in6 address6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct sockaddr_in address4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr *address = wide ? (void *)&address6 : (void *)&address4;
    socklen_t length = wide ? sizeof address6 : sizeof address4;
    int domain = wide ? AF_INET6 : AF_INET, version = wide ? IP6 : IP4;
    int listener = NEED(socket(domain, SOCK_STREAM, 0));
    NEED(bind(listener, address, length));
    NEED(listen(listener, 10));
    NEED(getsockname(listener, address, &length));
    for (long pairs = argument(0, 0); pairs > 0; pairs--) {
        NEED(connect(NEED(socket(domain, SOCK_STREAM, 0)), address, length));
        NEED(accept(listener, NULL, NULL));
    }
    int client = NEED(socket(domain, SOCK_STREAM, 0));
    NEED(connect(client, address, length));
    int accepted = NEED(accept(listener, NULL, NULL));
    add(NEED(socket(domain, SOCK_STREAM, 0)), MADE | version, texts[0]);
    add(listener, LISTENING | version, texts[1]);
    add(client, CONNECTED | version, texts[2]);
    add(accepted, ACCEPTED | version, texts[3]);
}

/* Sets an option of a connection to something else; how often connections are probed is no more than a number to the kernel. */
static void turn(struct subject *it)
{
    static int value;
    if (!(it->kind & PEERED))
        return;
    value = value % 1000 + 1;
    CHECK(setsockopt(it->fd, IPPROTO_TCP, TCP_KEEPINTVL, &value, sizeof value) == 0, "%s: TCP_KEEPINTVL %d", it->text, value);
    for (unsigned i = 0; i < COUNT(options); i++)
        if (options[i].level == IPPROTO_TCP && options[i].name == TCP_KEEPINTVL)
            it->before[i].length = look(it->fd, &options[i], it->before[i].bytes);
}

void victim_options(void)
{
    bool turns = option("turn");
    family(false, (const char *[]){"made", "listening", "connected", "accepted"});
    family(true, (const char *[]){"made6", "listening6", "connected6", "accepted6"});
    say("%u options are set", set);
    /* Some are newer than the oldest kernel that this runs on. */
    if (set < 500)
        die("too few options could be set");
    ready();
    while (beat())
        for (unsigned i = 0; i < count; i++) {
            check(&subjects[i]);
            if (turns)
                turn(&subjects[i]);
        }
}
