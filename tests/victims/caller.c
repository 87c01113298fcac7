/* caller FROM TO PORT: asks for a connection that nobody answers for a while. Once told to go it must come about, and what is said comes back. */
#include "victim.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

void victim_caller(void)
{
    if (victim_argc != 3)
        die("caller FROM TO PORT");
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons(atoi(victim_argv[2]))};
    NEED(inet_pton(AF_INET, victim_argv[0], &from.sin_addr));
    NEED(inet_pton(AF_INET, victim_argv[1], &to.sin_addr));
    int fd = NEED(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    NEED(bind(fd, (void *)&from, sizeof from));
    CHECK(connect(fd, (void *)&to, sizeof to) == -1 && errno == EINPROGRESS, "the request: %s", strerror(errno));
    ready();
    bool said = false;
    while (beat()) {
        struct pollfd polled = {fd, POLLOUT, 0};
        int error = 0;
        socklen_t length = sizeof error;
        checked();
        NEED(poll(&polled, 1, 1));
        NEED(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length));
        CHECK(!error, "the request has failed: %s", strerror(error));
        if (polled.revents & POLLOUT && !said)
            said = send(fd, "hello", 5, MSG_NOSIGNAL) == 5;
    }
    char word[6] = "";
    CHECK(said && recv(fd, word, 5, 0) == 5 && !memcmp(word, "hello", 5), "nobody answered: %s", word);
}
