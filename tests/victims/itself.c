/* itself [ADDRESS]: connections of a process with itself. One is talked on; on one as much flows as fits; one is full and nobody reads, at the
 * other end of one the end waits behind what is unread; and new ones come all the time. */
#include "victim.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static int listener;
static struct sockaddr_storage address;
static socklen_t length;

struct pair {
    int near, far;
    uint64_t sent, got;
};

static unsigned char pattern(uint64_t position)
{
    return (unsigned char)(position * 31 + (position >> 8) * 7 + (position >> 16));
}

static struct pair make_pair(void)
{
    struct pair pair = {.near = NEED(socket(address.ss_family, SOCK_STREAM, 0))};
    NEED(connect(pair.near, (void *)&address, length));
    pair.far = NEED(accept(listener, NULL, NULL));
    return pair;
}

/* Sends at most so much; yields whether all of it fitted. */
static bool pour(struct pair *pair, uint64_t most)
{
    static unsigned char bytes[32768];
    while (most > 0) {
        size_t size = most < sizeof bytes ? most : sizeof bytes;
        for (size_t i = 0; i < size; i++)
            bytes[i] = pattern(pair->sent + i);
        ssize_t sent = send(pair->near, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            CHECK(errno == EAGAIN, "sending: %s", strerror(errno));
            return false;
        }
        pair->sent += sent;
        most -= sent;
    }
    return true;
}

/* Reads at most so much of what is there; yields whether the end has come. */
static bool draw(struct pair *pair, uint64_t most)
{
    static unsigned char bytes[32768];
    while (most > 0) {
        ssize_t got = recv(pair->far, bytes, most < sizeof bytes ? most : sizeof bytes, MSG_DONTWAIT);
        if (got < 0)
            CHECK(errno == EAGAIN, "receiving: %s", strerror(errno));
        if (got <= 0)
            return got == 0;
        for (ssize_t i = 0; i < got; i++)
            if (bytes[i] != pattern(pair->got + i)) {
                CHECK(false, "byte %lu is wrong", (unsigned long)(pair->got + i));
                break;
            }
        pair->got += got;
        most -= got;
    }
    return false;
}

static void talk(struct pair *pair)
{
    char word[32], back[32] = "";
    int size = snprintf(word, sizeof word, "message %lu", (unsigned long)pair->sent++);
    CHECK(send(pair->near, word, size, MSG_NOSIGNAL) == size, "talking: %s", strerror(errno));
    CHECK(recv(pair->far, back, size, MSG_WAITALL) == size && !strcmp(word, back), "heard '%s', not '%s'", back, word);
    CHECK(send(pair->far, back, size, MSG_NOSIGNAL) == size, "talking back: %s", strerror(errno));
    memset(back, 0, sizeof back);
    CHECK(recv(pair->near, back, size, MSG_WAITALL) == size && !strcmp(word, back), "heard back '%s', not '%s'", back, word);
}

static int option_of(int fd, int name)
{
    int value = -1;
    socklen_t size = sizeof value;
    getsockopt(fd, SOL_SOCKET, name, &value, &size);
    return value;
}

/* Asks for connections all the time. */
static void *call(void *unused)
{
    thread_is_set_up();
    while (!stopping()) {
        int fd = socket(address.ss_family, SOCK_STREAM, 0);
        if (connect(fd, (void *)&address, length)) {
            CHECK(false, "calling: %s", strerror(errno));
        } else {
            char byte = 0;
            CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == 1 && recv(fd, &byte, 1, 0) == 1 && byte == 'x', "the answer to a call");
        }
        close(fd);
        usleep(3000);
    }
    return NULL;
}

static void *answer(void *unused)
{
    thread_is_set_up();
    while (!stopping()) {
        char byte;
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            continue;
        if (recv(fd, &byte, 1, 0) == 1)
            send(fd, &byte, 1, MSG_NOSIGNAL);
        /* Closed by the caller first: its end keeps the port for a minute, not the listener's. */
        recv(fd, &byte, 1, 0);
        close(fd);
    }
    return NULL;
}

void victim_itself(void)
{
    const char *text = victim_argc ? victim_argv[0] : "127.0.0.1";
    struct sockaddr_in6 *address6 = (void *)&address;
    struct sockaddr_in *address4 = (void *)&address;
    address.ss_family = strchr(text, ':') ? AF_INET6 : AF_INET;
    length = address.ss_family == AF_INET6 ? sizeof *address6 : sizeof *address4;
    NEED(inet_pton(address.ss_family, text, address.ss_family == AF_INET6 ? (void *)&address6->sin6_addr : (void *)&address4->sin_addr));
    listener = NEED(socket(address.ss_family, SOCK_STREAM, 0));
    NEED(bind(listener, (void *)&address, length));
    NEED(listen(listener, 16));
    NEED(getsockname(listener, (void *)&address, &length));

    struct pair talked = make_pair(), flowing = make_pair(), full = make_pair(), ended = make_pair(), peeked = make_pair();
    while (pour(&full, MIB))
        ;
    pour(&ended, 30000);
    NEED(shutdown(ended.near, SHUT_WR));
    /* Looking at what is unread begins behind what has been looked at (socket(7)). */
    int offset = 0;
    bool looks = !setsockopt(peeked.far, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset);
    if (looks) {
        unsigned char bytes[1000];
        pour(&peeked, 5000);
        usleep(20000);
        NEED(recv(peeked.far, bytes, sizeof bytes, MSG_PEEK));
    }
    if (option("silent") == NULL) {
        start_thread(call, NULL);
        start_thread(answer, NULL);
        wait_for_threads(2);
    }
    usleep(300000);
    int room = option_of(full.near, SO_SNDBUF), room_there = option_of(full.far, SO_RCVBUF);
    uint64_t poured = full.sent;
    ready();
    bool end_seen = false;
    while (beat()) {
        talk(&talked);
        pour(&flowing, 400000);
        draw(&flowing, 300000);
        if (looks)
            CHECK_EQUAL(option_of(peeked.far, SO_PEEK_OFF), 1000, "SO_PEEK_OFF");
        if (full.got == 0) {
            CHECK_EQUAL(option_of(full.near, SO_SNDBUF), room, "the send buffer of a full connection");
            CHECK_EQUAL(option_of(full.far, SO_RCVBUF), room_there, "the receive buffer of a full connection");
        }
        if (told_to_go()) {
            draw(&full, 1 << 30);
            end_seen |= draw(&ended, 1 << 30);
        }
    }
    if (looks)
        draw(&peeked, 1 << 30);
    CHECK(!looks || peeked.got == 5000, "%lu bytes of 5000 came where they were looked at before", (unsigned long)peeked.got);
    if (told_to_go()) {
        usleep(100000);
        draw(&full, 1 << 30);
        CHECK(end_seen && ended.got == 30000, "%lu bytes of 30000 and %s end", (unsigned long)ended.got, end_seen ? "the" : "no");
        CHECK(full.got == poured, "%lu bytes of %lu came", (unsigned long)full.got, (unsigned long)poured);
    }
}
