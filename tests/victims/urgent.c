/* urgent: connections to itself in which urgent bytes wait all the time: between others or in front of them, read apart
 * already or not, and among the others where the program wants it so (SO_OOBINLINE). */
#include "victim.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static struct pair {
    const char *text;
    bool behind, inlined, taken;
    int from, to;
} pairs[] = {
    {"between others", true, false, false, -1, -1}, {"in front", false, false, false, -1, -1},
    {"taken, between others", true, false, true, -1, -1}, {"taken, in front", false, false, true, -1, -1},
    {"inline, between others", true, true, false, -1, -1}, {"inline, in front", false, true, false, -1, -1},
};

static void connect_pair(struct pair *pair)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int one = 1, listener = NEED(socket(AF_INET, SOCK_STREAM, 0));
    NEED(bind(listener, (void *)&address, length));
    NEED(listen(listener, 1));
    NEED(getsockname(listener, (void *)&address, &length));
    pair->from = NEED(socket(AF_INET, SOCK_STREAM, 0));
    NEED(connect(pair->from, (void *)&address, length));
    pair->to = NEED(accept(listener, NULL, NULL));
    if (pair->inlined)
        NEED(setsockopt(pair->to, SOL_SOCKET, SO_OOBINLINE, &one, sizeof one));
    close(listener);
}

/* What a round sends: a letter for each kind of byte, other ones in each round. */
static void letters(uint64_t round, char text[8])
{
    for (unsigned i = 0; i < 7; i++)
        text[i] = 'a' + mix(round * 8 + i) % 26;
}

static void receive_exactly(struct pair *pair, const char *want, size_t length)
{
    char got[8] = "";
    ssize_t read = recv(pair->to, got, length, 0);
    CHECK(read == (ssize_t)length && !memcmp(got, want, length), "%s: %zd bytes, %.7s instead of %.*s: %s", pair->text, read, got,
          (int)length, want, strerror(errno));
}

static void send_round(struct pair *pair, uint64_t round)
{
    char text[8], byte;
    letters(round, text);
    if (pair->behind)
        CHECK(send(pair->from, text, 3, 0) == 3, "%s: sending: %s", pair->text, strerror(errno));
    CHECK(send(pair->from, text + 3, 1, MSG_OOB) == 1, "%s: sending: %s", pair->text, strerror(errno));
    CHECK(send(pair->from, text + 4, 3, 0) == 3, "%s: sending: %s", pair->text, strerror(errno));
    /* It is on its way. */
    struct pollfd arrived = {pair->to, POLLPRI, 0};
    CHECK(pair->inlined || poll(&arrived, 1, 5000) == 1, "%s: nothing urgent came", pair->text);
    if (pair->taken)
        CHECK(recv(pair->to, &byte, 1, MSG_OOB) == 1 && byte == text[3], "%s: taking: %s", pair->text, strerror(errno));
}

static void check_round(struct pair *pair, uint64_t round)
{
    char text[8], byte = 0;
    int at_mark = 0;
    letters(round, text);
    if (pair->behind)
        receive_exactly(pair, text, 3);
    CHECK(ioctl(pair->to, SIOCATMARK, &at_mark) == 0 && at_mark, "%s: no mark in round %lu", pair->text, round);
    ssize_t apart = recv(pair->to, &byte, 1, MSG_OOB | MSG_DONTWAIT);
    if (pair->taken || pair->inlined)
        CHECK(apart == -1 && errno == EINVAL, "%s: an urgent byte in round %lu: %zd, %s", pair->text, round, apart, strerror(errno));
    else
        CHECK(apart == 1 && byte == text[3], "%s: %zd urgent bytes, %c instead of %c: %s", pair->text, apart, byte, text[3], strerror(errno));
    receive_exactly(pair, text + 3 + !pair->inlined, 3 + pair->inlined);
}

void victim_urgent(void)
{
    for (unsigned i = 0; i < COUNT(pairs); i++)
        connect_pair(&pairs[i]);
    ready();
    for (uint64_t round = 0;; round++) {
        for (unsigned i = 0; i < COUNT(pairs); i++)
            send_round(&pairs[i], round);
        bool goes_on = beat();
        for (unsigned i = 0; i < COUNT(pairs); i++)
            check_round(&pairs[i], round);
        if (!goes_on)
            return;
    }
}
