/* moody DEED...: does things at random instants that a migration would rather not meet, and goes on checking itself: `unmap`, `fork`, `exec`,
 * `threads`, `signals`, `credentials`, `descriptors`; `end` ends it by its own doing at a random instant once told to go. With `seed=N`
 * it does the same again; with `ballast` it has memory that it seldom looks at, and `unmap` gives that back bit by bit. Its main thread does `exec`, another one everything else. */
#include "victim.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/fsuid.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define PAGES 512
#define BALLAST 4096
static char *memory, *ballast;
static size_t ballast_pages;
static uint64_t state = 1;
static volatile sig_atomic_t by_one, by_other;

static bool does(const char *deed)
{
    for (int i = 0; i < victim_argc; i++)
        if (!strcmp(victim_argv[i], deed))
            return true;
    return false;
}

static uint64_t roll(uint64_t below)
{
    return (state = mix(state)) % below;
}

static void one(int signal)
{
    by_one++;
}

static void other(int signal)
{
    by_other++;
}

static void unmap(void)
{
    size_t size = (1 + roll(64)) * PAGE;
    char *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(place != MAP_FAILED, "mmap: %s", strerror(errno));
    if (place == MAP_FAILED)
        return;
    uint64_t key = roll(UINT32_MAX);
    for (size_t at = 0; at < size; at += PAGE)
        page_fill(place + at, key + at, 1);
    usleep(roll(3000));
    for (size_t at = 0; at < size; at += PAGE)
        CHECK(page_is(place + at, key + at, 1), "page %zu of %p is another one", at / PAGE, (void *)place);
    munmap(place, size);
}

static void look_at_ballast(void)
{
    if (ballast_pages == 0)
        return;
    size_t page = roll(ballast_pages);
    CHECK(page_is(ballast + page * PAGE, page, 9), "page %zu of the ballast is another one", page);
    if (!does("unmap") || roll(8))
        return;
    size_t less = 1 + roll(64);
    if (less > ballast_pages)
        less = ballast_pages;
    ballast_pages -= less;
    CHECK_EQUAL(munmap(ballast + ballast_pages * PAGE, less * PAGE), 0, "munmap");
}

/* A child looks whether it has what its parent has, and no more. */
static void have_a_child(void)
{
    unsigned page = roll(PAGES);
    pid_t child = fork();
    if (child == 0)
        _exit(page_is(memory + page * PAGE, page, 7) ? 0 : 3);
    if (child == -1)
        return;
    int status = -1;
    pid_t ended;
    while ((ended = waitpid(child, &status, 0)) == -1 && errno == EINTR)
        ;
    CHECK(ended == child && status == 0, "the child %d ended with %x (waitpid: %d)", child, status, ended);
}

static void *short_life(void *number)
{
    usleep(roll(1000));
    return number;
}

static void start_and_join(void)
{
    pthread_t thread;
    void *number = NULL;
    if (pthread_create(&thread, NULL, short_life, &state))
        return;
    pthread_join(thread, &number);
    CHECK(number == &state, "a thread ended with %p", number);
}

static void signals(void)
{
    bool first = roll(2);
    struct sigaction action = {.sa_handler = first ? one : other}, found;
    CHECK_EQUAL(sigaction(SIGUSR2, &action, NULL), 0, "sigaction");
    usleep(roll(2000));
    CHECK_EQUAL(sigaction(SIGUSR2, NULL, &found), 0, "sigaction");
    CHECK(found.sa_handler == action.sa_handler, "another handler");
    int before = first ? by_one : by_other;
    raise(SIGUSR2);
    CHECK_EQUAL(first ? by_one : by_other, before + 1, "signals that were handled");
}

static void credentials(void)
{
    uid_t id = 1000 + roll(1000);
    setfsuid(id);
    usleep(roll(2000));
    CHECK_EQUAL(setfsuid(-1), id, "fsuid");
    setfsuid(geteuid());
}

static void descriptors(void)
{
    int fds[8];
    for (unsigned i = 0; i < COUNT(fds); i++) {
        fds[i] = open(in_dir("scratch"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        CHECK(fds[i] >= 0, "open: %s", strerror(errno));
        lseek(fds[i], 100 + i, SEEK_SET);
    }
    usleep(roll(2000));
    for (unsigned i = 0; i < COUNT(fds); i++) {
        CHECK_EQUAL(lseek(fds[i], 0, SEEK_CUR), 100 + i, "offset");
        CHECK_EQUAL(close(fds[i]), 0, "close");
    }
}

static void *restless(void *unused)
{
    static const struct {
        const char *name;
        void (*deed)(void);
    } deeds[] = {{"unmap", unmap},     {"fork", have_a_child},       {"threads", start_and_join},
                 {"signals", signals}, {"credentials", credentials}, {"descriptors", descriptors}};
    thread_is_set_up();
    while (!stopping()) {
        unsigned which = roll(COUNT(deeds));
        if (does(deeds[which].name))
            deeds[which].deed();
        look_at_ballast();
        if (does("end") && told_to_go() && roll(40) == 0)
            _exit(42);
        usleep(roll(does("rarely") ? 20000 : 2000));
    }
    return NULL;
}

/* Begins anew with another image of itself: it is ready already, and tells nobody. */
static void begin_anew(void)
{
    char *words[32] = {"victim", "moody", (char *)victim_dir};
    int count = 3;
    for (int i = 0; i < victim_argc && count < 30; i++)
        if (strncmp(victim_argv[i], "seed=", 5))
            words[count++] = victim_argv[i];
    char seed[32];
    snprintf(seed, sizeof seed, "seed=%lu", (unsigned long)roll(UINT32_MAX));
    words[count] = seed;
    sigset_t end;
    sigemptyset(&end);
    sigaddset(&end, SIGTERM);
    sigprocmask(SIG_BLOCK, &end, NULL);
    execv("/proc/self/exe", words);
    wrong("execv: %s", strerror(errno));
}

void victim_moody(void)
{
    const char *seed = option("seed");
    state = seed ? strtoul(seed, NULL, 10) + 1 : (uint64_t)getpid();
    memory = NEED(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (unsigned i = 0; i < PAGES; i++)
        page_fill(memory + i * PAGE, i, 7);
    if (does("ballast")) {
        ballast = NEED(mmap(NULL, BALLAST * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        for (unsigned i = 0; i < BALLAST; i++)
            page_fill(ballast + i * PAGE, i, 9);
        ballast_pages = BALLAST;
    }
    start_thread(restless, NULL);
    wait_for_threads(1);
    ready();
    while (beat()) {
        for (unsigned i = 0; i < PAGES; i++)
            CHECK(page_is(memory + i * PAGE, i, 7), "page %u is another one", i);
        if (does("exec") && told_to_go() && roll(20) == 0)
            begin_anew();
    }
}
