/* The protocol of victim.h. Everything that happens at run time uses descriptors opened before `ready`. */
#include "victim.h"
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>

const char *victim_dir;
int victim_argc;
char **victim_argv;

static int log_fd = -1, status_fd = -1;
static atomic_ulong beats, checks, errors;
static int64_t last_beat, largest_gap;
static volatile sig_atomic_t told_to_stop;
static struct timespec period = {.tv_nsec = 10 * 1000 * 1000};

static void on_sigterm(int signal)
{
    told_to_stop = 1;
}

static void line(const char *prefix, const char *format, va_list list)
{
    char text[1024];
    int length = snprintf(text, sizeof text, "%s", prefix);
    length += vsnprintf(text + length, sizeof text - length - 1, format, list);
    if (length > (int)sizeof text - 2)
        length = sizeof text - 2;
    text[length++] = '\n';
    if (write(log_fd, text, length) != length)
        atomic_fetch_add(&errors, 1);
}

void say(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    line("", format, list);
    va_end(list);
}

void wrong(const char *format, ...)
{
    if (atomic_fetch_add(&errors, 1) >= 20)
        return;
    va_list list;
    va_start(list, format);
    line("error: ", format, list);
    va_end(list);
}

void die(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    line("no set-up: ", format, list);
    va_end(list);
    _exit(2);
}

void not_here(const char *why)
{
    say("not on this machine: %s", why);
    _exit(77);
}

void checked(void)
{
    atomic_fetch_add_explicit(&checks, 1, memory_order_relaxed);
}

/* Writes the status file. It is to hold what this copy wrote last: else another copy of it has run, or runs. */
static void write_status(void)
{
    static char written[160];
    static int written_length;
    char text[160];
    if (pread(status_fd, text, sizeof text, 0) != written_length || memcmp(text, written, written_length))
        wrong("another copy runs: the status file is not as at heartbeat %lu", beats - 1);
    int length = snprintf(text, sizeof text, "beats=%lu checks=%lu errors=%lu largest_gap_us=%ld%40s\n", beats, checks,
                          errors, (long)(largest_gap / 1000), "");
    if (pwrite(status_fd, text, length, 0) != length)
        wrong("the status file takes nothing: %s", strerror(errno));
    memcpy(written, text, length);
    written_length = length;
}

void ready(void)
{
    last_beat = now_ns(CLOCK_REALTIME);
    write_status();
    say("ready");
}

bool beat(void)
{
    nanosleep(&period, NULL);
    int64_t now = now_ns(CLOCK_REALTIME);
    if (now - last_beat > largest_gap)
        largest_gap = now - last_beat;
    last_beat = now;
    beats++;
    write_status();
    return !told_to_stop;
}

bool stopping(void)
{
    return told_to_stop;
}

bool told_to_go(void)
{
    static bool told;
    if (!told)
        told = access(in_dir("go"), F_OK) == 0;
    return told;
}

int64_t now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

const char *in_dir(const char *name)
{
    static _Thread_local char paths[8][512];
    static _Thread_local unsigned next;
    char *path = paths[next++ % 8];
    snprintf(path, 512, "%s/%s", victim_dir, name);
    return path;
}

long argument(int place, long otherwise)
{
    return place < victim_argc ? atol(victim_argv[place]) : otherwise;
}

const char *option(const char *name)
{
    size_t length = strlen(name);
    for (int i = 0; i < victim_argc; i++)
        if (!strncmp(victim_argv[i], name, length) && victim_argv[i][length] == '=')
            return victim_argv[i] + length + 1;
    return NULL;
}

uint64_t mix(uint64_t value)
{
    value += 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

void page_fill(void *page, uint64_t key, uint64_t version)
{
    uint64_t *word = page, seed = mix(key ^ mix(version));
    word[0] = key;
    word[1] = version;
    for (unsigned i = 2; i < PAGE / 8; i++)
        word[i] = seed += 0x9e3779b97f4a7c15;
}

bool page_is(const void *page, uint64_t key, uint64_t version)
{
    const uint64_t *word = page;
    uint64_t seed = mix(key ^ mix(version)), difference = (word[0] ^ key) | (word[1] ^ version);
    for (unsigned i = 2; i < PAGE / 8; i++)
        difference |= word[i] ^ (seed += 0x9e3779b97f4a7c15);
    checked();
    return difference == 0;
}

size_t slurp(const char *path, char *buffer, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    size_t length = 0;
    ssize_t got;
    while (length < size - 1 && (got = read(fd, buffer + length, size - 1 - length)) > 0)
        length += got;
    close(fd);
    buffer[length] = 0;
    return length;
}

pthread_t start_thread(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    int error = pthread_create(&thread, NULL, body, argument);
    if (error)
        die("pthread_create: %s", strerror(error));
    return thread;
}

static atomic_uint set_up;

void thread_is_set_up(void)
{
    atomic_fetch_add(&set_up, 1);
}

void wait_for_threads(unsigned count)
{
    while (set_up < count)
        usleep(1000);
}

/* The victims, by name. */
#define VICTIM(name) void victim_##name(void);
#include "victims.def"
#undef VICTIM
static const struct {
    const char *name;
    void (*run)(void);
} victims[] = {
#define VICTIM(name) {#name, victim_##name},
#include "victims.def"
#undef VICTIM
};

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: victim NAME DIRECTORY [ARGUMENT...]\nvictims:");
        for (unsigned i = 0; i < COUNT(victims); i++)
            fprintf(stderr, " %s", victims[i].name);
        fprintf(stderr, "\n");
        return 2;
    }
    victim_dir = argv[2];
    victim_argc = argc - 3;
    victim_argv = argv + 3;
    log_fd = open(in_dir("log"), O_WRONLY | O_CREAT | O_APPEND, 0644);
    status_fd = open(in_dir("status"), O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (log_fd < 0 || status_fd < 0) {
        perror(victim_dir);
        return 2;
    }
    const char *beat_us = option("beat_us");
    if (beat_us)
        period.tv_nsec = atol(beat_us) * 1000;
    /* Threads that allocate for the first time would change the mappings at some odd moment. */
    mallopt(M_ARENA_MAX, 1);
    /* Only sleeps and polls are cut short by it, which is no error of the subject. */
    struct sigaction action = {.sa_handler = on_sigterm, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    /* A victim that begins anew keeps it from coming before there is a handler. */
    sigset_t end;
    sigemptyset(&end);
    sigaddset(&end, SIGTERM);
    sigprocmask(SIG_UNBLOCK, &end, NULL);
    for (unsigned i = 0; i < COUNT(victims); i++) {
        if (strcmp(victims[i].name, argv[1]))
            continue;
        victims[i].run();
        write_status();
        say("verdict %s beats=%lu checks=%lu errors=%lu largest_gap_us=%ld", errors ? "FAIL" : "pass", beats, checks, errors,
            (long)(largest_gap / 1000));
        _exit(errors ? 1 : 0);
    }
    die("there is no victim called %s", argv[1]);
}
