/* datagrams [ADDRESS [MIB]]: sockets of datagrams and packets of all kinds, each with options that are looked at all the time. Some
 * talk to each other without pause; some have a queue that nobody reads before the go: then every datagram must be there, in
 * order, with its sender and what else came with it, and nothing more. With an address, a server at its port 6300 sends every
 * datagram back, and has so much memory besides. */
#include "victim.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/icmp6.h>
#include <netinet/ip_icmp.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sys/socket.h>

#define MOST 200

/* The loopback device has this number on every host. */
static const unsigned loopback = 1;

/* Options and what they were at first. */
static struct looked_at {
    int fd, level, name;
    socklen_t length;
    unsigned char value[64];
} looked_at[MOST];
static unsigned count;

static void look_at(int fd, int level, int name)
{
    struct looked_at *it = &looked_at[count++];
    *it = (struct looked_at){fd, level, name, sizeof it->value, {0}};
    if (count == MOST)
        die("too many options");
    if (getsockopt(fd, level, name, it->value, &it->length))
        die("option %d:%d: %s", level, name, strerror(errno));
}

static void set(int fd, int level, int name, int value)
{
    if (setsockopt(fd, level, name, &value, sizeof value))
        die("option %d:%d: %s", level, name, strerror(errno));
    look_at(fd, level, name);
}

static void check_options(void)
{
    for (unsigned i = 0; i < count; i++) {
        struct looked_at *it = &looked_at[i];
        unsigned char value[64] = {0};
        socklen_t length = sizeof value;
        int got = getsockopt(it->fd, it->level, it->name, value, &length);
        CHECK(!got && length == it->length && !memcmp(value, it->value, length), "fd %d, option %d:%d is %d (length %u) instead of %d",
              it->fd, it->level, it->name, *(int *)value, length, *(int *)it->value);
    }
}

/* Sockets whose own address and peer are looked at. */
static struct place {
    int fd;
    socklen_t own_length, peer_length;
    struct sockaddr_storage own, peer;
} places[40];
static unsigned place_count;

static int keep(int fd)
{
    struct place *it = &places[place_count++];
    *it = (struct place){.fd = fd, .own_length = sizeof it->own, .peer_length = sizeof it->peer};
    NEED(getsockname(fd, (void *)&it->own, &it->own_length));
    if (getpeername(fd, (void *)&it->peer, &it->peer_length))
        it->peer_length = 0;
    return fd;
}

static void check_places(void)
{
    for (unsigned i = 0; i < place_count; i++) {
        struct place *it = &places[i], now = {.own_length = sizeof now.own, .peer_length = sizeof now.peer};
        CHECK(!getsockname(it->fd, (void *)&now.own, &now.own_length), "fd %d has no address", it->fd);
        if (getpeername(it->fd, (void *)&now.peer, &now.peer_length))
            now.peer_length = 0;
        /* The number of an interface may be another one: it is looked at by name. */
        if (it->own.ss_family == AF_PACKET)
            ((struct sockaddr_ll *)&now.own)->sll_ifindex = ((struct sockaddr_ll *)&it->own)->sll_ifindex;
        CHECK(it->own_length == now.own_length && !memcmp(&it->own, &now.own, now.own_length), "fd %d has another address", it->fd);
        CHECK(it->peer_length == now.peer_length && !memcmp(&it->peer, &now.peer, now.peer_length), "fd %d has another peer", it->fd);
    }
}

static struct sockaddr_in at4(const char *text, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    NEED(inet_pton(AF_INET, text, &address.sin_addr));
    return address;
}

static struct sockaddr_in6 at6(const char *text, int port)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    NEED(inet_pton(AF_INET6, text, &address.sin6_addr));
    return address;
}

static int bound4(int type, const char *text, int port)
{
    struct sockaddr_in address = at4(text, port);
    int fd = NEED(socket(AF_INET, type, 0));
    NEED(bind(fd, (void *)&address, sizeof address));
    return fd;
}

static int bound6(int type, const char *text, int port)
{
    struct sockaddr_in6 address = at6(text, port);
    int fd = NEED(socket(AF_INET6, type, 0));
    NEED(bind(fd, (void *)&address, sizeof address));
    return fd;
}

/* ---- queues ---- */

static const unsigned sizes[] = {5, 0, 1, 1400, 0, 60000, 3};

static unsigned char byte_of(unsigned queue, unsigned index, unsigned position)
{
    return (unsigned char)mix((uint64_t)queue << 40 | (uint64_t)index << 20 | position);
}

static struct queue {
    int fd;
    unsigned number;
    struct sockaddr_storage sender, other;
} queues[3];

static void fill(struct queue *queue, int fd, int first, int second, const void *to, socklen_t length)
{
    static unsigned char bytes[65536];
    static unsigned number;
    *queue = (struct queue){.fd = fd, .number = number++};
    socklen_t size = sizeof queue->sender;
    for (unsigned i = 0; i < COUNT(sizes); i++) {
        for (unsigned at = 0; at < sizes[i]; at++)
            bytes[at] = byte_of(queue->number, i, at);
        NEED(sendto(i % 2 ? second : first, bytes, sizes[i], 0, to, length));
    }
    NEED(getsockname(first, (void *)&queue->sender, &size));
    size = sizeof queue->other;
    NEED(getsockname(second, (void *)&queue->other, &size));
}

static unsigned port_of(const struct sockaddr_storage *address) { return ntohs(((const struct sockaddr_in *)address)->sin_port); }

static void empty(struct queue *queue, const char *to, int ttl, int tos)
{
    static unsigned char bytes[65536];
    char control[256];
    for (unsigned i = 0; i < COUNT(sizes); i++) {
        struct sockaddr_storage from = {0};
        struct iovec piece = {bytes, sizeof bytes};
        struct msghdr header = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(queue->fd, &header, MSG_DONTWAIT);
        CHECK(got == (ssize_t)sizes[i], "queue %u, datagram %u: %zd bytes instead of %u (%s)", queue->number, i, got, sizes[i], got < 0 ? strerror(errno) : "");
        bool right = true;
        for (ssize_t at = 0; at < got; at++)
            right &= bytes[at] == byte_of(queue->number, i, at);
        CHECK(right, "queue %u, datagram %u has wrong bytes", queue->number, i);
        CHECK_EQUAL(port_of(&from), port_of(i % 2 ? &queue->other : &queue->sender), "port of a sender");
        char text[64] = "", wanted[64] = "";
        if (from.ss_family == AF_INET6) {
            inet_ntop(AF_INET6, &((struct sockaddr_in6 *)&from)->sin6_addr, text, sizeof text);
        } else {
            inet_ntop(AF_INET, &((struct sockaddr_in *)&from)->sin_addr, text, sizeof text);
        }
        snprintf(wanted, sizeof wanted, "%s", to);
        CHECK(!strcmp(text, wanted), "queue %u, datagram %u comes from %s instead of %s", queue->number, i, text, wanted);
        int seen = 0;
        for (struct cmsghdr *it = CMSG_FIRSTHDR(&header); it; it = CMSG_NXTHDR(&header, it)) {
            int number = it->cmsg_len >= CMSG_LEN(4) ? *(int *)CMSG_DATA(it) : *CMSG_DATA(it);
            if (it->cmsg_level != IPPROTO_IP)
                continue;
            seen++;
            if (it->cmsg_type == IP_TTL)
                CHECK_EQUAL(number, ttl, "TTL of a datagram that waited");
            if (it->cmsg_type == IP_TOS)
                CHECK_EQUAL(number, tos, "TOS of a datagram that waited");
            if (it->cmsg_type == IP_PKTINFO) {
                struct in_pktinfo *info = (void *)CMSG_DATA(it);
                CHECK_EQUAL(ntohl(info->ipi_addr.s_addr), INADDR_LOOPBACK, "where a datagram was sent to");
                CHECK_EQUAL(info->ipi_ifindex, loopback, "the interface of a datagram");
            }
        }
        if (ttl)
            CHECK_EQUAL(seen, 3, "what is said of a datagram");
    }
    ssize_t more = recv(queue->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    CHECK(more < 0 && errno == EAGAIN, "queue %u has one datagram too many, of %zd bytes", queue->number, more);
}

static int server4, server6, client4, client6, lite, peeker, shut_read, shut_write, filtered, icmp = -1, raw6, link_fd, route;

static void make_queues(void)
{
    int any4 = keep(bound4(SOCK_DGRAM, "0.0.0.0", 6310)), any6 = keep(bound6(SOCK_DGRAM, "::", 6311));
    set(any4, IPPROTO_IP, IP_PKTINFO, 1);
    set(any4, IPPROTO_IP, IP_RECVTTL, 1);
    set(any4, IPPROTO_IP, IP_RECVTOS, 1);
    set(any4, SOL_SOCKET, SO_RCVBUF, 600000);
    set(any6, SOL_SOCKET, SO_RCVBUF, 600000);
    int first4 = bound4(SOCK_DGRAM, "127.0.0.1", 0), second4 = bound4(SOCK_DGRAM, "127.0.0.1", 0);
    int first6 = bound6(SOCK_DGRAM, "::1", 0), second6 = bound6(SOCK_DGRAM, "::1", 0);
    int ttl = 37, tos = 0x10;
    for (int i = 0; i < 2; i++) {
        NEED(setsockopt(i ? first4 : second4, IPPROTO_IP, IP_TTL, &ttl, sizeof ttl));
        NEED(setsockopt(i ? first4 : second4, IPPROTO_IP, IP_TOS, &tos, sizeof tos));
    }
    struct sockaddr_in to4 = at4("127.0.0.1", 6310);
    struct sockaddr_in6 to6 = at6("::1", 6311);
    fill(&queues[0], any4, first4, second4, &to4, sizeof to4);
    fill(&queues[1], any6, first6, second6, &to6, sizeof to6);
    /* IPv4 in the guise of IPv6. */
    int mapped = keep(bound6(SOCK_DGRAM, "::", 6312));
    set(mapped, SOL_SOCKET, SO_RCVBUF, 600000);
    to4.sin_port = htons(6312);
    fill(&queues[2], mapped, first4, second4, &to4, sizeof to4);
    keep(first4), keep(second4), keep(first6), keep(second6);
}

/* ---- options ---- */

static void membership(int fd, int level, const void *group, socklen_t length, const char *interface)
{
    struct group_req request = {.gr_interface = if_nametoindex(interface)};
    memcpy(&request.gr_group, group, length);
    NEED(setsockopt(fd, level, MCAST_JOIN_GROUP, &request, sizeof request));
}

static int member;

static void make_member(void)
{
    member = keep(bound4(SOCK_DGRAM, "0.0.0.0", 6320));
    struct sockaddr_in group = at4("239.77.3.4", 0), with_sources = at4("232.77.3.5", 0), source = at4("127.0.0.1", 0);
    membership(member, IPPROTO_IP, &group, sizeof group, "lo");
    struct group_source_req request = {.gsr_interface = loopback};
    memcpy(&request.gsr_group, &with_sources, sizeof with_sources);
    memcpy(&request.gsr_source, &source, sizeof source);
    NEED(setsockopt(member, IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, &request, sizeof request));
    set(member, IPPROTO_IP, IP_MULTICAST_TTL, 7);
    set(member, IPPROTO_IP, IP_MULTICAST_ALL, 0);
    struct in_addr lo = {htonl(INADDR_LOOPBACK)};
    NEED(setsockopt(member, IPPROTO_IP, IP_MULTICAST_IF, &lo, sizeof lo));
    look_at(member, IPPROTO_IP, IP_MULTICAST_IF);
}

static void check_member(void)
{
    static const struct {
        const char *group;
        unsigned mode, sources;
    } wanted[] = {{"239.77.3.4", MCAST_EXCLUDE, 0}, {"232.77.3.5", MCAST_INCLUDE, 1}};
    for (unsigned i = 0; i < COUNT(wanted); i++) {
        struct group_filter filter = {.gf_interface = loopback, .gf_numsrc = 1};
        struct sockaddr_in group = at4(wanted[i].group, 0);
        memcpy(&filter.gf_group, &group, sizeof group);
        socklen_t length = sizeof filter;
        CHECK(!getsockopt(member, IPPROTO_IP, MCAST_MSFILTER, &filter, &length), "no member of %s: %s", wanted[i].group, strerror(errno));
        CHECK_EQUAL(filter.gf_fmode, wanted[i].mode, "mode of a group");
        CHECK_EQUAL(filter.gf_numsrc, wanted[i].sources, "sources of a group");
    }
}

/* What is sent to the groups arrives once. */
static void talk_to_groups(void)
{
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in to = at4(i ? "232.77.3.5" : "239.77.3.4", 6320);
        uint64_t word = 77 + i, back = 0;
        CHECK(sendto(member, &word, sizeof word, 0, (void *)&to, sizeof to) == sizeof word, "to a group: %s", strerror(errno));
        struct pollfd poller = {member, POLLIN, 0};
        poll(&poller, 1, 2000);
        CHECK(recv(member, &back, sizeof back, MSG_DONTWAIT) == sizeof back && back == word, "nothing from group %d", i);
        CHECK(recv(member, &back, sizeof back, MSG_DONTWAIT) < 0, "twice from group %d", i);
    }
}

static void make_raw(void)
{
    icmp = keep(NEED(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP)));
    set(icmp, SOL_RAW, 1 /* ICMP_FILTER */, ~(1u << ICMP_TIMESTAMP));
    set(icmp, IPPROTO_IP, IP_HDRINCL, 1);
    raw6 = keep(NEED(socket(AF_INET6, SOCK_RAW, 200)));
    set(raw6, SOL_RAW, IPV6_CHECKSUM, 2);
    int icmp6 = keep(NEED(socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6)));
    struct icmp6_filter filter6;
    ICMP6_FILTER_SETBLOCKALL(&filter6);
    ICMP6_FILTER_SETPASS(200, &filter6);
    NEED(setsockopt(icmp6, IPPROTO_ICMPV6, ICMP6_FILTER, &filter6, sizeof filter6));
    look_at(icmp6, IPPROTO_ICMPV6, ICMP6_FILTER);
    struct sockaddr_in own = at4("127.0.0.1", 0), peer = at4("127.0.0.2", 0);
    int bound = NEED(socket(AF_INET, SOCK_RAW, 201));
    NEED(bind(bound, (void *)&own, sizeof own));
    NEED(connect(bound, (void *)&peer, sizeof peer));
    keep(bound);
}

static void make_link(void)
{
    link_fd = NEED(socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, 0));
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_LOOPBACK), .sll_ifindex = loopback};
    NEED(bind(link_fd, (void *)&address, sizeof address));
    struct packet_mreq request = {.mr_ifindex = address.sll_ifindex, .mr_type = PACKET_MR_PROMISC};
    NEED(setsockopt(link_fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request, sizeof request));
    set(link_fd, SOL_PACKET, PACKET_AUXDATA, 1);
    set(link_fd, SOL_PACKET, PACKET_VERSION, TPACKET_V2);
    keep(link_fd);
    look_at(link_fd, SOL_SOCKET, SO_PROTOCOL);
}

static void make_route(void)
{
    route = NEED(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_pid = 77777};
    NEED(bind(route, (void *)&address, sizeof address));
    int group = RTNLGRP_MPLS_ROUTE;
    NEED(setsockopt(route, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group));
    look_at(route, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS);
    set(route, SOL_NETLINK, NETLINK_EXT_ACK, 1);
    set(route, SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1);
    keep(route);
}

static void ask_route(void)
{
    struct {
        struct nlmsghdr header;
        struct ifinfomsg info;
    } question = {{sizeof question, RTM_GETLINK, NLM_F_REQUEST, 9, 0}, {.ifi_family = AF_UNSPEC, .ifi_index = loopback}};
    char answer[8192];
    CHECK(send(route, &question, sizeof question, 0) == sizeof question, "asking: %s", strerror(errno));
    ssize_t got = recv(route, answer, sizeof answer, 0);
    struct nlmsghdr *header = (void *)answer;
    CHECK(got > (ssize_t)sizeof *header && header->nlmsg_type == RTM_NEWLINK && header->nlmsg_seq == 9 && header->nlmsg_pid == 77777, "the answer has type %d", header->nlmsg_type);
}

static void make_options(void)
{
    int four = keep(bound4(SOCK_DGRAM, "127.0.0.1", 6330)), six = keep(bound6(SOCK_DGRAM | SOCK_NONBLOCK, "::1", 6331));
    static const struct {
        int name, value;
    } of_socket[] = {{SO_BROADCAST, 1}, {SO_REUSEADDR, 1}, {SO_REUSEPORT, 1}, {SO_MARK, 0x99}, {SO_TIMESTAMPNS, 1}, {SO_RXQ_OVFL, 1}, {SO_NO_CHECK, 1}, {SO_SNDBUF, 77777}, {SO_TIMESTAMPING, 3}, {SO_ZEROCOPY, 1}},
      of_ip[] = {{IP_TTL, 9}, {IP_RECVERR, 1}, {IP_MTU_DISCOVER, IP_PMTUDISC_PROBE}, {IP_MULTICAST_LOOP, 0}, {IP_MULTICAST_TTL, 3}, {IP_FREEBIND, 1}, {IP_TRANSPARENT, 1}, {IP_RECVOPTS, 1}, {IP_RETOPTS, 1}, {IP_MINTTL, 2}, {24 /* IP_BIND_ADDRESS_NO_PORT */, 1}, {25 /* IP_RECVFRAGSIZE */, 1}, {IP_UNICAST_IF, 0}, {IP_TOS, 0x20}},
      of_ipv6[] = {{IPV6_UNICAST_HOPS, 9}, {IPV6_MULTICAST_HOPS, 4}, {IPV6_MULTICAST_LOOP, 0}, {IPV6_RECVPKTINFO, 1}, {IPV6_RECVHOPLIMIT, 1}, {IPV6_RECVTCLASS, 1}, {IPV6_TCLASS, 0x40}, {IPV6_RECVERR, 1}, {IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO}, {IPV6_DONTFRAG, 1}, {IPV6_RECVPATHMTU, 1}, {IPV6_RECVRTHDR, 1}, {IPV6_RECVHOPOPTS, 1}, {IPV6_RECVDSTOPTS, 1}, {IPV6_AUTOFLOWLABEL, 0}, {IPV6_FREEBIND, 1}, {29 /* IPV6_MULTICAST_ALL */, 0}, {IPV6_MINHOPCOUNT, 3}, {33 /* IPV6_FLOWINFO_SEND */, 1}};
    for (unsigned i = 0; i < COUNT(of_socket); i++)
        set(four, SOL_SOCKET, of_socket[i].name, of_socket[i].value);
    for (unsigned i = 0; i < COUNT(of_ip); i++)
        set(four, IPPROTO_IP, of_ip[i].name, of_ip[i].value);
    for (unsigned i = 0; i < COUNT(of_ipv6); i++)
        set(six, IPPROTO_IPV6, of_ipv6[i].name, of_ipv6[i].value);
    /* The type of service changes it. */
    set(four, SOL_SOCKET, SO_PRIORITY, 5);
    set(six, IPPROTO_IPV6, IPV6_MULTICAST_IF, loopback);
    set(four, IPPROTO_UDP, UDP_CORK, 1);
    set(four, IPPROTO_UDP, UDP_SEGMENT, 1200);
    set(six, IPPROTO_UDP, UDP_GRO, 1);
    struct sockaddr_in6 group = at6("ff05::77:1", 0);
    membership(six, IPPROTO_IPV6, &group, sizeof group, "lo");
    look_at(four, SOL_SOCKET, SO_RCVBUF);
    /* Neither bound nor connected. */
    set(keep(NEED(socket(AF_INET6, SOCK_DGRAM, 0))), IPPROTO_IPV6, IPV6_V6ONLY, 1);
}

static void make_others(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE);
    lite = fd;
    if (fd >= 0) {
        struct sockaddr_in address = at4("127.0.0.1", 6340);
        NEED(bind(fd, (void *)&address, sizeof address));
        set(fd, IPPROTO_UDPLITE, 10 /* UDPLITE_SEND_CSCOV */, 20);
        set(fd, IPPROTO_UDPLITE, 11 /* UDPLITE_RECV_CSCOV */, 8);
        NEED(sendto(fd, "lite", 4, 0, (void *)&address, sizeof address));
        keep(fd);
    }
    peeker = keep(bound4(SOCK_DGRAM, "127.0.0.1", 6341));
    struct sockaddr_in address = at4("127.0.0.1", 6341);
    NEED(sendto(peeker, "peeked", 6, 0, (void *)&address, sizeof address));
    set(peeker, SOL_SOCKET, SO_PEEK_OFF, 2);
    shut_read = bound4(SOCK_DGRAM, "127.0.0.1", 6342);
    shut_write = bound4(SOCK_DGRAM, "127.0.0.1", 6343);
    NEED(connect(shut_read, (void *)&address, sizeof address));
    NEED(connect(shut_write, (void *)&address, sizeof address));
    NEED(shutdown(shut_read, SHUT_RD));
    NEED(shutdown(shut_write, SHUT_WR));
    keep(shut_read), keep(shut_write);
    filtered = keep(bound4(SOCK_DGRAM, "127.0.0.1", 6344));
    /* Only datagrams of 12 bytes, of which 8 are the header. */
    struct sock_filter program[] = {BPF_STMT(BPF_LD | BPF_W | BPF_LEN, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 12, 0, 1), BPF_STMT(BPF_RET | BPF_K, -1), BPF_STMT(BPF_RET | BPF_K, 0)};
    struct sock_fprog filter = {COUNT(program), program};
    NEED(setsockopt(filtered, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter));
    set(filtered, SOL_SOCKET, SO_LOCK_FILTER, 1);
}

static void check_others(void)
{
    struct pollfd pollers[] = {{shut_read, POLLRDHUP, 0}, {shut_write, POLLRDHUP, 0}};
    poll(pollers, 2, 0);
    CHECK(pollers[0].revents & POLLRDHUP && !(pollers[1].revents & POLLRDHUP), "the wrong half is shut");
    CHECK(send(shut_write, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE, "it is not shut for writing: %s", strerror(errno));
    struct sockaddr_in to = at4("127.0.0.1", 6344);
    char bytes[16];
    CHECK(sendto(filtered, "12345", 5, 0, (void *)&to, sizeof to) == 5 && sendto(filtered, "four", 4, 0, (void *)&to, sizeof to) == 4, "to the filter: %s", strerror(errno));
    struct pollfd poller = {filtered, POLLIN, 0};
    poll(&poller, 1, 2000);
    CHECK(recv(filtered, bytes, sizeof bytes, MSG_DONTWAIT) == 4 && recv(filtered, bytes, sizeof bytes, MSG_DONTWAIT) < 0, "it is not filtered");
}

static void finish_others(void)
{
    char bytes[16];
    if (lite >= 0)
        CHECK(recv(lite, bytes, sizeof bytes, MSG_DONTWAIT) == 4 && !memcmp(bytes, "lite", 4), "UDP-Lite: %s", strerror(errno));
    CHECK(recv(peeker, bytes, sizeof bytes, MSG_DONTWAIT | MSG_PEEK) == 4 && !memcmp(bytes, "eked", 4), "peeking: %s", strerror(errno));
    CHECK(recv(peeker, bytes, sizeof bytes, MSG_DONTWAIT) == 6 && !memcmp(bytes, "peeked", 6), "reading: %s", strerror(errno));
    int offset = 2;
    CHECK(!setsockopt(peeker, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset), "SO_PEEK_OFF: %s", strerror(errno));
}

/* ---- conversations ---- */

static void converse(int client, int server, uint64_t said)
{
    uint64_t heard[2] = {0};
    struct sockaddr_storage from;
    socklen_t length = sizeof from;
    CHECK(send(client, &said, 8, 0) == 8, "saying: %s", strerror(errno));
    CHECK(recvfrom(server, &heard[0], 8, 0, (void *)&from, &length) == 8 && heard[0] == said, "heard %lu instead of %lu", (unsigned long)heard[0], (unsigned long)said);
    CHECK(sendto(server, &said, 8, 0, (void *)&from, length) == 8, "answering: %s", strerror(errno));
    CHECK(recv(client, &heard[1], 8, 0) == 8 && heard[1] == said, "the answer is %lu instead of %lu", (unsigned long)heard[1], (unsigned long)said);
}

static void serve(int fd)
{
    static unsigned char bytes[65536];
    struct sockaddr_storage from;
    socklen_t length = sizeof from;
    ssize_t got;
    while ((got = recvfrom(fd, bytes, sizeof bytes, MSG_DONTWAIT, (void *)&from, &length)) >= 0) {
        checked();
        if (sendto(fd, bytes, got, 0, (void *)&from, length) != got)
            wrong("sending back: %s", strerror(errno));
        length = sizeof from;
    }
}

void victim_datagrams(void)
{
    int echo = -1;
    if (victim_argc) {
        bool wide = strchr(victim_argv[0], ':');
        /* Memory that takes a while to travel. */
        size_t words = argument(1, 1) * MIB / 8;
        volatile uint64_t *ballast = malloc(words * 8);
        for (size_t i = 0; ballast && i < words; i++)
            ballast[i] = mix(i);
        echo = wide ? bound6(SOCK_DGRAM, victim_argv[0], 6300) : bound4(SOCK_DGRAM, victim_argv[0], 6300);
        /* What is lost because the host has no time for this process is not lost by a move. */
        int room = 4 << 20;
        NEED(setsockopt(echo, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room));
    } else {
        server4 = keep(bound4(SOCK_DGRAM, "0.0.0.0", 6301));
        server6 = keep(bound6(SOCK_DGRAM, "::1", 6302));
        client4 = NEED(socket(AF_INET, SOCK_DGRAM, 0));
        client6 = NEED(socket(AF_INET6, SOCK_DGRAM, 0));
        struct sockaddr_in to4 = at4("127.0.0.1", 6301);
        struct sockaddr_in6 to6 = at6("::1", 6302);
        NEED(connect(client4, (void *)&to4, sizeof to4));
        NEED(connect(client6, (void *)&to6, sizeof to6));
        keep(client4), keep(client6);
        make_options();
        make_queues();
        make_member();
        make_raw();
        make_link();
        make_route();
        make_others();
    }
    ready();
    bool gone = false;
    for (uint64_t round = 1; beat(); round++) {
        if (echo >= 0) {
            /* Faster than a beat: a client waits for it. */
            for (int i = 0; i < 5; i++) {
                struct pollfd poller = {echo, POLLIN, 0};
                poll(&poller, 1, 2);
                serve(echo);
            }
            checked();
            continue;
        }
        check_options();
        check_places();
        check_member();
        check_others();
        talk_to_groups();
        converse(client4, server4, round);
        converse(client6, server6, round);
        if (!gone && told_to_go()) {
            gone = true;
            empty(&queues[0], "127.0.0.1", 37, 0x10);
            empty(&queues[1], "::1", 0, 0);
            empty(&queues[2], "::ffff:127.0.0.1", 0, 0);
            finish_others();
            ask_route();
        }
    }
}
