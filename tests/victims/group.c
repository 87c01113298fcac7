/* group ADDRESS COUNT: a group of sockets that listen at one port (SO_REUSEPORT, socket(7)), each with a thread that accepts from it. Every
 * one of them has to get clients: what was accepted from each is in the file `accepted`, one line. */
#include "victim.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#define MOST 16

static struct member {
    int fd;
    volatile unsigned accepted;
} members[MOST];

static void *serve(void *argument)
{
    struct member *it = argument;
    thread_is_set_up();
    while (!stopping()) {
        char words[6];
        int fd = accept(it->fd, NULL, NULL);
        if (fd < 0)
            continue;
        /* As the victim of connections: a byte that says what for, then what is to come back. */
        if (recv(fd, words, sizeof words, MSG_WAITALL) == sizeof words)
            CHECK(send(fd, words + 1, sizeof words - 1, MSG_NOSIGNAL) == sizeof words - 1, "answering: %s", strerror(errno));
        else
            wrong("nothing came: %s", strerror(errno));
        it->accepted++;
        close(fd);
    }
    return NULL;
}

void victim_group(void)
{
    if (victim_argc < 2)
        die("group ADDRESS COUNT");
    unsigned count = atoi(victim_argv[1]);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(6200)};
    NEED(inet_pton(AF_INET, victim_argv[0], &address.sin_addr));
    if (count > MOST)
        die("too many");
    for (unsigned i = 0; i < count; i++) {
        int one = 1;
        members[i].fd = NEED(socket(AF_INET, SOCK_STREAM, 0));
        NEED(setsockopt(members[i].fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one));
        NEED(bind(members[i].fd, (void *)&address, sizeof address));
        NEED(listen(members[i].fd, 32));
        start_thread(serve, &members[i]);
    }
    wait_for_threads(count);
    int file = NEED(open(in_dir("accepted"), O_RDWR | O_CREAT, 0644));
    ready();
    while (beat()) {
        char line[MOST * 12] = "";
        size_t end = 0;
        for (unsigned i = 0; i < count; i++)
            end += snprintf(line + end, sizeof line - end, "%u ", members[i].accepted);
        memset(line + end, ' ', sizeof line - end);
        line[sizeof line - 1] = '\n';
        CHECK(pwrite(file, line, sizeof line, 0) == sizeof line, "the file: %s", strerror(errno));
    }
}
