/* store ADDRESS THREADS MIB RATE: pages that TCP clients set and ask for, on port 6300, beside threads that rewrite and check memory of
 * their own. A question is two words: a key, and the version that its page is to have from now on, or 0 to ask for it. The answer is
 * the same with the version that the page has. */
#include "victim.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define KEYS 1024UL
#define MOST 64

struct message {
    uint64_t key, version;
};

static char *pages;
static uint64_t versions[KEYS];

static bool answer(int fd)
{
    struct message message;
    if (recv(fd, &message, sizeof message, MSG_WAITALL) != sizeof message)
        return false;
    if (message.key >= KEYS) {
        wrong("a client asks for key %lu", message.key);
        return false;
    }
    char *page = pages + message.key * PAGE;
    if (message.version) {
        versions[message.key] = message.version;
        page_fill(page, message.key, message.version);
    } else {
        message.version = versions[message.key];
        CHECK(page_is(page, message.key, message.version), "the page of key %lu is not version %lu", message.key,
              message.version);
    }
    return send(fd, &message, sizeof message, MSG_NOSIGNAL) == sizeof message;
}

void victim_store(void)
{
    pages = NEED(mmap(NULL, KEYS * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (uint64_t key = 0; key < KEYS; key++)
        page_fill(pages + key * PAGE, key, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(6300)};
    if (victim_argc < 1 || inet_pton(AF_INET, victim_argv[0], &address.sin_addr) != 1)
        die("no address");
    int one = 1, listener = NEED(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    NEED(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    NEED(bind(listener, (struct sockaddr *)&address, sizeof address));
    NEED(listen(listener, MOST));
    struct pollfd polled[1 + MOST] = {{listener, POLLIN, 0}};
    unsigned count = 1;
    start_hammering(argument(1, 2), argument(2, 8), argument(3, 2));
    ready();
    while (beat()) {
        if (poll(polled, count, 0) <= 0)
            continue;
        for (unsigned i = 1; i < count; i++)
            if (polled[i].revents && !answer(polled[i].fd)) {
                close(polled[i].fd);
                polled[i--] = polled[--count];
            }
        int fd = count <= MOST ? accept4(listener, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (fd >= 0)
            polled[count++] = (struct pollfd){fd, POLLIN, 0};
    }
    end_hammering();
}
