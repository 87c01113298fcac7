/* tun [alone]: files of /dev/net/tun. In a namespace with persistent interfaces tun0 (10.9.0.1/24), tap0 (10.8.0.1/24, whose neighbour
 * 10.8.0.2 is permanent) and mq0 (several queues): what is sent by one comes out of its file, what is written into the file arrives, and
 * all that the files say of themselves stays. `alone`: only tun0. */
#include "victim.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { PORT = 7007, HEADER = 12, IP = 20, UDP = 8, ETHERNET = 14 };

static struct queue {
    const char *name;
    const char *neighbour; /* to whom is sent, who answers */
    const char *own;
    short flags;
    bool tap, header, protocol; /* Ethernet; a virtio header; four bytes of protocol */
    int fd, socket;
    short said; /* what TUNGETIFF said first */
    int send_buffer, header_size;
} queues[] = {
    {.name = "tun0", .neighbour = "10.9.0.2", .own = "10.9.0.1", .flags = IFF_TUN | IFF_NO_PI},
    {.name = "tap0", .neighbour = "10.8.0.2", .own = "10.8.0.1", .flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, .tap = true, .header = true},
    {.name = "mq0", .flags = IFF_TUN | IFF_MULTI_QUEUE, .protocol = true},
    {.name = "mq0", .flags = IFF_TUN | IFF_MULTI_QUEUE, .protocol = true},
};
static unsigned used = COUNT(queues);
static int unattached = -1, again = -1;
static unsigned lost;

static short flags_of(int fd, char name[IFNAMSIZ])
{
    struct ifreq request = {0};
    if (ioctl(fd, TUNGETIFF, &request) < 0)
        return -1;
    memcpy(name, request.ifr_name, IFNAMSIZ);
    return request.ifr_flags;
}

static unsigned segments(const char *name)
{
    static int any = -1;
    if (any < 0)
        any = NEED(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    struct ethtool_value value = {.cmd = ETHTOOL_GTSO};
    struct ifreq request = {.ifr_data = (void *)&value};
    strcpy(request.ifr_name, name);
    return ioctl(any, SIOCETHTOOL, &request) < 0 ? ~0u : value.data;
}

static void attach(struct queue *queue)
{
    queue->fd = NEED(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC));
    struct ifreq request = {.ifr_flags = queue->flags};
    strcpy(request.ifr_name, queue->name);
    NEED(ioctl(queue->fd, TUNSETIFF, &request));
    if (queue->tap) {
        NEED(ioctl(queue->fd, TUNSETVNETHDRSZ, &(int){HEADER}));
        NEED(ioctl(queue->fd, TUNSETVNETLE, &(int){1}));
        NEED(ioctl(queue->fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4));
    }
    NEED(ioctl(queue->fd, TUNSETSNDBUF, &(int){123456 + queue->fd * (queue->neighbour != NULL)}));
    if (!queue->protocol)
        NEED(ioctl(queue->fd, TUNSETPERSIST, 0L));
    if (queue->neighbour) {
        queue->socket = NEED(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr = {inet_addr(queue->own)}};
        NEED(bind(queue->socket, (void *)&address, sizeof address));
    }
    NEED(ioctl(queue->fd, TUNGETSNDBUF, &queue->send_buffer));
    NEED(ioctl(queue->fd, TUNGETVNETHDRSZ, &queue->header_size));
}

static uint16_t sum(const void *bytes, size_t length)
{
    uint32_t all = 0;
    for (size_t at = 0; at + 1 < length; at += 2)
        all += ((const uint8_t *)bytes)[at] << 8 | ((const uint8_t *)bytes)[at + 1];
    while (all >> 16)
        all = (all & 0xffff) + (all >> 16);
    return htons(~all);
}

/* Takes packets out of the file until the one with this number comes; whether it did. */
static bool comes_out(struct queue *queue, uint64_t number, uint8_t *packet, size_t *before)
{
    *before = (queue->header ? HEADER : 0) + (queue->tap ? ETHERNET : 0);
    for (int64_t end = now_ns(CLOCK_MONOTONIC) + 300000000; now_ns(CLOCK_MONOTONIC) < end;) {
        poll(&(struct pollfd){.fd = queue->fd, .events = POLLIN}, 1, 50);
        ssize_t length = read(queue->fd, packet, 2048);
        if (length == (ssize_t)(*before + IP + UDP + sizeof number) && packet[*before + 9] == IPPROTO_UDP &&
            !memcmp(packet + *before + IP + UDP, &number, sizeof number))
            return true;
    }
    return false;
}

/* Sends a number to the neighbour and has it come back. */
static void converse(struct queue *queue, uint64_t number)
{
    struct sockaddr_in neighbour = {.sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr = {inet_addr(queue->neighbour)}};
    uint8_t packet[2048];
    size_t before;
    /* What waits in the file as it moves is lost: that may be so once for each move. */
    for (int attempt = 0;; attempt++) {
        CHECK(sendto(queue->socket, &number, sizeof number, 0, (void *)&neighbour, sizeof neighbour) == sizeof number,
              "%s takes nothing: %s", queue->name, strerror(errno));
        if (comes_out(queue, number, packet, &before))
            break;
        lost++;
        if (attempt == 3) {
            wrong("nothing comes out of %s", queue->name);
            return;
        }
    }
    uint8_t *ip = packet + before;
    uint32_t from;
    memcpy(&from, ip + 12, 4);
    memcpy(ip + 12, ip + 16, 4);
    memcpy(ip + 16, &from, 4);
    number = ~number;
    memcpy(ip + IP + UDP, &number, sizeof number);
    memset(ip + IP + 6, 0, 2); /* no checksum */
    memset(ip + 10, 0, 2);
    uint16_t header = sum(ip, IP);
    memcpy(ip + 10, &header, 2);
    if (queue->header)
        memset(packet, 0, HEADER);
    if (queue->tap) {
        uint8_t *frame = packet + before - ETHERNET, other[6];
        memcpy(other, frame, 6);
        memcpy(frame, frame + 6, 6);
        memcpy(frame + 6, other, 6);
    }
    ssize_t length = before + IP + UDP + sizeof number;
    CHECK(write(queue->fd, packet, length) == length, "%s: %s", queue->name, strerror(errno));
    uint64_t heard = 0;
    poll(&(struct pollfd){.fd = queue->socket, .events = POLLIN}, 1, 1000);
    ssize_t got = recv(queue->socket, &heard, sizeof heard, MSG_DONTWAIT);
    CHECK(got == sizeof heard && heard == number, "%s: %zd bytes, %lx instead of %lx", queue->name, got, heard, number);
}

static void look(struct queue *queue)
{
    char name[IFNAMSIZ] = "";
    CHECK_EQUAL(flags_of(queue->fd, name), queue->said, queue->name);
    CHECK(!strcmp(name, queue->name), "it is %s instead of %s", name, queue->name);
    int value = -1;
    CHECK_EQUAL(ioctl(queue->fd, TUNGETSNDBUF, &value) ?: value, queue->send_buffer, "send buffer");
    CHECK_EQUAL(ioctl(queue->fd, TUNGETVNETHDRSZ, &value) ?: value, queue->header_size, "size of the header");
    CHECK_EQUAL(ioctl(queue->fd, TUNGETVNETLE, &value) ?: value, queue->tap, "little-endian");
    CHECK_EQUAL(fcntl(queue->fd, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_RDWR | O_NONBLOCK, "status flags");
    CHECK_EQUAL(segments(queue->name), queue->tap, "segmentation left to others");
}

void victim_tun(void)
{
    if (access("/dev/net/tun", R_OK | W_OK))
        not_here("no /dev/net/tun");
    if (victim_argc > 0)
        used = 1;
    for (unsigned at = 0; at < used; at++)
        attach(&queues[at]);
    for (unsigned at = 0; at < used; at++)
        queues[at].said = flags_of(queues[at].fd, (char[IFNAMSIZ]){0});
    segments("lo");
    unattached = NEED(open("/dev/net/tun", O_RDWR | O_CLOEXEC));
    again = NEED(fcntl(queues[0].fd, F_DUPFD, 0));
    ready();
    for (uint64_t round = 1; beat(); round++)
        for (unsigned at = 0; at < used; at++) {
            look(&queues[at]);
            if (queues[at].neighbour)
                converse(&queues[at], mix(round << 8 | at));
            char name[IFNAMSIZ];
            CHECK(flags_of(unattached, name) < 0 && errno == EBADFD, "it is attached to %s", name);
            CHECK_EQUAL(flags_of(again, name), queues[0].said, "the second number");
        }
    CHECK(lost <= 8 * used, "%u packets did not come out", lost);
    say("%u packets did not come out", lost);
}
