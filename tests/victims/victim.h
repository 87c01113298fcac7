/* The protocol that every victim keeps: a log, a status file, heartbeats, a verdict at SIGTERM. */
#ifndef VICTIM_H
#define VICTIM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB (1UL << 20)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* The directory given on the command line; the victim's own files go there. */
extern const char *victim_dir;
extern int victim_argc;
extern char **victim_argv;

/* The number at a place on the command line after the directory, or a default. */
long argument(int place, long otherwise);
/* The word `name=` on the command line, what follows it, or NULL. */
const char *option(const char *name);

/* Appends a line to the log. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Counts an error and logs the first ones. */
void wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Ends the victim because it could not be set up. */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
/* Ends the victim because this machine does not have its subject. */
void not_here(const char *why) __attribute__((noreturn));

/* Counts one thing looked at; logs when it is not as it should be. */
#define CHECK(condition, ...)          \
    do {                               \
        checked();                     \
        if (!(condition))              \
            wrong(__VA_ARGS__);        \
    } while (0)
#define CHECK_EQUAL(got, want, what)                                                        \
    do {                                                                                    \
        long long got_ = (long long)(got), want_ = (long long)(want);                       \
        CHECK(got_ == want_, "%s: %lld (0x%llx) instead of %lld", what, got_, got_, want_); \
    } while (0)
/* Ends the victim when a call needed for its set-up fails; yields the call's value. */
#define NEED(call)                                                           \
    ({                                                                       \
        __auto_type value_ = (call);                                         \
        if ((long)value_ == -1)                                              \
            die("%s:%d %s: %s", __FILE__, __LINE__, #call, strerror(errno)); \
        value_;                                                              \
    })

void checked(void);
/* Set-up is done: from here on the victim may be moved. */
void ready(void);
/* Sleeps one period (10 ms, or as the word beat_us=N says), writes the status file, and counts it as an error when another copy of the
 * victim has written it meanwhile; false after SIGTERM. Main thread only. */
bool beat(void);
/* True after SIGTERM; for other threads. */
bool stopping(void);
/* True once somebody has made the file `go` in the directory. */
bool told_to_go(void);

/* Nanoseconds of a clock. */
int64_t now_ns(clockid_t clock);
/* The path of a file in the victim's directory; static storage, overwritten after eight calls. */
const char *in_dir(const char *name);
/* A well mixed number, the same for the same input. */
uint64_t mix(uint64_t value);
/* Fills or checks a page so that its content tells its address-like key and its version. */
void page_fill(void *page, uint64_t key, uint64_t version);
bool page_is(const void *page, uint64_t key, uint64_t version);
/* Reads a whole file of /proc; only before `ready` and after `go`: a descriptor of /proc that a move comes upon is refused into a buffer; yields the number of bytes. */
size_t slurp(const char *path, char *buffer, size_t size);
/* Starts a thread, or ends the victim. */
#include <pthread.h>
pthread_t start_thread(void *(*body)(void *), void *argument);
/* A thread says that its own set-up is done; the main thread waits until so many have said it. */
void thread_is_set_up(void);
void wait_for_threads(unsigned count);

/* Starts threads that rewrite and check memory of their own until they are told to stop, as the victim `memory` does; waits for their end. */
void start_hammering(long threads, long mib, long rate);
void end_hammering(void);

#endif
